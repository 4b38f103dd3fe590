"""One request on one rank: its prompts, then decode steps, run eagerly or replayed from a captured graph.

Shapes: T tokens at hand, N sequences of the request, V vocabulary.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from exflow.job.cluster import annotate_errors
from exflow.model.decoder import Decoder, Rows
from exflow.model.sampling import choose_tokens
from exflow.profiling.trace import DECODE, PREFILL
from exflow.runtime.graph_counters import counters_of
from exflow.runtime.kv_cache import KVCache
from exflow.runtime.request import Observer, Request, not_finite
from exflow.runtime.strategies import RankStrategy

if TYPE_CHECKING:
    from exflow.runtime.graph_runner import CapturedDecode

CHECK_EVERY = 16  # captured steps between two checks for failures and ended sequences


class Choices:
    """Chooses and records this rank's tokens of one request.

    first_sequence: id of the request's first sequence. chosen: token by (number of its sequence in the
    request, position).
    """

    def __init__(
        self, request: Request, first_sequence: int, device: torch.device, observe: Observer | None = None
    ) -> None:
        self.request, self.first, self.observe = request, first_sequence, observe
        self.sequence_N = torch.arange(self.first, self.first + len(request.prompts), device=device)
        self.lengths = [len(prompt) for prompt in request.prompts]
        self.longest = max(self.lengths)
        self.ends = torch.tensor(request.end_tokens, dtype=torch.int64, device=device)
        self.chosen: dict[tuple[int, int], int] = {}

    def choose(self, logits_TV: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        """Choose the token after each row.

        Returns the tokens and rows of the next step, without ended sequences.

        Raises WrongResult for logits that are NaN or infinite.
        """
        self._check_finite(logits_TV, rows)
        if self.observe is not None:
            self.observe(rows, logits_TV)
        next_T = rows.position_T + 1
        token_T = choose_tokens(logits_TV, self.request.sampling, rows.sequence_T - self.first, next_T)
        places = zip((rows.sequence_T - self.first).tolist(), next_T.tolist(), strict=True)
        self.chosen.update(zip(places, token_T.tolist(), strict=True))
        alive_T = torch.isin(token_T, self.ends, invert=True)
        return token_T[alive_T], Rows(rows.sequence_T[alive_T], next_T[alive_T], DECODE)

    def _check_finite(self, logits_TV: Tensor, rows: Rows) -> None:
        """Raise WrongResult for NaN or infinite logits; such values in a layer make a token's logits NaN."""
        finite_T = logits_TV.isfinite().all(dim=1)
        if finite_T.all():
            return
        row = int(finite_T.logical_not().nonzero()[0, 0])
        number = int(rows.sequence_T[row]) - self.first
        step = int(rows.position_T[row]) + 1 - self.lengths[number]
        raise not_finite(number, step)


def collected(request: Request, chosen_by_rank: list[dict[tuple[int, int], int]]) -> list[list[int]]:
    """The new tokens of each sequence, in order, merged from all ranks."""
    tokens: list[list[int]] = [[] for _ in request.prompts]
    chosen = {place: token for each in chosen_by_rank for place, token in each.items()}
    for (sequence, _), token in sorted(chosen.items()):
        tokens[sequence].append(token)
    return tokens


@annotate_errors("the prompts")
def run_prompts(
    decoder: Decoder, strategy: RankStrategy, cache: KVCache, choices: Choices
) -> tuple[Tensor, Rows]:
    """Run the prompts that this rank admits. Returns the first new token of each, and its row."""
    device = choices.sequence_N.device
    attention, layout = strategy.prefill(cache, choices.sequence_N, choices.lengths)
    admitted = choices.sequence_N[strategy.admits(choices.sequence_N)].tolist()
    prompts = [torch.tensor(choices.request.prompts[sequence - choices.first]) for sequence in admitted]
    lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
    empty = torch.empty(0, dtype=torch.int64)
    rows = Rows(
        torch.tensor(admitted, dtype=torch.int64).repeat_interleave(lengths).to(device),
        torch.cat([empty, *(torch.arange(len(prompt)) for prompt in prompts)]).to(device),
        PREFILL,
    )
    hidden_TD, rows = decoder(torch.cat([empty, *prompts]).to(device), rows, attention, layout)
    last = (lengths.cumsum(0) - 1).to(device)
    ends = Rows(rows.sequence_T[last], rows.position_T[last], PREFILL)
    return choices.choose(decoder.logits(hidden_TD[last]), ends)


class Decoding(Protocol):
    """Generates the tokens after the first. cache: takes the prompts' keys and values. steps: steps run."""

    cache: KVCache
    steps: int

    def begin(self, token_T: Tensor, rows: Rows) -> None:
        """Take over after the prompts: the tokens to run next, and their rows."""

    def run(self, tell: Callable[[int], None]) -> None:
        """Decode until every sequence has ended. tell: called with the number of new tokens of a sequence."""


class EagerDecoding:
    """Runs each step layer by layer."""

    def __init__(self, decoder: Decoder, strategy: RankStrategy, choices: Choices) -> None:
        self.decoder, self.strategy, self.choices = decoder, strategy, choices
        self.steps = 0
        self.cache = KVCache.empty(
            decoder.config,
            held=choices.sequence_N[strategy.holds(choices.sequence_N)],
            num_positions=choices.longest + choices.request.max_new_tokens,
            device=choices.sequence_N.device,
            dtype=decoder.embedding.weight.dtype,
        )

    def begin(self, token_T: Tensor, rows: Rows) -> None:
        self.token_T, self.rows = token_T, rows

    def run(self, tell: Callable[[int], None]) -> None:
        for step in range(1, self.choices.request.max_new_tokens):
            tell(step)
            with annotate_errors(f"decode step {step}"):
                if not self.advance():
                    break

    def advance(self) -> bool:
        """Run one step. Returns False, and counts no step, once no rank owns a token."""
        attention, layout = self.strategy.step(self.cache, self.choices.longest + self.steps + 1)
        hidden_TD, rows = self.decoder(self.token_T, self.rows, attention, layout)
        if self.strategy.idle(rows):
            return False
        self.steps += 1
        self.strategy.share(attention)
        self.token_T, self.rows = self.choices.choose(self.decoder.logits(hidden_TD), rows)
        return True


class GraphDecoding:
    """Replays a captured step."""

    def __init__(self, captured: "CapturedDecode", strategy: RankStrategy, choices: Choices) -> None:
        self.captured, self.strategy, self.choices = captured, strategy, choices
        self.steps = 0
        self.cache = captured.kv_cache(choices.first)

    def begin(self, token_T: Tensor, rows: Rows) -> None:
        self.strategy.finish_sharing()
        choices = self.choices
        self.captured.begin(choices.first, choices.lengths, token_T, rows, choices.request.sampling.seed)

    def run(self, tell: Callable[[int], None]) -> None:
        captured, choices, taken = self.captured, self.choices, 0
        listeners = captured.capture.decoder.listeners
        for taken in range(1, choices.request.max_new_tokens):
            captured.advance()
            if choices.observe is not None or listeners:
                captured.report(choices.observe, listeners)
            if taken % CHECK_EVERY == 0:
                captured.check()
                tell(taken)
                if choices.request.end_tokens and captured.all_ended():
                    break
        captured.check()
        chosen = captured.chosen(taken)
        choices.chosen.update({(number, position): token for number, position, token in chosen})
        if self.strategy.exchange is not None:
            self.strategy.exchange.counters = counters_of(captured, taken)
        self.steps = max((position - choices.lengths[number] for number, position, _ in chosen), default=0)

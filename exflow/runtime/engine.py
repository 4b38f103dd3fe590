"""Generation: admit prompts, prefill, then decode step by step until every sequence has ended.

The same loop runs a single process and a rank of many; the strategy knows the difference.
Shapes: T tokens at hand, N sequences of the request, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from exflow.comm.collectives import Counters, total
from exflow.console import note
from exflow.errors import InputError
from exflow.job.cluster import during, of_all
from exflow.model.decoder import Decoder, Rows
from exflow.model.sampling import GREEDY, Sampling, choose_tokens
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.listener import RoutingListener
from exflow.profiling.trace import DECODE, PREFILL
from exflow.runtime.kv_cache import KVCache
from exflow.runtime.request import Advance, Generation, Observer, Request, check_request, not_finite
from exflow.runtime.strategies import Strategy

if TYPE_CHECKING:
    from exflow.runtime.graph_runner import Capture, CapturedDecode

LOOK_EVERY = 16  # captured steps between two looks at whether all sequences have ended
MOST_CAPTURED = 16  # steps kept, each with buffers of its own beside the K/V cache

Item = TypeVar("Item")


class Engine:
    """A decoder and a strategy. `generate` is collective: every rank of the job calls it alike.

    capture: how to make decode steps of static shape; without it every step is run eagerly.
    """

    def __init__(self, decoder: Decoder, strategy: Strategy, capture: "Capture | None" = None) -> None:
        self.decoder = decoder
        self.strategy = strategy
        self.capture = capture
        self.captured: list[CapturedDecode] = []  # over one K/V cache, the one used last in front
        self.device = decoder.embedding.weight.device
        self.first_sequence = 0  # sequence ids go on from request to request

    @torch.inference_mode()
    def generate(
        self, request: Request, observe: Observer | None = None, advance: Advance | None = None
    ) -> Generation:
        """Run `request`; every rank returns the same Generation.

        observe: called with the rows and logits [T, V] of every choice made on this rank.
        advance: called now and then with the new tokens of each sequence, and the most that there will be.
        Raises InputError for prompts that are empty or do not fit the model, and WrongResult, on the rank
        that chose, where logits are NaN or infinite.
        """
        check_request(request, self.decoder.config)
        kind = _Run if self.capture is None else _CapturedRun
        run = kind(self, request, observe, advance)
        self.first_sequence += len(request.prompts)
        prefill, prefill_s = self._counted(run.prefill)
        decode, decode_s = self._counted(run.decode)
        results = self.of_all_ranks((run.chosen, prefill, decode, run.steps))
        return Generation(
            run.collect([chosen for chosen, *_ in results]),
            prefill_s,
            decode_s,
            max(steps for *_, steps in results),
            total([counters for _, counters, _, _ in results]),
            total([counters for _, _, counters, _ in results]),
        )

    def _counted(self, phase: Callable[[], None]) -> tuple[Counters, float]:
        counters = Counters()
        if self.strategy.exchange is not None:
            self.strategy.exchange.counters = counters
        self._synchronise()
        start = time.perf_counter()
        phase()
        self._synchronise()
        return counters, time.perf_counter() - start

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def prepare(
        self,
        batches: Iterable[int],
        positions: int,
        sampling: Sampling = GREEDY,
        end_tokens: tuple[int, ...] = (),
    ) -> None:
        """Capture decode steps before the first request comes; nothing where steps run eagerly. Collective.

        batches: sequences of the requests to come; positions: the most that a prompt and its new tokens will
        have. Sampling and end tokens are those of the requests, but for the seed. Raises InputError for more
        positions than the model has.
        """
        if positions > (most := self.decoder.config.max_positions):
            raise InputError(f"positions {positions}: the model has {most}; give so many or fewer")
        if self.capture is None:
            return
        more = self.capture.cluster.num_ranks - 1  # where the first sequence's home is another rank
        sizes = (size for batch in batches for size in (batch, batch + more))
        for size in sorted(sizes, reverse=True):  # the largest one's cache has room for the others
            self._captured_step(size, positions, sampling, end_tokens)

    def capture_for(self, request: Request) -> "CapturedDecode":
        """The captured step that serves `request`: one at hand, or a new one. Collective."""
        assert self.capture is not None
        positions = max(len(prompt) for prompt in request.prompts) + request.max_new_tokens
        sequences = self.first_sequence % self.capture.cluster.num_ranks + len(request.prompts)
        return self._captured_step(sequences, positions, request.sampling, request.end_tokens)

    def _captured_step(
        self, sequences: int, positions: int, sampling: Sampling, end_tokens: tuple[int, ...]
    ) -> "CapturedDecode":
        assert self.capture is not None
        wanted = (sequences, positions, sampling, end_tokens)
        found = next((each for each in self.captured if each.serves(*wanted)), None)
        if found is not None:
            self.captured.remove(found)
        else:
            if self.captured and not self.captured[0].has_room(sequences, positions):
                self.captured.clear()  # their memory first
            del self.captured[MOST_CAPTURED - 1 :]
            found = self.capture.make(*wanted, beside=self.captured[0] if self.captured else None)
            if self.capture.cluster.rank == 0:
                note(found.description)
        self.captured.insert(0, found)
        return found

    def close(self) -> None:
        """Free the captured steps: NCCL does not let a group go while a graph holds its collectives."""
        self.captured.clear()

    def of_all_ranks(self, mine: Item) -> list[Item]:
        """Every rank's `mine`, by rank; collective, and not counted."""
        if self.strategy.exchange is None:
            return [mine]
        return of_all(self.strategy.exchange.cluster, mine)

    def routing_layout(self) -> RoutingLayout:
        return self.decoder.routing_layout()

    def add_routing_listener(self, listener: RoutingListener) -> Callable[[], None]:
        return self.decoder.add_routing_listener(listener)


class _Run:
    """One request on this rank: the sequences it owns now, and the tokens it chose."""

    def __init__(
        self, engine: Engine, request: Request, observe: Observer | None, advance: Advance | None = None
    ) -> None:
        self.request, self.observe = request, observe
        self.tell = advance or (lambda done, total: None)
        self.decoder, self.strategy, self.device = engine.decoder, engine.strategy, engine.device
        self.first = engine.first_sequence
        self.sequence_N = torch.arange(self.first, self.first + len(request.prompts), device=self.device)
        self.lengths = [len(prompt) for prompt in request.prompts]
        self.longest = max(self.lengths)
        self.ends = torch.tensor(request.end_tokens, dtype=torch.int64, device=self.device)
        self.cache = self._cache(engine)
        self.chosen: dict[tuple[int, int], int] = {}
        self.steps = 0

    def _cache(self, engine: Engine) -> KVCache:
        return KVCache.empty(
            self.decoder.config,
            held=self.sequence_N[self.strategy.holds(self.sequence_N)],
            num_positions=self.longest + self.request.max_new_tokens,
            device=self.device,
            dtype=self.decoder.embedding.weight.dtype,
        )

    @during("the prompts")
    def prefill(self) -> None:
        """Run the prompts admitted here; leave the first new token of each to decode."""
        attention, layout = self.strategy.prefill(self.cache, self.sequence_N, self.lengths)
        admitted = self.sequence_N[self.strategy.admits(self.sequence_N)].tolist()
        prompts = [torch.tensor(self.request.prompts[sequence - self.first]) for sequence in admitted]
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int64)
        empty = torch.empty(0, dtype=torch.int64)
        rows = Rows(
            torch.tensor(admitted, dtype=torch.int64).repeat_interleave(lengths).to(self.device),
            torch.cat([empty, *(torch.arange(len(prompt)) for prompt in prompts)]).to(self.device),
            PREFILL,
        )
        hidden_TD, rows = self.decoder(torch.cat([empty, *prompts]).to(self.device), rows, attention, layout)
        last = (lengths.cumsum(0) - 1).to(self.device)
        self._choose(hidden_TD[last], Rows(rows.sequence_T[last], rows.position_T[last], PREFILL))

    def decode(self) -> None:
        for step in range(1, self.request.max_new_tokens):
            self.tell(step, self.request.max_new_tokens)
            with during(f"decode step {step}"):
                if not self.advance():
                    break

    def advance(self) -> bool:
        """One step; False, and no step, once no rank owns a token."""
        attention, layout = self.strategy.step(self.cache, self.longest + self.steps + 1)
        hidden_TD, rows = self.decoder(self.token_T, self.rows, attention, layout)
        if self.strategy.idle(rows):
            return False
        self.steps += 1
        self.strategy.share(attention)
        self._choose(hidden_TD, rows)
        return True

    def _choose(self, hidden_TD: Tensor, rows: Rows) -> None:
        """Choose the token after each row; what has not ended goes into the next step."""
        logits_TV = self.decoder.logits(hidden_TD)
        self._check_finite(logits_TV, rows)
        if self.observe is not None:
            self.observe(rows, logits_TV)
        next_T = rows.position_T + 1
        token_T = choose_tokens(logits_TV, self.request.sampling, rows.sequence_T - self.first, next_T)
        places = zip((rows.sequence_T - self.first).tolist(), next_T.tolist(), strict=True)
        self.chosen.update(zip(places, token_T.tolist(), strict=True))
        alive_T = torch.isin(token_T, self.ends, invert=True)
        self.token_T = token_T[alive_T]
        self.rows = Rows(rows.sequence_T[alive_T], next_T[alive_T], DECODE)

    def _check_finite(self, logits_TV: Tensor, rows: Rows) -> None:
        """What is not finite in any layer makes the logits of its token NaN."""
        finite_T = logits_TV.isfinite().all(dim=1)
        if finite_T.all():
            return
        row = int(finite_T.logical_not().nonzero()[0, 0])
        number = int(rows.sequence_T[row]) - self.first
        step = int(rows.position_T[row]) + 1 - self.lengths[number]
        raise not_finite(number, step)

    def collect(self, chosen_by_rank: list[dict[tuple[int, int], int]]) -> list[list[int]]:
        """The new tokens of each sequence, in order, whoever chose them."""
        tokens: list[list[int]] = [[] for _ in self.lengths]
        chosen = {place: token for each in chosen_by_rank for place, token in each.items()}
        for (sequence, _), token in sorted(chosen.items()):
            tokens[sequence].append(token)
        return tokens


class _CapturedRun(_Run):
    """The same request with prompts run eagerly and every decode step a replay."""

    def _cache(self, engine: Engine) -> KVCache:
        self.captured = engine.capture_for(self.request)
        return self.captured.kv_cache(self.first)

    def prefill(self) -> None:
        super().prefill()
        self.strategy.finish_sharing()
        seed = self.request.sampling.seed
        self.captured.begin(self.first, self.lengths, self.token_T, self.rows, seed)

    def decode(self) -> None:
        captured, taken = self.captured, 0
        for taken in range(1, self.request.max_new_tokens):
            captured.advance()
            if self.observe is not None or self.decoder.listeners:
                captured.report(self.observe, self.decoder.listeners)
            if taken % LOOK_EVERY == 0:
                captured.check()
                self.tell(taken, self.request.max_new_tokens)
                if self.request.end_tokens and captured.all_ended():
                    break
        captured.check()
        chosen = captured.chosen(taken)
        self.chosen.update({(number, position): token for number, position, token in chosen})
        if self.strategy.exchange is not None:
            vars(self.strategy.exchange.counters).update(vars(captured.counters(taken)))
        self.steps = max((position - self.lengths[number] for number, position, _ in chosen), default=0)

"""`exflow generate --verify`: what a job computed against one process without exchange, cache or graph, and
what it counted against the routing that it recorded.

The reference is the plain decoder over each sequence as a whole, eagerly, with all experts in one place. Of
the choices of tokens up to MOST are compared, spread evenly over sequences and steps.

Shapes: T tokens, S positions of a sequence, N steps of it, V vocabulary.
"""

from dataclasses import dataclass
from math import gcd
from typing import Self

import torch
from torch import Tensor

from exflow.errors import WrongResult
from exflow.model.attention import CausalAttention, rows_of_batch
from exflow.model.decoder import Decoder, Rows
from exflow.model.replay import ReplayedRouting
from exflow.model.sampling import scores_of
from exflow.model.single_process import AllExpertsHere
from exflow.placement.plan.plan import Plan
from exflow.placement.traffic.traffic import count_traffic
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace
from exflow.runtime.engine import Engine
from exflow.runtime.request import Generation, Request
from exflow.runtime.trace_recorder import JobRecorder

MOST = 256  # choices compared: their logits are kept, 4 bytes for each entry of the vocabulary
# Logits may differ by so much of the largest of their row, since sums are formed in another order. Measured
# on the shipped model, 4 ranks: 1.6e-6 in float32; 0.018 in bfloat16 (0.17 if gates choose for themselves).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

Choice = tuple[int, int]
"""A sequence of the request and a step of it; step 0 chooses the prompt's first new token."""
Seen = dict[Choice, Tensor]
"""The logits [V] float32 that tokens were chosen by."""


@dataclass(frozen=True)
class Sample:
    """Which choices of a request are compared: every so many-th, counted step by step."""

    sequences: int
    every: int

    @classmethod
    def of(cls, request: Request) -> Self:
        sequences = len(request.prompts)
        every = -(-sequences * request.max_new_tokens // MOST)
        while gcd(every, sequences) > 1:  # so that over the steps every sequence has its turn
            every += 1
        return cls(sequences, every)

    def __contains__(self, choice: Choice) -> bool:
        number, step = choice
        return (step * self.sequences + number) % self.every == 0


@dataclass(frozen=True)
class Witnessed:
    """What every rank saw of a request: logits of the sample, by rank, and the job's routing."""

    request: Request
    seen: list[Seen]
    trace: RoutingTrace


class Witness:
    """Watches an engine's next request; `observe` is the Observer to run it with."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self.engine, self.request = engine, request
        self.first = engine.first_sequence
        self.sample = Sample.of(request)
        self.recorder = JobRecorder(engine)
        self.seen: Seen = {}

    def observe(self, rows: Rows, logits_TV: Tensor) -> None:
        places = zip((rows.sequence_T - self.first).tolist(), rows.position_T.tolist(), strict=True)
        for row, (number, position) in enumerate(places):
            choice = number, position + 1 - len(self.request.prompts[number])
            if choice in self.sample:
                self.seen[choice] = logits_TV[row].cpu()

    def of_all_ranks(self) -> Witnessed:
        """Stop watching; collective."""
        return Witnessed(self.request, self.engine.of_all_ranks(self.seen), self.recorder.trace())


@dataclass(frozen=True)
class Compared:
    """How many choices were compared; the largest difference of a logit, as a share of its row's largest."""

    choices: int
    largest_difference: float
    tolerance: float


def check_choices(witnessed: Witnessed, generation: Generation, reference: Decoder) -> Compared:
    """Compare the sample's logits and tokens with those of `reference`, for an engine's first request.

    In bfloat16 the recorded routing dictates the reference's: rounding alone makes gates choose otherwise.
    Raises WrongResult at the first choice that no rank made, whose logits differ by more than TOLERANCE, or
    whose token is not the reference's (one that rounding can have put first will do).
    """
    weight, request = reference.embedding.weight, witnessed.request
    if weight.dtype == torch.bfloat16:
        reference.replay = ReplayedRouting.of(witnessed.trace, reference.config, weight.device)
    sample, tolerance = Sample.of(request), TOLERANCE[weight.dtype]
    differences = [0.0]
    for number, tokens in enumerate(generation.tokens):
        steps = [step for step in range(len(tokens)) if (number, step) in sample]
        right_NV = _logits(reference, request.prompts[number], tokens, number, steps)
        for step, right_V in zip(steps, right_NV, strict=True):
            place = f"--verify: sequence {number}, step {step} (0 is the prompt's)"
            found = [seen[number, step] for seen in witnessed.seen if (number, step) in seen]
            differences.append(_check_logits(place, found, right_V, tolerance))
            slack = 2 * tolerance * _largest(right_V) / (request.sampling.temperature or 1)
            _check_token(place, tokens[step], _scores(right_V, request, number, step), slack)
    return Compared(len(differences) - 1, max(differences), tolerance)


@torch.inference_mode()
def _logits(
    reference: Decoder, prompt: list[int], tokens: list[int], number: int, steps: list[int]
) -> Tensor:
    """The logits [N, V] that one process has at these steps of a sequence, given the tokens before."""
    device = reference.embedding.weight.device
    whole_S = torch.tensor(prompt + tokens[:-1], device=device)
    rows = rows_of_batch(1, len(whole_S), device, first_sequence=number)
    hidden_SD, _ = reference(whole_S, rows, CausalAttention(1), AllExpertsHere())
    return reference.logits(hidden_SD[[len(prompt) - 1 + step for step in steps]]).cpu()


def _scores(logits_V: Tensor, request: Request, number: int, step: int) -> Tensor:
    position = len(request.prompts[number]) + step
    return scores_of(logits_V[None], request.sampling, torch.tensor([number]), torch.tensor([position]))[0]


def _check_logits(place: str, found: list[Tensor], right_V: Tensor, tolerance: float) -> float:
    """The largest difference of a row's logits on any rank that has it, as a share of its largest one."""
    if not found:
        raise WrongResult(f"{place}: no rank chose its token; the exchange is at fault")
    difference = float((torch.stack(found) - right_V).abs().max()) / _largest(right_V)
    if not difference <= tolerance:
        raise WrongResult(
            f"{place}: the logits differ from those of one process by {difference:.2e} of the largest, "
            f"{tolerance:.0e} is allowed; exchange, cache or kernels are at fault"
        )
    return difference


def _check_token(place: str, token: int, score_V: Tensor, slack: float) -> None:
    behind = float(score_V.max() - score_V[token])
    if not behind <= slack:
        raise WrongResult(
            f"{place}: token {token} was chosen, one process chooses {int(score_V.argmax())}, whose score is "
            f"larger by {behind:.2e}; the choice is at fault"
        )


def _largest(logits_V: Tensor) -> float:
    return float(logits_V.abs().max())


def check_counters(
    generation: Generation,
    trace: RoutingTrace,
    plan: Plan,
    group_size: int,
    reference: Decoder,
    hierarchical: tuple[bool, bool] = (False, False),
) -> None:
    """Hold what the ranks counted against placement's count on the routing recorded in the same run.

    group_size: of a coherence group; 0 for `replicated`, which sends no messages. hierarchical: whether
    prompts and decode steps went by relays. Raises WrongResult at the first counter that is not as
    foretold.
    """
    phases = ((PREFILL, "prefill", 1), (DECODE, "decode", group_size))
    for (phase, name, owners), relays in zip(phases, hierarchical, strict=True):
        rows, counters = trace.select(trace.phase == phase), getattr(generation, name)
        foretold = _foretold(rows, plan, owners, max(1, group_size), reference, relays)
        for counter, moved in foretold.items():
            counted, expected = getattr(counters, counter), moved if group_size else 0
            if counted != expected:
                raise WrongResult(
                    f"--verify: {name}: the ranks counted {counted} {counter}, the routing that they "
                    f"recorded comes to {expected}; the counters or the exchange are at fault"
                )


def _foretold(
    trace: RoutingTrace, plan: Plan, owners: int, group_size: int, reference: Decoder, hierarchical: bool
) -> dict[str, int]:
    """Counters of a phase in which `owners` ranks may own a token, and `group_size` keep its context."""
    config, itemsize = reference.config, reference.embedding.weight.dtype.itemsize
    sent = count_traffic(trace, plan, max(1, owners), hierarchical)
    copied = count_traffic(trace, plan, group_size)
    messages = ("dispatch_intra", "dispatch_inter", "return_intra", "return_inter")
    return {
        **{name: getattr(sent, name) for name in messages},
        **{name: getattr(copied, name) for name in ("kv_intra", "kv_inter")},
        "hidden_bytes": sent.messages * config.hidden_size * itemsize,
        "kv_bytes": (copied.kv_intra + copied.kv_inter) * config.kv_width * itemsize,
    }

"""`exflow generate --verify`: compares a job with one process that has no exchange, cache or graph.

The reference runs the decoder eagerly over each whole sequence, with all experts in one process. It replays
the routing that the run recorded: if rounding decides a near-tie of a gate, the other expert changes the
logits far more than rounding does. The recorded routing itself is checked for every token and layer
(verify_routing.py), and the counters against the routing (verify_counters.py). Up to MOST choices of tokens
are compared, spread evenly over sequences and steps.

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
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.engine import Engine
from exflow.runtime.request import Generation, Request
from exflow.runtime.trace_recorder import JobRecorder
from exflow.runtime.verify_routing import GateScores, ScoredExperts, check_dictated, count_ties

MOST = 256  # choices compared; each keeps 4 bytes for every entry of the vocabulary
# Allowed difference of logits, as a share of the largest in their row: sums are formed in another order.
# Measured on the shipped model, 4 ranks: 1.6e-6 in float32, 0.018 in bfloat16.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}

Choice = tuple[int, int]
"""A sequence of the request and a step of it; step 0 chooses the prompt's first new token."""
Seen = dict[Choice, Tensor]
"""The logits [V] float32 from which each token was chosen."""


@dataclass(frozen=True)
class Sample:
    """The choices of a request to compare: every `every`-th one, counted step by step."""

    sequences: int
    every: int

    @classmethod
    def of(cls, request: Request) -> Self:
        sequences = len(request.prompts)
        every = -(-sequences * request.max_new_tokens // MOST)
        while gcd(every, sequences) > 1:  # then every sequence is compared in some step
            every += 1
        return cls(sequences, every)

    def __contains__(self, choice: Choice) -> bool:
        number, step = choice
        return (step * self.sequences + number) % self.every == 0


@dataclass(frozen=True)
class RunRecord:
    """Record of a run: sampled logits of each rank (`seen`), and the job's routing (`trace`)."""

    request: Request
    seen: list[Seen]
    trace: RoutingTrace


class RunRecorder:
    """Records an engine's next request, which must run with `observe` as its Observer."""

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

    def gather(self) -> RunRecord:
        """Stop recording, and gather the record. Collective."""
        return RunRecord(self.request, self.engine.all_gather_object(self.seen), self.recorder.trace())


@dataclass(frozen=True)
class Compared:
    """Result of a comparison of a run with one process.

    choices: tokens whose logits were compared. largest_difference: largest difference of a logit, as a share
    of its row's largest. tolerance: the difference allowed. routings: choices of experts, one for each token
    and MoE layer. ties: routings that differ from one process's by a near-tie.
    """

    choices: int
    largest_difference: float
    tolerance: float
    routings: int
    ties: int


def check_choices(recorded: RunRecord, generation: Generation, reference: Decoder) -> Compared:
    """Compare an engine's first request with `reference`, which replays the routing of the run.

    If the job replays a trace, `reference` must already replay it.

    Raises WrongResult at the first choice that no rank made, whose logits differ by more than TOLERANCE, or
    whose token is not the reference's, unless rounding can explain it. Raises it also at the first choice of
    experts that is neither the gate's nor a near-tie.
    """
    weight, request = reference.embedding.weight, recorded.request
    dictated = reference.replay
    if dictated is None:
        reference.replay = ReplayedRouting.of(recorded.trace, reference.config, weight.device)
    else:
        check_dictated(recorded.trace, dictated, reference.config)
    sample, tolerance = Sample.of(request), TOLERANCE[weight.dtype]
    differences, ties = [0.0], 0
    for number, tokens in enumerate(generation.tokens):
        steps = [step for step in range(len(tokens)) if (number, step) in sample]
        right_NV, gates = _reference_run(reference, request.prompts[number], tokens, number, steps)
        for step, right_V in zip(steps, right_NV, strict=True):
            place = f"verify: sequence {number}, step {step} (0 is the prompt's)"
            found = [seen[number, step] for seen in recorded.seen if (number, step) in seen]
            differences.append(_check_logits(place, found, right_V, tolerance))
            slack = 2 * tolerance * _largest(right_V) / (request.sampling.temperature or 1)
            _check_token(place, tokens[step], _scores(right_V, request, number, step), slack)
        if dictated is None:
            ties += sum(count_ties(number, gate, tolerance) for gate in gates)
    routings = recorded.trace.num_tokens * recorded.trace.num_layers
    return Compared(len(differences) - 1, max(differences), tolerance, routings, ties)


@torch.inference_mode()
def _reference_run(
    reference: Decoder, prompt: list[int], tokens: list[int], number: int, steps: list[int]
) -> tuple[Tensor, list[GateScores]]:
    """Run one sequence in one process. Returns the logits [N, V] at `steps`, and the scores of its gates."""
    device = reference.embedding.weight.device
    whole_S = torch.tensor(prompt + tokens[:-1], device=device)
    rows = rows_of_batch(1, len(whole_S), device, first_sequence=number)
    experts = ScoredExperts(reference.config)
    hidden_SD, _ = reference(whole_S, rows, CausalAttention(1), experts)
    logits_NV = reference.logits(hidden_SD[[len(prompt) - 1 + step for step in steps]]).cpu()
    return logits_NV, experts.gates


def _scores(logits_V: Tensor, request: Request, number: int, step: int) -> Tensor:
    position = len(request.prompts[number]) + step
    return scores_of(logits_V[None], request.sampling, torch.tensor([number]), torch.tensor([position]))[0]


def _check_logits(place: str, found: list[Tensor], right_V: Tensor, tolerance: float) -> float:
    """The largest difference of a row's logits on any rank, as a share of the row's largest logit.

    Raises WrongResult if no rank has the row, or if the difference exceeds `tolerance`.
    """
    if not found:
        raise WrongResult(f"{place}: no rank chose its token; the exchange is at fault")
    difference = float((torch.stack(found) - right_V).abs().max()) / _largest(right_V)
    if not difference <= tolerance:
        raise WrongResult(
            f"{place}: the logits differ from those of one process by {difference:.2e} of the largest, "
            f"with the same routing, {tolerance:.0e} is allowed; exchange, cache or kernels are at fault"
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

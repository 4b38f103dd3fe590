"""Compares every recorded choice of experts with the gates of one process.

Rounding can decide a near-tie: two orders of summation give scores that differ in their last bits, and
another expert comes first. Both choices are right then. A score is the product of a gate's row and a token's
normed hidden state, and rounding moves it by a share of

    size = (root mean square of the normed hidden state) x (norm of the gate's longest row).

The j-th expert that was chosen must have the j-th largest score, give or take 4 x tolerance x size, where
tolerance is the one for logits: a token's largest score is about 2 x size, and either of two scores may be
off by tolerance x the largest. Measured, as the largest distance of two scores that changed places over size:
1e-4 of 4e-4 allowed in float32 (Mixtral's widths, random weights, captured on a GPU), 0.03 of 0.2 in bfloat16
(the shipped model).

Shapes: S positions of a sequence, K choices, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from exflow.errors import WrongResult
from exflow.model.config import ModelConfig
from exflow.model.decoder import MoE, Rows
from exflow.model.replay import ReplayedRouting
from exflow.model.single_process import AllExpertsHere
from exflow.profiling.trace import RoutingTrace

VANISHING = 87.0  # scores this far below the largest have probability 0 in float32, and count as equal


@dataclass(frozen=True)
class GateScores:
    """Scores of one gate of the reference over a sequence, with the experts that the run recorded.

    layer: number of the hidden layer. chosen_SK: the recorded experts, int64. score_SE: the gate's scores
    before the softmax, float32. size_S: the size of a token's scores (see above), float32.
    """

    layer: int
    chosen_SK: Tensor
    score_SE: Tensor
    size_S: Tensor


class ScoredExperts(AllExpertsHere):
    """MoELayout of the reference: every expert in one process; collects the scores of every gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.moe_layer_ids = config.moe_layer_ids
        self.gates: list[GateScores] = []

    def moe(self, layer: MoE, hidden_TD: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        assert layer.replay is not None, "the reference is to replay the recorded routing"
        normed_TD = layer.norm(hidden_TD)
        row_norm_E = layer.router.gate.weight.float().norm(dim=1)
        self.gates.append(
            GateScores(
                layer=self.moe_layer_ids[layer.index],
                chosen_SK=layer.replay.experts(
                    layer.index, layer.replay.row_of(rows.sequence_T, rows.position_T)
                ),
                score_SE=layer.router.logits(normed_TD),
                size_S=normed_TD.float().square().mean(dim=1).sqrt() * row_norm_E.max(),
            )
        )
        return super().moe(layer, hidden_TD, rows)


def count_ties(sequence: int, gate: GateScores, tolerance: float) -> int:
    """Number of tokens whose experts differ from those of one process's gate by a near-tie.

    tolerance: allowed difference of logits, as a share of a row's largest. Raises WrongResult at the first
    token whose experts differ by more than a near-tie.
    """
    lowest_S1 = gate.score_SE.amax(dim=1, keepdim=True) - VANISHING
    score_SE = torch.maximum(gate.score_SE, lowest_S1)
    best = score_SE.topk(gate.chosen_SK.shape[1], dim=1)
    chosen_score_SK = score_SE.gather(1, gate.chosen_SK)
    allowed_S = 4 * tolerance * gate.size_S
    wrong_S = ~((best.values - chosen_score_SK).abs() <= allowed_S[:, None]).all(dim=1)
    if wrong_S.any():
        position = int(wrong_S.nonzero()[0])
        raise WrongResult(
            f"verify: sequence {sequence}, position {position}, layer {gate.layer}: the run chose "
            f"{_listed(gate.chosen_SK[position], chosen_score_SK[position])}, the gate of one process "
            f"{_listed(best.indices[position], best.values[position])}; scores that differ by more than "
            f"{float(allowed_S[position]):.1e} are no tie; the run's gate is at fault"
        )
    other_SK = gate.chosen_SK.sort(dim=1).values != best.indices.sort(dim=1).values
    return int(other_SK.any(dim=1).sum())


def check_dictated(trace: RoutingTrace, dictated: ReplayedRouting, config: ModelConfig) -> None:
    """Raise WrongResult at the first recorded choice that is not the one that the job's replay dictates."""
    sequence_R, position_R = (torch.tensor(each).long() for each in (trace.sequence, trace.position))
    device = dictated.expert.device
    row_R = dictated.row_of(sequence_R.to(device), position_R.to(device))
    right_RLK = dictated.expert[row_R].cpu()
    wrong_RL = (torch.from_numpy(trace.experts.astype("int64")) != right_RLK).any(dim=2)
    if wrong_RL.any():
        row, layer = wrong_RL.nonzero()[0].tolist()
        raise WrongResult(
            f"verify: sequence {sequence_R[row]}, position {position_R[row]}, layer "
            f"{config.moe_layer_ids[layer]}: the run chose {_named(trace.experts[row, layer].tolist())}, "
            f"the replayed trace dictates {_named(right_RLK[row, layer].tolist())}; the replay is at fault"
        )


def _listed(expert_K: Tensor, score_K: Tensor) -> str:
    """The experts with their scores in brackets."""
    scores = ", ".join(f"{score:.6g}" for score in score_K.tolist())
    return f"{_named(expert_K.tolist())} (scores {scores})"


def _named(experts: list[int]) -> str:
    return f"{'expert' if len(experts) == 1 else 'experts'} {', '.join(map(str, experts))}"

"""The MoE layout of one process: it holds every expert, and no token leaves it."""

from torch import Tensor

from exflow.model.decoder import MoE, Routing, Rows


class AllExpertsHere:
    """MoELayout of a single process: slot = logical expert, and no token ever leaves.

    routings: a list that collects every layer's routing, or None; training computes the balance loss from it.
    """

    def __init__(self, routings: list[Routing] | None = None) -> None:
        self.routings = routings

    def moe(self, layer: MoE, hidden_TD: Tensor, rows: Rows) -> tuple[Tensor, Rows]:
        normed_TD = layer.norm(hidden_TD)
        routing = layer.route(normed_TD, rows)
        if self.routings is not None:
            self.routings.append(routing)
        return hidden_TD + layer.experts(normed_TD, routing.expert_TK, routing.weight_TK), rows

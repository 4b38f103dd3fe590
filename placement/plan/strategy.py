"""Strategies: which ranks may run a token in a decode step."""

from enum import StrEnum

AUTO = "auto"  # on the command line: the strategy that exflow/cost/auto.py finds fastest


class Strategy(StrEnum):
    """Ways to share the tokens of a decode step among ranks; a member equals its name on the command line."""

    DISPATCH_COMBINE = "dispatch-combine"
    COHERENT = "coherent"
    NODE_COHERENT = "node-coherent"
    REPLICATED = "replicated"

    @property
    def key(self) -> str:
        """Its name among the figures of `evaluate`."""
        return self.value.replace("-", "_")

    def group_size(self, num_ranks: int, ranks_per_node: int) -> int:
        """Ranks of a coherence group: they share keys and values, so each of them may own the group's tokens.

        It is 1 for REPLICATED, where nothing is shared: every rank runs every token.
        """
        sizes = {Strategy.COHERENT: num_ranks, Strategy.NODE_COHERENT: ranks_per_node}
        return sizes.get(self, 1)

    @property
    def placed_for(self) -> "Strategy":
        """The strategy to place for; under REPLICATED no messages depend on the plan."""
        return Strategy.DISPATCH_COMBINE if self is Strategy.REPLICATED else self


OWNED = (Strategy.COHERENT, Strategy.NODE_COHERENT, Strategy.DISPATCH_COMBINE)
"""The strategies where a token has one owner; a plan is made for one of them."""

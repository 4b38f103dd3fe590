"""Work of a decode step: its sequences and weights (Workload), and its messages (StepTraffic)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from exflow.model.config import ModelConfig
from exflow.placement.plan.plan import Plan


@dataclass(frozen=True)
class Workload:
    """A decode step of the whole job.

    batch           sequences of all ranks together
    context         positions of each sequence
    ranks           GPUs of the job; ranks_per_node of them on each node
    layers          hidden layers; moe_layers of them have experts
    experts, top_k  experts of an MoE layer, and experts that a token chooses
    slots_per_rank  experts that a rank holds in an MoE layer, replicas included
    hidden_bytes    size of a hidden state
    kv_bytes        size of a token's keys and values in one layer
    expert_bytes    size of one expert's weights
    dense_bytes     size of all weights outside experts
    itemsize        bytes of one number
    seen            positions of `context` that attention reads, mean over layers; None: all. Eager steps read
                    and mask all positions in any case
    """

    batch: int
    context: int
    ranks: int
    ranks_per_node: int
    layers: int
    moe_layers: int
    experts: int
    slots_per_rank: int
    top_k: int
    hidden_bytes: int
    kv_bytes: int
    expert_bytes: int
    dense_bytes: int
    itemsize: int = 2
    seen: float | None = None

    @classmethod
    def of(cls, config: ModelConfig, plan: Plan, batch: int, context: int, itemsize: int) -> Self:
        """The workload of a model on the ranks of `plan`; numbers have `itemsize` bytes."""
        hidden, moe_layers = config.hidden_size, len(config.moe_layer_ids)
        attention = hidden * (2 * config.attention_width + config.kv_width)
        dense_mlps = (config.num_hidden_layers - moe_layers) * config.dense_mlp_weights
        dense = config.num_hidden_layers * attention + dense_mlps + moe_layers * hidden * config.num_experts
        return cls(
            batch=batch,
            context=context,
            ranks=plan.num_ranks,
            ranks_per_node=plan.topology.gpus_per_node,
            layers=config.num_hidden_layers,
            moe_layers=moe_layers,
            experts=config.num_experts,
            slots_per_rank=plan.slots_per_rank,
            top_k=config.top_k,
            hidden_bytes=hidden * itemsize,
            kv_bytes=config.kv_width * itemsize,
            expert_bytes=config.expert_weights * itemsize,
            dense_bytes=(dense + config.vocab_size * hidden) * itemsize,
            itemsize=itemsize,
            seen=config.positions_seen(context),
        )

    @property
    def tokens_per_rank(self) -> int:
        """Tokens of the rank that admitted most sequences."""
        return math.ceil(self.batch / self.ranks)

    @property
    def padded_batch(self) -> int:
        """The batch if every rank had as many tokens as the fullest rank."""
        return self.tokens_per_rank * self.ranks

    @property
    def peers(self) -> tuple[int, int]:
        """Number of other ranks in a rank's node, and in other nodes."""
        return self.ranks_per_node - 1, self.ranks - self.ranks_per_node

    @property
    def other_nodes(self) -> int:
        return self.ranks // self.ranks_per_node - 1


@dataclass(frozen=True)
class BatchCounts:
    """Counts of the busiest rank in batches drawn from a trace, in the mean MoE layer (see `step_time`).

    link_rows         rows in or out of the rank with most, dispatch plus combine, for each token of a rank;
                      None: not counted for this strategy
    expert_imbalance  choices that the busiest rank serves, over the mean
    experts_read      experts with a token on the rank of most
    """

    link_rows: float | None
    expert_imbalance: float
    experts_read: float

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Self:
        """Read the figures of a `step_time`, as a plan stores them."""
        return cls(figures["busiest_link_rows"], figures["compute_imbalance"], figures["experts_touched"])


@dataclass(frozen=True)
class StepTraffic:
    """Messages and copies of a strategy in a decode step, as placement counts them.

    Pairs are (inside a node, between nodes).

    group_size           ranks of a coherence group, which may own a token
    exchanges            synchronous all-to-alls in a step
    dispatch, combine    messages per token and MoE layer, to the experts and back
    kv                   copies of keys and values per token and layer
    expert_imbalance     choices that the busiest rank serves, over the mean
    attention_imbalance  tokens that the busiest rank owns, over the mean
    all_reduces          all-reduces in a step, which only `replicated` has
    drawn                counts of the busiest rank in batches of the step's own size; None: by formula

    Both imbalances are means over many tokens; a batch adds chance (`drawn`, or `imbalance_of_batch`).
    """

    group_size: int
    exchanges: int
    dispatch: tuple[float, float]
    combine: tuple[float, float]
    kv: tuple[float, float]
    expert_imbalance: float
    attention_imbalance: float
    all_reduces: int = 0
    drawn: BatchCounts | None = None

    @classmethod
    def of(cls, figures: dict[str, Any], group_size: int) -> Self:
        """Read one strategy's entry of placement.evaluate."""
        totals, messages = figures["totals"], figures["messages_per_token_layer"]
        # only the totals are split by both purpose and link
        scale = messages / totals["messages"] if totals["messages"] else 0.0
        return cls(
            group_size=group_size,
            exchanges=figures["exchanges_per_step"] if "all_reduces_per_step" not in figures else 0,
            dispatch=(totals["dispatch_intra"] * scale, totals["dispatch_inter"] * scale),
            combine=(totals["return_intra"] * scale, totals["return_inter"] * scale),
            kv=(figures["kv_intra_node"], figures["kv_inter_node"]),
            expert_imbalance=figures["imbalance"]["mean"],
            # ranks that own only the sequences they admitted own equally many
            attention_imbalance=figures["owner_imbalance"]["mean"] if group_size > 1 else 1.0,
            all_reduces=figures.get("all_reduces_per_step", 0),
        )


def imbalance_of_batch(imbalance: float, tokens: int, ranks: int) -> float:
    """Load of the busiest rank over the mean, in a batch of `tokens`; it is `imbalance` over many tokens.

    By chance alone the busiest rank has about 0.7 sqrt(2 ln ranks) deviations more than the mean: 0.82, 1.17
    and 1.43 for 2, 4 and 8 ranks.
    """
    chance = 0.7 * math.sqrt(2 * math.log(ranks) * (ranks - 1) / tokens)
    return min(float(ranks), 1 + math.hypot(imbalance - 1, chance))

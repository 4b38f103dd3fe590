"""What a decode step takes under each strategy, from what it moves and touches; a model, nothing is run here.

A step is its synchronous exchanges (latency, and the bytes of the busiest rank), what it computes (the bytes
that the busiest rank reads from memory, and launches), and of the keys and values shared in the background
what computing does not hide. What moves is placement's own count, as means per token and layer.
"""

import math
from dataclasses import dataclass
from typing import Any, Self

from exflow.comm.capacity import ROUND_BYTES, deviations
from exflow.comm.transport import Transport
from exflow.errors import InputError
from exflow.model.config import ModelConfig
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Name


@dataclass(frozen=True)
class Link:
    """An all-to-all of next to nothing takes latency_s, and peer_s more for each rank that the link leads to;
    a rank sends bytes_per_s, and receives as many.

    A latency that was measured among as many ranks as there are has peer_s in it.
    """

    latency_s: float
    bytes_per_s: float
    peer_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What the ranks run on: measured once, or given.

    inside, between  links of the ranks of a node, and of nodes: what each rank has of them when all send
    read_bytes_per_s from a rank's memory
    memory_bytes     that a rank has for weights, keys and values
    layer_s, token_s what each layer takes beyond that, and each token in it: launches, arithmetic
    round_bytes      by which an exchange leaves room (see Expectation)
    hides            the share of computing that hides what is sent in the background: none where one and
                     the same processor does both
    shared           all ranks share one processor, which is the limit: they wait for the sum of what they do,
                     and not for the busiest
    transport        how exchanges run: eagerly, or in a captured step (transport.py)
    flops_per_s      of a captured step's products; an eager step has it in token_s
    """

    inside: Link
    between: Link
    read_bytes_per_s: float
    memory_bytes: float
    layer_s: float = 0.0
    token_s: float = 0.0
    round_bytes: int = ROUND_BYTES["cpu"]
    hides: float = 1.0
    shared: bool = False
    transport: Transport = "eager"
    flops_per_s: float = math.inf


@dataclass(frozen=True)
class Load:
    """A decode step of the whole job: `batch` sequences that look at `context` positions.

    hidden_bytes    a hidden state; kv_bytes a token's keys and values in one layer
    expert_bytes    one expert's weights; dense_bytes all weights that are no expert's
    experts_read    of a MoE layer, by the rank that reads most; None: as if all were as likely to be chosen
    seen            of `context` what a token's attention is about, in the mean over layers; None: all of it.
                    Eager steps read all of it in any case, and mask
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
    experts_read: float | None = None
    seen: float | None = None

    @classmethod
    def of(cls, config: ModelConfig, plan: Plan, batch: int, context: int, itemsize: int) -> Self:
        """A model on the ranks of `plan`, with weights and hidden states of `itemsize` bytes a number."""
        hidden, expert, moe_layers = config.hidden_size, config.expert_weights, len(config.moe_layer_ids)
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
            expert_bytes=expert * itemsize,
            dense_bytes=(dense + config.vocab_size * hidden) * itemsize,
            itemsize=itemsize,
            seen=config.positions_seen(context),
        )

    @property
    def tokens_per_rank(self) -> int:
        """Of the rank that admitted most."""
        return math.ceil(self.batch / self.ranks)

    @property
    def places(self) -> int:
        """For tokens, as many on every rank as the one that admitted most has."""
        return self.tokens_per_rank * self.ranks


@dataclass(frozen=True)
class Moved:
    """What a strategy moves, as placement counts it: messages per token and MoE layer, inside a node and
    between nodes; copies of keys and values per token and layer; synchronous collectives a step.

    busiest: load of the busiest rank over the mean; attending: the same of the tokens that ranks own. Both
    are those of many tokens: a batch has chance besides (`_of_a_batch`).
    """

    group_size: int
    exchanges: int
    dispatch: tuple[float, float]
    give_back: tuple[float, float]
    kv: tuple[float, float]
    busiest: float
    attending: float
    all_reduces: int = 0

    @classmethod
    def of(cls, figures: dict[str, Any], group_size: int) -> Self:
        """From one strategy's entry of placement.evaluate."""
        totals, messages = figures["totals"], figures["messages_per_token_layer"]
        # the means know no split by both purpose and link, the totals do
        scale = messages / totals["messages"] if totals["messages"] else 0.0
        return cls(
            group_size=group_size,
            exchanges=figures["exchanges_per_step"] if "all_reduces_per_step" not in figures else 0,
            dispatch=(totals["dispatch_intra"] * scale, totals["dispatch_inter"] * scale),
            give_back=(totals["return_intra"] * scale, totals["return_inter"] * scale),
            kv=(figures["kv_intra_node"], figures["kv_inter_node"]),
            busiest=figures["imbalance"]["mean"],
            # whose owner is its home has as many sequences as every other rank
            attending=figures["owner_imbalance"]["mean"] if group_size > 1 else 1.0,
            all_reduces=figures.get("all_reduces_per_step", 0),
        )


@dataclass(frozen=True)
class Prediction:
    """Seconds of a decode step, and the bytes of memory that the fullest rank needs."""

    strategy: Name
    exchange_s: float
    compute_s: float
    background_s: float  # as much of it as computing does not hide
    memory_bytes: float

    @property
    def step_s(self) -> float:
        return self.exchange_s + self.compute_s + self.background_s


def predict(strategy: Name, load: Load, moved: Moved, machine: Machine) -> Prediction:
    """What a step takes under the strategy of which `moved` speaks."""
    compute_s = _compute_s(load, moved, machine)
    tokens = load.tokens_per_rank * moved.attending * load.layers
    gathers = machine.transport == "relayed" and moved.group_size > load.ranks_per_node
    if machine.transport == "collective" or gathers:  # room for a row of every sequence of the group
        tokens = load.tokens_per_rank * moved.group_size * load.layers
    background_s = _slower([tokens * copies * load.kv_bytes for copies in moved.kv], machine)
    held = load.batch if moved.all_reduces else load.tokens_per_rank * moved.group_size
    exchange_s = _all_reduces_s(load, moved, machine) + _exchanges_s(load, moved, machine)
    return Prediction(
        strategy,
        exchange_s,
        compute_s,
        max(0.0, background_s - machine.hides * compute_s),
        memory_bytes(load, held),
    )


def memory_bytes(load: Load, sequences: int) -> int:
    """Of a rank's weights, and of the keys and values of so many sequences."""
    weights = load.dense_bytes + load.moe_layers * load.slots_per_rank * load.expert_bytes
    return weights + sequences * load.context * load.layers * load.kv_bytes


def choose(predictions: list[Prediction], memory_bytes: float) -> tuple[Name, str]:
    """The name of the fastest of those that fit into memory, the first of equals, and why.

    Raises InputError, with the numbers, if none fits.
    """
    too_large = [each for each in predictions if each.memory_bytes > memory_bytes]
    fit = sorted((each for each in predictions if each not in too_large), key=lambda each: each.step_s)
    refused = "".join(
        f"; {each.strategy} does not fit: {_gigabytes(each.memory_bytes)} of weights and keys and values, "
        f"{_gigabytes(memory_bytes)} of memory"
        for each in too_large
    )
    if not fit:
        raise InputError(
            f"--strategy auto: none fits{refused}; use more ranks, fewer prompts or shorter ones"
        )
    best, *others = fit
    against = ", ".join(f"{_milliseconds(each.step_s)} for {each.strategy}" for each in others)
    return best.strategy, f"auto: {best.strategy}, {_milliseconds(best.step_s)} predicted" + (
        f" against {against}{refused}" if others else refused
    )


def _exchanges_s(load: Load, moved: Moved, machine: Machine) -> float:
    """All dispatches and returns of a step; each waits for the busiest rank, to send or to receive."""
    if not moved.exchanges:
        return 0.0
    row_bytes = load.hidden_bytes + 4 * (2 * load.top_k + 3)  # with slots, weights and where it belongs
    sent, returned = _rows_sent(load, moved, machine, row_bytes)
    uneven = max(_busiest(load, moved), _attending(load, moved, machine))
    if machine.shared or machine.transport in ("collective", "relayed"):
        uneven = 1.0  # of a collective all chunks are as large, however full
    moving = sum(
        _slower([rows * size * uneven for rows in part], machine)
        for part, size in ((sent, row_bytes), (returned, load.hidden_bytes + 8))
    )
    return moved.exchanges * _latency_s(load, machine) + load.moe_layers * moving


def _latency_s(load: Load, machine: Machine) -> float:
    """Of an exchange in which nothing moves; a rank that is alone has none."""
    if load.ranks == 1:
        return 0.0
    inside_s = machine.inside.latency_s + machine.inside.peer_s * (load.ranks_per_node - 1)
    if load.ranks == load.ranks_per_node:
        return inside_s
    if machine.transport == "relayed":
        relays = load.ranks // load.ranks_per_node - 1
        return inside_s + machine.between.latency_s + machine.between.peer_s * relays
    return machine.between.latency_s + machine.between.peer_s * (load.ranks - load.ranks_per_node)


def _rows_sent(load: Load, moved: Moved, machine: Machine, row_bytes: int) -> tuple[list[float], list[float]]:
    """Rows that a rank sends in a layer to dispatch and to return, inside its node and between nodes."""
    tokens = load.tokens_per_rank
    others = (load.ranks_per_node - 1, load.ranks - load.ranks_per_node)
    if machine.transport == "collective":  # room for all that a receiver may own
        full = [float(pairs * tokens * moved.group_size) for pairs in others]
        return full, full if moved.exchanges > load.moe_layers else [0.0, 0.0]
    if machine.transport == "relayed":
        return _rows_by_relays(load, moved)
    sent = [tokens * rows for rows in moved.dispatch]
    if machine.transport == "eager":
        spare = deviations(row_bytes, machine.round_bytes)
        sent = [
            pairs * _room(tokens, rows / max(pairs, 1), spare)
            for rows, pairs in zip(moved.dispatch, others, strict=True)
        ]
    return sent, [tokens * rows for rows in moved.give_back]


def _rows_by_relays(load: Load, moved: Moved) -> tuple[list[float], list[float]]:
    """Chunks with room for all that a rank may own: to its relay in each other node, and back to the relays
    of a token that came home, or to every rank that may own it. What crosses is passed on inside, at most
    once.
    """
    room = float(load.tokens_per_rank * moved.group_size)
    relays, others = load.ranks // load.ranks_per_node - 1, load.ranks - load.ranks_per_node
    sent = [load.tokens_per_rank * sum(moved.dispatch), relays * room]
    owners = relays if moved.group_size == 1 else others
    returned = [load.tokens_per_rank * sum(moved.give_back), owners * room]
    return sent, returned if moved.exchanges > load.moe_layers else [0.0, 0.0]


def _room(tokens: float, share: float, spare: float) -> float:
    """Rows that a chunk has room for, on average (see Expectation), where a token goes there by `share`."""
    share = min(share, 1.0)
    return min(tokens, tokens * share + spare * math.sqrt(tokens * share * (1 - share)))


def _all_reduces_s(load: Load, moved: Moved, machine: Machine) -> float:
    """A ring: every rank sends each part of the rows on, once to be summed and once to be known.

    In a captured step every rank tells all others, in one exchange, what its experts made of each token.
    """
    if not moved.all_reduces:
        return 0.0
    link = machine.inside if load.ranks == load.ranks_per_node else machine.between
    rows, exchanges = 2 * (load.ranks - 1) / load.ranks * load.batch, 2
    if machine.transport != "eager":
        one_sided = machine.transport == "one-sided"
        served = 1 - (1 - 1 / load.ranks) ** load.top_k if one_sided else 1.0
        rows, exchanges = (load.ranks - 1) * load.batch * served, 1
    moving = rows * load.hidden_bytes / link.bytes_per_s
    return moved.all_reduces * (exchanges * _latency_s(load, machine) + moving)


def _busiest(load: Load, moved: Moved) -> float:
    """The most choices that a rank serves in a batch, over the mean."""
    return _of_a_batch(moved.busiest, load.places * load.top_k, load.ranks)


def _attending(load: Load, moved: Moved, machine: Machine) -> float:
    """The most tokens that a rank owns in a batch, over the mean; 1 where that does not matter."""
    if machine.shared or moved.group_size == 1:
        return 1.0
    return _of_a_batch(moved.attending, load.places, load.ranks)


def _of_a_batch(imbalance: float, tokens: int, ranks: int) -> float:
    """What `imbalance` of many tokens is in a batch of some.

    By chance alone the busiest rank has about 0.7 sqrt(2 ln ranks) deviations more than the mean: 0.82, 1.17
    and 1.43 for 2, 4 and 8 ranks.
    """
    chance = 0.7 * math.sqrt(2 * math.log(ranks) * (ranks - 1) / tokens)
    return min(float(ranks), 1 + math.hypot(imbalance - 1, chance))


def _compute_s(load: Load, moved: Moved, machine: Machine) -> float:
    """Every rank reads its experts that someone chose, the other weights, and the contexts it attends to.

    Dense products take the longer of reading and multiplying; those of experts both, as was measured: many
    rows read the weights of an expert more than once.
    """
    read = load.experts_read
    if read is None:
        read = load.slots_per_rank * (1 - (1 - 1 / load.experts) ** (load.batch * load.top_k))
    experts = load.moe_layers * read * load.expert_bytes
    served = load.tokens_per_rank * load.top_k * _busiest(load, moved) * load.moe_layers
    served_s = 2 * served * load.expert_bytes / load.itemsize / machine.flops_per_s
    tokens = load.batch if moved.all_reduces else load.tokens_per_rank * _attending(load, moved, machine)
    seen = load.context if load.seen is None or machine.transport == "eager" else load.seen
    contexts = tokens * load.layers * seen * load.kv_bytes
    launched = load.layers * (machine.layer_s + tokens * machine.token_s)
    rows = tokens  # a captured step multiplies those of all sequences that a rank may own
    if machine.transport != "eager" and not moved.all_reduces:
        rows = load.tokens_per_rank * moved.group_size
    products_s = 2 * rows * load.dense_bytes / load.itemsize / machine.flops_per_s
    dense_s = max(load.dense_bytes / machine.read_bytes_per_s, products_s)
    return launched + dense_s + served_s + (experts + contexts) / machine.read_bytes_per_s


def _slower(sent: list[float], machine: Machine) -> float:
    """Seconds that bytes inside the node and bytes between nodes take, which move at the same time."""
    inside, between = sent
    return max(inside / machine.inside.bytes_per_s, between / machine.between.bytes_per_s)


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"

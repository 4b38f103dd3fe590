"""Predicts the time of a decode step's MoE layers under a plan: the slowest rank's, in drawn batches.

For a batch of B tokens a rank, per MoE layer:

    exchange  = latency + row bytes * max over ranks of max(rows in, rows out) / bandwidth, for the dispatch
                and for the combine; of several classes of link, the slowest counts
    experts   = max over ranks of (weights touched / memory bandwidth + operations / rate)
    attention = keys and values of the rank with most owned tokens / memory bandwidth, where owners may differ
                from homes

Between nodes of several GPUs a row crosses once for each node: the GPU with the sender's place in that node
passes it on, as engines that forward inside a node do. Where links of one class differ (`link_cost`), the
machine's bandwidth is that of the cheapest; rows of a dearer one take as many times longer. Experts pay for
bytes and for operations: many rows read an expert's weights more than once (measured: docs/decode.md).

Shapes: T tokens of the trace, N batches, M = B * G tokens of a batch, L MoE layers, K = top_k, G ranks.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from exflow.errors import InputError
from exflow.placement.compiled import compiled
from exflow.placement.plan.plan import Plan
from exflow.placement.time.serving import Serving
from exflow.placement.traffic.traffic import owners
from exflow.profiling.trace import RoutingTrace

IntArray = npt.NDArray[np.integer]
Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_MOST_BATCHES, _FEWEST_BATCHES = 32, 2
_WORK = 10_000_000  # choices followed in all batches: a second or less


@dataclass(frozen=True)
class StepTime:
    """Predicted MoE layers of a decode step: means over drawn batches, microseconds of all layers together.

    busiest_link_rows  rows in or out of the rank with most, dispatch plus combine, for each token of a rank,
                       in the mean layer
    compute_imbalance  (token, expert) pairs of the busiest rank over the mean rank, in the mean layer
    messages           hidden states sent, per token and layer
    experts_touched    experts with a token on the rank of most, in the mean layer
    node_link_rows     rows over the busiest link between nodes, dispatch plus combine, for each token of a
                       rank, in the mean layer; 0 on one node
    """

    step_us: float
    exchange_us: float
    experts_us: float
    attention_us: float
    busiest_link_rows: float
    compute_imbalance: float
    messages: float
    experts_touched: float
    node_link_rows: float = 0.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def step_time(plan: Plan, trace: RoutingTrace, serving: Serving, seed: int = 0) -> StepTime:
    """Predict the step by drawing batches of tokens from `trace`; plans with one seed get the same batches.

    Raises InputError if the trace is empty or of another model than the plan.
    """
    plan.check_trace(trace)
    if not trace.num_tokens:
        raise InputError("the trace has no tokens to judge the plan by; choose one that has")
    rows_NM = drawn_batches(trace, serving.batch * plan.num_ranks, seed)
    counted = count_batches(plan, trace, serving, rows_NM)
    machine, sizes = serving.machine.machine, serving.sizes
    inside, between = machine.inside, machine.between
    crossing = np.maximum(
        counted.near * (sizes.row_bytes / inside.bytes_per_s),
        counted.far * (sizes.row_bytes / between.bytes_per_s),
    )  # [N, L, 2]
    exchanges = 1 if trace.top_k == 1 and counted.stays else 2
    latency = _latency(plan, serving)
    exchange = crossing[..., :exchanges].sum(axis=2) + exchanges * latency
    experts = (
        counted.touched * (sizes.expert_bytes / machine.read_bytes_per_s)
        + counted.pairs * (sizes.operations / machine.flops_per_s)
    ).max(axis=2)
    kv_s = serving.context * sizes.kv_bytes / machine.read_bytes_per_s
    attention = counted.owned * (kv_s if counted.stays else 0.0)
    exchange_us, experts_us, attention_us = (
        1e6 * float(each.sum(axis=-1).mean()) for each in (exchange, experts, attention)
    )
    mean_pairs = rows_NM.shape[1] * trace.top_k / plan.num_ranks
    return StepTime(
        step_us=exchange_us + experts_us + attention_us,
        exchange_us=exchange_us,
        experts_us=experts_us,
        attention_us=attention_us,
        busiest_link_rows=float(counted.busiest.sum(axis=2).mean()) / serving.batch,
        compute_imbalance=float(counted.pairs.max(axis=2).mean()) / mean_pairs,
        messages=float(counted.messages.mean()) / rows_NM.shape[1],
        experts_touched=float(counted.touched.max(axis=2).mean()),
        node_link_rows=float(counted.far.sum(axis=2).mean()) / serving.batch,
    )


def least_step_us(plan: Plan, trace: RoutingTrace, serving: Serving, seed: int = 0) -> float:
    """A time that no plan with as many slots is below, in the batches that `step_time` draws with this seed.

    Rows: a token's experts fill at least top_k / slots ranks, and its home is one of them at best; some rank
    receives the mean. Without replicas, some rank receives every token of the hottest expert that is at home
    elsewhere. Experts: some rank has the mean, and some the hottest. Where tokens may stay, rows may be none.
    """
    ranks, machine, sizes = plan.num_ranks, serving.machine.machine, serving.sizes
    bytes_per_s = 0.0  # of all links of a rank together
    if plan.topology.gpus_per_node > 1:
        bytes_per_s += machine.inside.bytes_per_s
    if plan.topology.num_nodes > 1:
        bytes_per_s += machine.between.bytes_per_s
    stays = serving.strategy.group_size(ranks, plan.topology.gpus_per_node) > 1
    exchanges = 1 if trace.top_k == 1 and stays else 2
    weights_s, pair_s = sizes.expert_bytes / machine.read_bytes_per_s, sizes.operations / machine.flops_per_s
    has_replicas = plan.num_slots > plan.num_experts
    rows_NM, experts, total = (
        drawn_batches(trace, serving.batch * ranks, seed),
        np.asarray(trace.experts),
        0.0,
    )
    home_M = np.arange(rows_NM.shape[1]) % ranks
    hosts = -(-trace.top_k // plan.slots_per_rank)
    for rows_M in rows_NM:
        for layer in range(plan.num_layers):
            chosen_MK = experts[rows_M, layer]
            by_home = np.zeros((ranks, plan.num_experts), dtype=np.int64)
            np.add.at(by_home, (home_M[:, None], chosen_MK), 1)
            load = by_home.sum(axis=0)
            rows = serving.batch * (hosts - 1)
            experts_s = (np.count_nonzero(load) * weights_s + load.sum() * pair_s) / ranks
            if not has_replicas:
                rows = max(rows, int((load - by_home.max(axis=0)).max()))
                experts_s = max(experts_s, weights_s + int(load.max()) * pair_s)
            moving_s = 0.0 if stays or ranks == 1 else rows * sizes.row_bytes / bytes_per_s
            total += exchanges * (_latency(plan, serving) + moving_s) + experts_s
    return 1e6 * float(total) / len(rows_NM)


def drawn_batches(trace: RoutingTrace, tokens: int, seed: int) -> Counts:
    """[N, M] rows of the trace: batches of `tokens` tokens, drawn with replacement."""
    followed = tokens * trace.num_layers * trace.top_k
    batches = min(_MOST_BATCHES, max(_FEWEST_BATCHES, _WORK // followed))
    return np.random.default_rng(seed).integers(0, trace.num_tokens, (batches, tokens))


def _latency(plan: Plan, serving: Serving) -> float:
    """Seconds of an empty exchange."""
    machine, ranks, per_node = serving.machine.machine, plan.num_ranks, plan.topology.gpus_per_node
    if ranks == 1:
        return 0.0
    link, peers = (machine.inside, ranks - 1) if ranks == per_node else (machine.between, ranks - per_node)
    return link.latency_s + link.peer_s * peers


@dataclass(frozen=True, eq=False)
class CountedBatches:
    """Counts of each batch and layer; `stays`: whether a token may stay where its experts are."""

    near: Floats  # [N, L, 2] rows of the rank with most inside its node, in dispatch and combine
    far: Floats  # [N, L, 2] between nodes; a row of a slower link counts as many as it is slower
    busiest: Counts  # [N, L, 2] rows over all links
    pairs: Counts  # [N, L, G] (token, expert) pairs
    touched: Counts  # [N, L, G] experts with at least one token
    owned: Counts  # [N, L] tokens of the rank that owns most
    messages: Counts  # [N, L]
    stays: bool


def count_batches(plan: Plan, trace: RoutingTrace, serving: Serving, rows_NM: Counts) -> CountedBatches:
    """Count the batches of the rows [N, M] of the trace."""
    ranks, per_node = plan.num_ranks, plan.topology.gpus_per_node
    group = serving.strategy.group_size(ranks, per_node)
    owner = owners(trace, plan, group) if group > 1 else np.zeros((1, 1), dtype=np.int16)
    shape = (len(rows_NM), plan.num_layers)
    near, far = (np.zeros((*shape, 2)) for _ in range(2))
    busiest = np.zeros((*shape, 2), dtype=np.int64)
    pairs, touched = (np.zeros((*shape, ranks), dtype=np.int64) for _ in range(2))
    owned, messages = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    _count_batches(
        np.asarray(trace.experts),
        rows_NM,
        owner,
        plan.serving_slots(serving.rule),
        plan.slots_per_rank,
        per_node,
        plan.topology.slowness,
        (near, far, busiest, pairs, touched, owned, messages),
    )
    return CountedBatches(near, far, busiest, pairs, touched, owned, messages, group > 1)


@compiled
def _count_batches(
    experts: IntArray,  # [T, L, K]
    rows: Counts,  # [N, M]
    owner: IntArray,  # [T, L + 1], or [1, 1]: token i of a batch belongs to rank i modulo G
    serving: IntArray,  # [W, G, L, E] slots
    per_rank: int,
    per_node: int,
    slowness: Floats,  # [G, G]
    counted: tuple[Floats, Floats, Counts, Counts, Counts, Counts, Counts],
) -> None:
    near, far, busiest, pairs, touched, owned, messages = counted
    _, num_layers, top_k = experts.shape
    turns, ranks, stays = serving.shape[0], serving.shape[1], len(owner) > 1
    hosts = np.empty(top_k, dtype=np.int64)
    seen = np.zeros(ranks * per_rank, dtype=np.int64)
    flow = np.zeros((2, 2, 2, ranks))  # phase; near or far; in or out
    crossed = np.zeros((2, 2, ranks), dtype=np.int64)  # the rows of both
    held = np.zeros(ranks, dtype=np.int64)
    for batch in range(len(rows)):
        for layer in range(num_layers):
            flow[:], crossed[:], held[:] = 0, 0, 0
            stamp = batch * num_layers + layer + 1
            for i in range(rows.shape[1]):
                token = rows[batch, i]
                before = after = i % ranks
                if stays:
                    before, after = owner[token, layer], owner[token, layer + 1]
                held[before] += 1
                count = 0
                for choice in range(top_k):
                    turn = (i // ranks * top_k + choice) % turns
                    slot = serving[turn, before, layer, experts[token, layer, choice]]
                    rank = slot // per_rank
                    pairs[batch, layer, rank] += 1
                    if seen[slot] != stamp:
                        seen[slot] = stamp
                        touched[batch, layer, rank] += 1
                    if rank not in hosts[:count]:
                        hosts[count] = rank
                        count += 1
                for phase, end in enumerate((before, after)):
                    messages[batch, layer] += _send(
                        end, hosts[:count], per_node, slowness, flow[phase], crossed[phase]
                    )
            owned[batch, layer] = held.max()
            for phase in range(2):
                near[batch, layer, phase] = flow[phase, 0].max()
                far[batch, layer, phase] = flow[phase, 1].max()
                busiest[batch, layer, phase] = crossed[phase].max()


@compiled
def _send(owner: int, hosts: IntArray, per_node: int, slowness: Floats, flow: Floats, crossed: Counts) -> int:
    """Count the rows from `owner` to the hosts; a combine has the same rows the other way. Returns
    messages."""
    sent = 0
    for i in range(len(hosts)):
        host = hosts[i]
        node = host // per_node
        if host == owner:
            continue
        sent += 1
        if node == owner // per_node:
            _cross(owner, host, slowness, flow[0], crossed)
            continue
        relay = node * per_node + owner % per_node
        first = True
        for other in hosts[:i]:
            if other // per_node == node:
                first = False
        if first:
            _cross(owner, relay, slowness, flow[1], crossed)
        if host != relay:
            _cross(relay, host, slowness, flow[0], crossed)
    return sent


@compiled
def _cross(source: int, target: int, slowness: Floats, flow: Floats, crossed: Counts) -> None:
    flow[0, target] += slowness[source, target]
    flow[1, source] += slowness[source, target]
    crossed[0, target] += 1
    crossed[1, source] += 1

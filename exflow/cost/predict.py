"""Predicts the time of a decode step under each strategy, by formula.

    step_s       = exchange_s + compute_s + background_s

    exchange_s   = exchanges x latency_s
                 + moe_layers x wait x (seconds(dispatch_rows x bytes) + seconds(combine_rows x bytes))
                 + all_reduces x (their exchanges x latency_s + rows x hidden_bytes / bytes_per_s)

    compute_s    = layers x (layer_s + owned_tokens x token_s)
                 + max(dense_bytes / read_bytes_per_s, dense_rows x dense FLOPs / flops_per_s)
                 + served_rows x expert FLOPs / flops_per_s
                 + (expert bytes read + keys and values read) / read_bytes_per_s

    background_s = max(0, seconds(kv_rows x kv_bytes) - hides x compute_s)

seconds(bytes) is the time of the slower link, inside or between nodes. The transport determines the rows that
move and the wait of an exchange (transports.py). Messages are placement's counts, means per token and layer.
The busiest rank is that of drawn batches where a trace or the plan's figures of time are at hand.
"""

from dataclasses import dataclass

from exflow.cost.transports import COSTS, Pair, StepCost
from exflow.cost.workload import StepTraffic, Workload
from exflow.errors import InputError
from exflow.placement.plan.strategy import Strategy
from exflow.placement.time.machine import Machine


@dataclass(frozen=True)
class Prediction:
    """The time of a decode step under a strategy, and the memory that the fullest rank needs.

    exchange_s: synchronous exchanges. compute_s: reading, products and launches. background_s: time of
    sharing keys and values that compute does not hide. memory_bytes: weights, keys and values.
    """

    strategy: Strategy
    exchange_s: float
    compute_s: float
    background_s: float
    memory_bytes: float

    @property
    def step_s(self) -> float:
        return self.exchange_s + self.compute_s + self.background_s


def predict(strategy: Strategy, workload: Workload, traffic: StepTraffic, machine: Machine) -> Prediction:
    """Predict a step under `strategy`, which moves `traffic`."""
    step = COSTS[machine.transport](workload, traffic, machine)
    compute_s = _compute_s(step)
    kv_s = _seconds(step.kv_rows(), workload.kv_bytes, machine)
    return Prediction(
        strategy,
        exchange_s=_all_reduces_s(step) + _exchanges_s(step),
        compute_s=compute_s,
        background_s=max(0.0, kv_s - machine.hides * compute_s),
        memory_bytes=memory_bytes(workload, workload.batch if traffic.all_reduces else step.group_tokens),
    )


def memory_bytes(workload: Workload, sequences: int) -> int:
    """Memory for a rank's weights, and for the keys and values of `sequences` sequences."""
    weights = workload.dense_bytes + workload.moe_layers * workload.slots_per_rank * workload.expert_bytes
    return weights + sequences * workload.context * workload.layers * workload.kv_bytes


def _exchanges_s(step: StepCost) -> float:
    """Seconds of all dispatches and combines of a step."""
    work, exchanges = step.workload, step.traffic.exchanges
    if not exchanges:
        return 0.0
    dispatch_bytes, combine_bytes = step.row_bytes
    wait = step.wait()
    dispatch_s = _seconds(step.dispatch_rows(), dispatch_bytes, step.machine, wait)
    combine_s = _seconds(step.combine_rows(), combine_bytes, step.machine, wait)
    return exchanges * step.latency_s() + work.moe_layers * (dispatch_s + combine_s)


def _all_reduces_s(step: StepCost) -> float:
    """Seconds of all all-reduces of a step, over the links between nodes if there are several nodes."""
    work, machine = step.workload, step.machine
    if not step.traffic.all_reduces:
        return 0.0
    exchanges, rows = step.all_reduce()
    link = machine.between if work.other_nodes else machine.inside
    moving_s = rows * work.hidden_bytes / link.bytes_per_s
    return step.traffic.all_reduces * (exchanges * step.latency_s() + moving_s)


def _compute_s(step: StepCost) -> float:
    """Seconds of the busiest rank for reading weights and contexts, products, and launches.

    Dense products take the longer of reading and multiplying. Products of experts take the sum of both, as
    measured: with many rows the weights of an expert are read more than once.
    """
    work, machine, tokens = step.workload, step.machine, step.owned_tokens
    expert_bytes = work.moe_layers * step.experts_read() * work.expert_bytes
    served_rows = work.tokens_per_rank * work.top_k * step.expert_imbalance * work.moe_layers
    expert_s = 2 * served_rows * work.expert_bytes / work.itemsize / machine.flops_per_s
    context_bytes = tokens * work.layers * step.positions_read() * work.kv_bytes
    launch_s = work.layers * (machine.layer_s + tokens * machine.token_s)
    products_s = 2 * step.dense_rows() * work.dense_bytes / work.itemsize / machine.flops_per_s
    dense_s = max(work.dense_bytes / machine.read_bytes_per_s, products_s)
    return launch_s + dense_s + expert_s + (expert_bytes + context_bytes) / machine.read_bytes_per_s


def _seconds(rows: Pair, row_bytes: float, machine: Machine, wait: float = 1.0) -> float:
    """Seconds to move rows inside the node and between nodes, both at the same time."""
    inside, between = (each * row_bytes * wait for each in rows)
    return max(inside / machine.inside.bytes_per_s, between / machine.between.bytes_per_s)


def choose(predictions: list[Prediction], memory_bytes: float) -> tuple[Strategy, str]:
    """The fastest strategy that fits into memory, the first of equals, and the reason.

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
        raise InputError(f"strategy auto: none fits{refused}; use more ranks, fewer prompts or shorter ones")
    best, *others = fit
    against = ", ".join(f"{_milliseconds(each.step_s)} for {each.strategy}" for each in others)
    return best.strategy, f"auto: {best.strategy}, {_milliseconds(best.step_s)} predicted" + (
        f" against {against}{refused}" if others else refused
    )


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3g} GB"

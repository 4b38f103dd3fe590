"""Captured steps of a case: their time, bytes and kernels, and the time of an exchange alone."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.decode.case import PLACEMENTS, Case
from exflow.bench.job import WARM_UP
from exflow.bench.timing import begin_synthetic_batch, decode_synthetic_batch, step_bytes, time_steps
from exflow.comm.transport_names import Transport
from exflow.job.cluster import Cluster
from exflow.placement.plan.topology import Topology
from exflow.runtime.decode_step import DecodeStep
from exflow.runtime.deploy import default_plan
from exflow.runtime.expert_parallel import PlanTables
from exflow.runtime.graph_runner import Capture, CapturedDecode

TRANSPORTS: tuple[Transport, ...] = ("collective", "one-sided")
STEPS = 24


def captured_rows(
    case: Case,
    cluster: Cluster,
    strategy: str,
    transport: Transport,
    batch: int,
    context: int,
    hardware: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """The figures of one way to run the step, for each placement."""
    group = 1 if strategy == "dispatch-combine" else cluster.num_ranks
    capture = Capture(
        case.decoder, case.tables["contiguous"], cluster, group, strategy == "replicated", transport
    )
    captured = decode_synthetic_batch(capture, batch, context, len(PLACEMENTS) * (STEPS + WARM_UP + 1))
    for placement in PLACEMENTS:
        captured.use_tables(case.tables[placement])
        begin_synthetic_batch(captured, batch, context)
        times = time_steps(captured, STEPS)
        moved = step_bytes(captured, STEPS + WARM_UP)
        floor = moved.floor_us(hardware["copy_gb_s"], hardware["link_gb_s"])
        yield {
            "strategy": strategy,
            "transport": transport,
            "placement": placement,
            **asdict(times),
            "tokens_per_s": batch / times.median_us * 1e6,
            **asdict(moved),
            "floor_us": floor,
            "times_floor": times.median_us / floor,
            "kernels_us": kernel_times(captured),
            "capture_s": captured.capture_s,
        }


def kernel_times(captured: CapturedDecode) -> dict[str, float]:
    """Microseconds that a step spends in each kernel on this rank, by the profiler: from the end of the
    kernel before to its own end, so that they add up to the step. `receive_kernel` and `combine_kernel`
    contain waiting."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        captured.advance()
        torch.cuda.synchronize()
    ran = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spent: dict[str, float] = {}
    reached = min(event.time_range.start for event in ran)
    for event in sorted(ran, key=lambda event: event.time_range.end):
        name = event.name[:48]
        spent[name] = spent.get(name, 0.0) + event.time_range.end - reached
        reached = event.time_range.end
    return dict(sorted(spent.items(), key=lambda item: -item[1])[:12])


class ExchangeOnly(DecodeStep):
    """A decode step of gates and exchanges, layer after layer, without attention and experts."""

    def run(self) -> Iterator[None]:
        for block in self.decoder.blocks:
            yield from self._dispatch(block.mlp)
        self.state.progress.step.add_(1)


def exchange_us(case: Case, cluster: Cluster, batch: int, context: int) -> dict[str, float]:
    """Microseconds of an exchange in a layer: steps of gate, exchange and receipt, less steps without
    exchange.

    The latter are gate and receipt of a rank's sequences, by a rank that is alone.
    """
    layers = len(case.config.moe_layer_ids)
    alone = Cluster(0, 1, 1, cluster.device)
    one = PlanTables.of(default_plan(case.config, Topology(gpus_per_node=1)), cluster.device)
    lonely = Capture(case.decoder, one, alone, 1, False, "one-sided")
    captured = decode_synthetic_batch(
        lonely, batch // cluster.num_ranks, context, STEPS + WARM_UP, ExchangeOnly
    )
    figures = {"none": time_steps(captured, STEPS).median_us / layers}
    for transport in TRANSPORTS:
        capture = Capture(
            case.decoder, case.tables["contiguous"], cluster, cluster.num_ranks, False, transport
        )
        captured = decode_synthetic_batch(capture, batch, context, STEPS + WARM_UP, ExchangeOnly)
        figures[transport] = time_steps(captured, STEPS).median_us / layers - figures["none"]
    return figures

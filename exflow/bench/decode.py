"""The `exflow bench decode` command: times decode steps of strategies, transports and placements in one job.

All cases have equal weights and routing. Each is a batch in the middle of its decode: the cache has `context`
positions of noise, and no prompts run.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from exflow.bench.job import ONE_PROCESS, WARM_UP, ResolvedBench
from exflow.bench.table import Case, Outcome, Report, Result, about, cases_of, predicted, taken_by_auto
from exflow.comm.collectives import Counters, Exchange
from exflow.comm.pairwise import PairwiseExchange
from exflow.comm.transport import alone, choose_transport
from exflow.comm.transport_names import Transport
from exflow.console import Work, note
from exflow.cost.predict import memory_bytes
from exflow.cost.probe import free_bytes, measure
from exflow.cost.workload import Workload
from exflow.errors import InputError
from exflow.job.cluster import Cluster, all_gather_object, raise_on_all_ranks
from exflow.model.decoder import Decoder, Rows
from exflow.model.replay import ReplayedRouting, load_replay
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.time.machine import Machine
from exflow.profiling.trace import DECODE
from exflow.runtime.decoding import Choices, EagerDecoding
from exflow.runtime.deploy import decoder_of, experts_of
from exflow.runtime.expert_parallel import PlanTables
from exflow.runtime.graph_counters import counters_of
from exflow.runtime.request import Request
from exflow.runtime.strategies import RankStrategy, make_strategy, single_process

Item = TypeVar("Item")


@torch.inference_mode()
def bench_decode(setting: ResolvedBench, cluster: Cluster | None) -> dict[str, Any] | None:
    """Run every case, in this process or as a rank of `cluster`. Returns the result; None on ranks but 0."""
    cluster = cluster or alone(torch.device(setting.device_type))
    first = cluster.rank == 0
    for line in setting.notes if first else []:
        note(line)
    setting = replace(setting, transports=working_transports(setting, cluster))
    with Work("measuring memory and links", shown=first):
        free = min(all_gather_object(cluster, free_bytes(cluster)))
        measured = setting.transports if setting.topology is not None else []
        machines = {transport: measure(cluster, transport) for transport in measured}
        report = Report(about(setting, cluster, machines), cases_of(setting), setting.output)
        if first:  # loads compiled code, which only rank 0 needs
            report.predicted = predicted(setting, machines)
            report.taken_by_auto = taken_by_auto(report.predicted, machines)
    with Work("timing", "cases", shown=first) as work:
        bench = Bench(setting, cluster, PairwiseExchange.between(cluster), free, machines, work.tell)
        for case, result in results(bench):
            if first:
                report.add(case, result)
            work.advance(len(report.results), len(report.cases))
    return report.document() if first else None


def working_transports(setting: ResolvedBench, cluster: Cluster) -> list[Transport]:
    """The transports asked for, or all that work here; on one GPU only one, since they are alike. Collective.

    Raises InputError if a transport asked for does not work.
    """
    if setting.transports:
        return [choose_transport(transport, cluster) for transport in setting.transports]
    if setting.topology is None or cluster.device.type != "cuda":
        return [choose_transport("auto", cluster)]
    working: list[Transport] = []
    for transport in ("collective", "one-sided" if cluster.num_nodes == 1 else "relayed"):
        try:
            working.append(choose_transport(transport, cluster))
        except InputError as error:  # raised on all ranks
            if cluster.rank == 0:
                note(f"left out: {error}")
    return list(dict.fromkeys(working)) or ["eager"]  # a single rank writes to itself, whatever was asked


@dataclass(frozen=True)
class Bench:
    """Data shared by all cases.

    free: bytes of memory that every rank has before weights are loaded. tell: receives progress messages.
    """

    setting: ResolvedBench
    cluster: Cluster
    pairwise: PairwiseExchange | None
    free: float
    machines: dict[Transport, Machine]
    tell: Callable[[str], object] = lambda what: None


def results(bench: Bench) -> Iterator[tuple[Case, Result]]:
    """Yield the result of every case, grouped by weights: one set of weights is in memory at a time.
    Collective."""
    for together in sharing_weights(bench.setting):
        cases = []
        for case in cases_of(bench.setting):
            if case.placement in together:
                too_large = does_not_fit(bench, case)
                if too_large:
                    yield case, too_large
                else:
                    cases.append(case)
        if cases:
            yield from results_on_same_weights(bench, cases)


def sharing_weights(setting: ResolvedBench) -> list[list[str]]:
    """Group the placements that can be timed with the same weights in the ranks' slots.

    With a replayed trace, routing does not depend on the experts' weights, and neither does the time of a
    step. So placements with the same number of slots share weights. Without a trace, the experts of a layer
    influence the gates of the next one, so each placement needs its own weights.
    """
    if setting.replay is None:
        return [[name] for name in setting.plans]
    by_slots: dict[int, list[str]] = {}
    for name, plan in setting.plans.items():
        by_slots.setdefault(plan.slots_per_rank, []).append(name)
    return list(by_slots.values())


def results_on_same_weights(bench: Bench, cases: list[Case]) -> Iterator[tuple[Case, Result]]:
    """Load the weights of the first case's placement, and time all cases with them. Collective."""
    setting, cluster = bench.setting, bench.cluster
    bench.tell(f"loading the weights ({cases[0].placement})")
    held = experts_of(setting.plans[cases[0].placement], cluster.rank)
    decoder = allocated(cluster, lambda: decoder_of(setting.weights, cluster.device, setting.dtype, held))
    if isinstance(decoder, str):
        yield from ((case, decoder) for case in cases)
        return
    if setting.replay is not None:
        trace = load_replay(setting.replay, setting.config)
        decoder.replay = ReplayedRouting.of(trace, setting.config, cluster.device)
    for (_, _, transport), group in groupby(cases, lambda case: (case.batch, case.strategy, case.transport)):
        together = list(group)
        if transport != "eager":
            yield from captured_results(bench, decoder, together)
            continue
        for case in together:
            bench.tell(str(case))
            yield case, eager_result(bench, decoder, case)


def mid_decode(
    decoder: Decoder, strategy: RankStrategy, batch: int, context: int, steps: int
) -> EagerDecoding:
    """A decoding with noise in place of the keys and values of prompts. Each token is at its home."""
    request = Request([[0] * context] * batch, steps + 1)
    choices = Choices(request, first_sequence=0, device=decoder.embedding.weight.device)
    decoding = EagerDecoding(decoder, strategy, choices)
    strategy.prefill(decoding.cache, choices.sequence_N, choices.lengths)  # begins the request
    fill_with_noise(decoding.cache.values, decoding.cache.held, context)
    here = choices.sequence_N[strategy.admits(choices.sequence_N)]
    decoding.begin(here % decoder.config.vocab_size, Rows(here, torch.full_like(here, context), DECODE))
    return decoding


def fill_with_noise(cache: Tensor, sequences: Tensor, context: int) -> None:
    """Fill the first `context` positions of a cache [layers, 2, N, heads, positions, width] with noise.

    Row n belongs to sequences[n]. The noise depends only on the sequence, so that all ranks have equal values
    and gates choose the same experts under every strategy.
    """
    layers, sides, _, heads, _, width = cache.shape
    generator = torch.Generator(cache.device)
    for row, sequence in enumerate(sequences.tolist()):
        generator.manual_seed(sequence)
        size = (layers, sides, heads, context, width)
        cache[:, :, row, :, :context] = torch.randn(size, generator=generator, device=cache.device)


def eager_result(bench: Bench, decoder: Decoder, case: Case) -> Result:
    """Time a case with eager steps. Collective."""
    setting, cluster = bench.setting, bench.cluster
    strategy = single_process() if setting.topology is None else _strategy(bench, case)
    made = allocated(
        cluster, lambda: mid_decode(decoder, strategy, case.batch, setting.context, setting.counted)
    )
    if isinstance(made, str):
        return made
    for _ in range(WARM_UP):
        made.advance()
    ends = [time.perf_counter()]
    for _ in range(setting.steps):
        made.advance()
        ends.append(time.perf_counter())
    strategy.finish_sharing()
    taken = torch.tensor([after - before for before, after in pairwise(ends)], device=cluster.device)
    if cluster.num_ranks > 1:
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
    median_ms, p99_ms = np.percentile(1000 * taken.cpu().numpy(), (50, 99)).tolist()
    counters = Counters() if strategy.exchange is None else strategy.exchange.counters
    return Outcome(median_ms, p99_ms, *bytes_per_step(cluster, counters, setting.counted))


def _strategy(bench: Bench, case: Case) -> RankStrategy:
    config, cluster = bench.setting.config, bench.cluster
    return make_strategy(
        Strategy(case.strategy),
        Exchange(cluster, pairwise=bench.pairwise),
        PlanTables.of(bench.setting.plans[case.placement], cluster.device),
        config.moe_layer_ids,
        config.num_hidden_layers,
    )


def _group_size(strategy: str, topology: Topology | None) -> int:
    if topology is None:
        return 1
    return Strategy(strategy).group_size(topology.num_ranks, topology.gpus_per_node)


def captured_results(bench: Bench, decoder: Decoder, cases: list[Case]) -> Iterator[tuple[Case, Result]]:
    """Time cases that differ only in their placement with one captured step, whose tables are replaced.
    Collective."""
    from exflow.bench.timing import begin_synthetic_batch, decode_synthetic_batch, time_steps
    from exflow.runtime.graph_runner import Capture

    setting, cluster = bench.setting, bench.cluster
    batch, strategy, transport = cases[0].batch, cases[0].strategy, cases[0].transport
    size = _group_size(strategy, setting.topology)
    tables = [PlanTables.of(setting.plans[case.placement], cluster.device) for case in cases]
    capture = Capture(decoder, tables[0], cluster, size, strategy == Strategy.REPLICATED, transport)
    bench.tell(f"{cases[0]}: capturing")
    if cluster.device.type == "cuda":
        torch.cuda.empty_cache()  # a freed graph leaves its memory in a pool that no other graph uses
    captured = allocated(
        cluster, lambda: decode_synthetic_batch(capture, batch, setting.context, setting.counted)
    )
    if isinstance(captured, str):
        yield from ((case, captured) for case in cases)
        return
    fill_with_noise(captured.cache, captured.shape.sequence_of_rows(), setting.context)
    for case, table in zip(cases, tables, strict=True):
        bench.tell(str(case))
        captured.use_tables(table)
        begin_synthetic_batch(captured, batch, setting.context)
        times = time_steps(captured, setting.steps)
        sent = bytes_per_step(cluster, counters_of(captured, setting.counted), setting.counted)
        floor = floor_ms(bench, captured)
        yield case, Outcome(times.median_us / 1000, times.p99_us / 1000, *sent, floor)


def floor_ms(bench: Bench, captured: Any) -> float | None:
    """Milliseconds to read and send the latest step's bytes at the best measured bandwidths. Collective."""
    from exflow.bench.timing import step_bytes

    if not bench.machines or bench.cluster.num_nodes > 1:
        return None
    moved = step_bytes(captured, bench.setting.counted)
    read = max(machine.read_bytes_per_s for machine in bench.machines.values())
    link = max(machine.inside.bytes_per_s for machine in bench.machines.values())
    return moved.floor_us(read / 1e9, link / 1e9) / 1000


def bytes_per_step(cluster: Cluster, mine: Counters, steps: int) -> tuple[float, float, float]:
    """Critical, background and total bytes that a rank sends in a step, mean over ranks. Collective."""
    critical = mine.wire_bytes if mine.all_reduces else mine.hidden_bytes
    sent = torch.tensor(
        [critical, mine.kv_bytes, mine.wire_bytes], dtype=torch.float64, device=cluster.device
    )
    if cluster.num_ranks > 1:
        dist.all_reduce(sent)
    critical_mean, background, wire = (sent / (steps * cluster.num_ranks)).tolist()
    return critical_mean, background, wire


def does_not_fit(bench: Bench, case: Case) -> str:
    """The reason to skip a case, equal on all ranks; empty if it may fit into memory."""
    if (case.strategy, case.transport) == (Strategy.REPLICATED, "relayed"):
        return "replicated has nothing to relay"
    setting, positions, batch = bench.setting, bench.setting.positions, case.batch
    if case.transport != "eager":
        from exflow.runtime.graph_runner import POSITIONS, bucket

        positions, batch = -(-positions // POSITIONS) * POSITIONS, bucket(batch, bench.cluster.num_ranks)
    plan = setting.plans[case.placement]
    load = Workload.of(setting.config, plan, batch, positions, setting.dtype.itemsize)
    here = setting.topology or plan.topology
    everywhere = case.strategy in (ONE_PROCESS, Strategy.REPLICATED)
    held = batch if everywhere else load.tokens_per_rank * _group_size(case.strategy, here)
    needed = memory_bytes(load, held)
    if needed <= bench.free:
        return ""
    return (
        f"does not fit: {needed / 1e9:.3g} GB of weights and keys and values, {bench.free / 1e9:.3g} GB of "
        "memory a rank"
    )


def allocated(cluster: Cluster, make: Callable[[], Item]) -> Item | str:
    """The result of `make`, or a message if some rank ran out of memory. Collective.

    Raises an InputError of any rank on all ranks.
    """
    fault = ""

    def attempt() -> Item | None:
        nonlocal fault
        try:
            return make()
        except RuntimeError as error:
            # on CPUs torch has no class of its own for it
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            fault = f"does not fit: {str(error).splitlines()[0]}"
            return None

    made = attempt() if cluster.num_ranks == 1 else raise_on_all_ranks(cluster, attempt)
    faults = [each for each in all_gather_object(cluster, fault) if each]
    if made is not None and not faults:
        return made
    made = None
    if cluster.device.type == "cuda":
        torch.cuda.empty_cache()
    return faults[0]

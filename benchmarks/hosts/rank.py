"""Runs one rank of benchmarks/hosts/run.py: `rank.py FOLDER`, started by torchrun on each host.

Reads FOLDER/job.json (see job.py), config.json, the plans and the routing to replay. Rank 0 writes what
network and ranks can do to FOLDER/machine.json, then a line for each run to FOLDER/runs.jsonl.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from exflow.comm.collectives import Exchange
from exflow.comm.pairwise import PairwiseExchange
from exflow.cost.probe import link_of
from exflow.job.cluster import Cluster, join_cluster
from exflow.model.config import ModelConfig
from exflow.model.random_weights import RandomWeights, random_decoder
from exflow.model.replay import ReplayedRouting
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.time.machine import Machine
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.engine import Engine
from exflow.runtime.expert_parallel import PlanTables, Replicated
from exflow.runtime.request import Request
from exflow.runtime.strategies import AllTokens, OwnedTokens, RankStrategy

CPU = torch.device("cpu")


class NoWire(Exchange):
    """The exchange of a rank that is alone: all of its work but the collective."""

    def _swap(self, chunks: Tensor, sizes_to: list[int], sizes_from: list[int]) -> Tensor:
        return chunks


def engine_of(config: ModelConfig, plan: Plan, trace: RoutingTrace, rank: int) -> Engine:
    """This rank's decoder in an engine whose strategy is still to be given; the routing is replayed."""
    slots = slice(rank * plan.slots_per_rank, (rank + 1) * plan.slots_per_rank)
    here = plan.physical_to_logical_map[:, slots].tolist()
    decoder = random_decoder(RandomWeights(config), CPU, torch.float32, here)
    decoder.replay = ReplayedRouting.of(trace, config, CPU)
    return Engine(decoder, AllTokens(None, None))  # type: ignore[arg-type]


def strategy_of(name: str, exchange: Exchange, plan: Plan, config: ModelConfig) -> RankStrategy:
    """The strategy of this name: `replicated`, or coherence groups of that number of ranks."""
    tables = PlanTables.of(plan, CPU)
    if name == "replicated":
        return AllTokens(Replicated(exchange, tables), exchange)
    return OwnedTokens(exchange, tables, int(name), config.moe_layer_ids, config.num_hidden_layers)


def step_seconds(engine: Engine, batch: int, steps: int) -> tuple[float, dict[str, Any]]:
    """Seconds a decode step takes the slowest rank, and the job's counters of all of them."""
    engine.first_sequence = 0  # the same sequences, hence homes and routing, in every run
    if dist.get_world_size() > 1:
        dist.barrier()
    generation = engine.generate(Request([[1]] * batch, steps + 1))
    assert generation.steps == steps
    return generation.decode_s / steps, asdict(generation.decode)


def measure_here(
    exchange: Exchange, config: ModelConfig, trace: RoutingTrace, tokens: int, steps: int
) -> Machine:
    """The machine as the cost model wants it, while every rank works at once.

    Latency and bandwidth are those of the runtime's exchange, of one row and of many to each rank. What a
    layer and a token take is a fit to two batches of a rank that is alone and has as many experts as here.
    """
    cluster, row_bytes = exchange.cluster, 4 * config.hidden_size
    others = [rank for rank in range(cluster.num_ranks) if rank != cluster.rank]

    def exchange_seconds(rows: int) -> float:
        sent = torch.zeros(rows * len(others), row_bytes, dtype=torch.uint8)
        to = torch.tensor(others).repeat_interleave(rows)
        come = [rows if rank != cluster.rank else 0 for rank in range(cluster.num_ranks)]
        taken = []
        for _ in range(31):
            start = time.perf_counter()
            exchange.combine(sent, to, come, row_bytes)
            taken.append(time.perf_counter() - start)
        return slowest(sum(taken[1:]) / 30)

    few, many = 1, tokens  # about what a layer sends
    link = link_of(
        exchange_seconds(few),
        exchange_seconds(many),
        *(rows * len(others) * row_bytes for rows in (few, many)),
    )
    layer_s, token_s = compute_seconds(cluster, config, trace, tokens, steps)
    # what is read from memory is in the seconds of layers and tokens
    return Machine(link, link, math.inf, math.inf, layer_s, token_s, hides=0.0)


def compute_seconds(
    cluster: Cluster, config: ModelConfig, trace: RoutingTrace, tokens: int, steps: int
) -> tuple[float, float]:
    """Seconds of a layer, and of each token in it, on a rank that is alone."""
    local = config.model_copy(update={"num_experts": config.num_experts // cluster.num_ranks})
    routing = RoutingTrace.from_arrays(
        trace.experts % local.num_experts,
        num_experts=local.num_experts,
        sequence=trace.sequence,
        position=trace.position,
        model=trace.model,
    )
    plan = Plan(
        model=local.name,
        num_hidden_layers=local.num_hidden_layers,
        moe_layer_ids=local.moe_layer_ids,
        num_experts=local.num_experts,
        topology=Topology(gpus_per_node=1),
        physical_to_logical_map=torch.arange(local.num_experts).repeat(routing.num_layers, 1).numpy(),
        next_owner=None,
        method="alone",
    )
    alone = NoWire(Cluster(0, 1, 1, CPU))
    engine = engine_of(local, plan, routing, 0)
    engine.strategy = strategy_of("1", alone, plan, local)
    engine.all_gather_object = lambda mine: [mine]  # type: ignore[method-assign]
    few, many = max(1, tokens // 4), tokens
    engine.generate(Request([[1]] * few, 2))
    taken = [slowest(step_seconds(engine, batch, steps)[0]) for batch in (few, many)]
    token_s = max(0.0, (taken[1] - taken[0]) / (many - few)) / config.num_hidden_layers
    return taken[0] / config.num_hidden_layers - few * token_s, token_s


def slowest(seconds: float) -> float:
    """The longest time of any rank, on all ranks. Collective."""
    worst = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def keep_to_own_cores(rank: int, threads: int) -> None:
    """Pin this rank to `threads` cores of its own and one more.

    The additional core is for gloo's thread. Computing threads spin for a while when they are done, and would
    make it wait for the end of their time slices, 2 to 4 ms an exchange.
    """
    cores, needed = sorted(os.sched_getaffinity(0)), threads + 1
    os.sched_setaffinity(0, cores[rank * needed : (rank + 1) * needed])


def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    if job["own_cores"]:
        keep_to_own_cores(int(os.environ["RANK"]), job["threads"])
    config = ModelConfig.model_validate_json((folder / "config.json").read_text())
    trace = RoutingTrace.load(folder / "replayed")
    with join_cluster("cpu") as cluster, torch.inference_mode():
        pairwise = PairwiseExchange.between(cluster)
        tokens = job["batch"] // cluster.num_ranks
        exchange = Exchange(cluster, pairwise=pairwise)
        machine = measure_here(exchange, config, trace, tokens, job["steps"])
        machine = replace(machine, shared=not job["own_cores"])
        if cluster.rank == 0:
            (folder / "machine.json").write_text(json.dumps(asdict(machine)))
        plans = {name: Plan.load(folder / f"{name}.json") for name in job["placements"]}
        decoders = {
            name: engine_of(config, plan, trace, cluster.rank).decoder for name, plan in plans.items()
        }
        engines = {
            (name, placement): Engine(
                decoders[placement], strategy_of(name, Exchange(cluster, pairwise=pairwise), plan, config)
            )
            for name in job["strategies"]
            for placement, plan in plans.items()
            if name == "1" or plan.strategy != Strategy.DISPATCH_COMBINE  # such a plan is for groups of one
        }
        step_seconds(next(iter(engines.values())), job["batch"], 1)
        deadline = time.monotonic() + job["seconds"]
        for _ in range(job["repeats"]):
            for (name, placement), engine in engines.items():
                if slowest(float(time.monotonic() > deadline)):
                    return
                seconds, counters = step_seconds(engine, job["batch"], job["steps"])
                seconds = slowest(seconds)
                if cluster.rank == 0:
                    run = {"strategy": name, "placement": placement, "step_s": seconds, "counters": counters}
                    with (folder / "runs.jsonl").open("a") as file:
                        file.write(json.dumps(run) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

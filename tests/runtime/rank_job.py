"""One rank of a job that runs many cases: `torchrun ... rank_job.py FOLDER`, started by test_distributed.py.

Reads FOLDER/cases.json. Rank r writes FOLDER/rank-r.json (what it saw of each case) and rank-r.npz (its
logits); rank 0 writes the merged traces too. The collectives are counted here as torch sees them, and the
rows as they lie in the buffers, so that the program's own counters can be checked against something else.
"""

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Spy:
    """Stands in for torch's collectives, and for those in rounds between nodes.

    Those within a group of ranks, and those that are deferred, are the gathers.

    `log` has a list for each pass: prefill, then every step; `bytes_sent` a number.
    """

    log: list[list[str]] = field(default_factory=list)
    bytes_sent: list[int] = field(default_factory=list)
    chunks: list[dict[str, list[int]]] = field(default_factory=list)  # of each all-to-all, by receiver

    def begin_pass(self) -> None:
        self.log.append([])
        self.bytes_sent.append(0)

    def note(self, name: str, chunks: list[Tensor]) -> None:
        if not self.log:
            return
        sizes = [chunk.nbytes for chunk in chunks]
        self.log[-1].append(name)
        self.bytes_sent[-1] += sum(sizes)
        if name == "all_to_all":
            numbers = [first_number(chunk) for chunk in chunks]
            self.chunks.append({"bytes": sizes, "numbers": numbers, "late_bytes": [0] * len(sizes)})

    def all_to_all(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def watched(arrived: Tensor, sent: Tensor, sizes_from: Any, sizes_to: Any, **options: Any) -> Any:
            self.note("gather" if "group" in options else "all_to_all", list(sent.split(sizes_to)))
            return collective(arrived, sent, sizes_from, sizes_to, **options)

        return watched

    def in_rounds(self, collective: Callable[..., None], name: str) -> Callable[..., None]:
        def watched(rounds: Any, chunks: Any) -> None:
            self.note(name, chunks.to)
            collective(rounds, chunks)

        return watched

    def all_reduce(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        def watched(values: Tensor) -> Any:
            if self.log:
                self.log[-1].append("all_reduce")
            return collective(values)

        return watched

    def point_to_point(self, together: Callable[..., Any]) -> Callable[..., Any]:
        def watched(operations: list[dist.P2POp]) -> Any:
            for each in operations:
                if self.log and each.op is dist.isend:
                    self.bytes_sent[-1] += each.tensor.nbytes
                    self.chunks[-1]["late_bytes"][each.peer] += each.tensor.nbytes
            return together(operations)

        return watched


def first_number(chunk: Tensor) -> int:
    """The int32 that a dispatch's chunk begins with: how many rows it is about; 0 where there is no chunk."""
    return int(chunk[:4].clone().view(torch.int32)[0]) if len(chunk) else 0


spy = Spy()
dist.all_to_all_single = spy.all_to_all(dist.all_to_all_single)
dist.all_reduce = spy.all_reduce(dist.all_reduce)
dist.batch_isend_irecv = spy.point_to_point(dist.batch_isend_irecv)

from exflow.comm.pairwise import PairwiseExchange  # noqa: E402
from exflow.errors import InputError  # noqa: E402
from exflow.job.cluster import Cluster, join_cluster  # noqa: E402
from exflow.model.checkpoint import Checkpoint  # noqa: E402
from exflow.model.decoder import MoE, Rows  # noqa: E402
from exflow.model.replay import ReplayedRouting  # noqa: E402
from exflow.model.sampling import Sampling  # noqa: E402
from exflow.placement.plan.plan import Plan  # noqa: E402
from exflow.placement.plan.strategy import Strategy  # noqa: E402
from exflow.profiling.trace import RoutingTrace  # noqa: E402
from exflow.runtime.deploy import Deployment, deploy  # noqa: E402
from exflow.runtime.engine import Engine  # noqa: E402
from exflow.runtime.kv_cache import KVCache  # noqa: E402
from exflow.runtime.request import Request  # noqa: E402
from exflow.runtime.trace_recorder import JobRecorder  # noqa: E402

PairwiseExchange.swap = spy.in_rounds(PairwiseExchange.swap, "all_to_all")  # type: ignore[method-assign]
PairwiseExchange.defer = spy.in_rounds(PairwiseExchange.defer, "gather")  # type: ignore[method-assign]


def run_case(case: dict[str, Any], cluster: Cluster, folder: Path) -> tuple[dict[str, Any], Any]:
    """Run a case; return what this rank saw, and its logits: [n, 2] places and [n, V] values."""
    models = case["models"]  # one for each rank, or one for all
    try:
        engine = deploy(
            Deployment(
                Checkpoint.open(Path(models[cluster.rank % len(models)])),
                Strategy(case["strategy"]),
                Plan.load(case["plan"]),
            ),
            replace(cluster, ranks_per_node=case["ranks_per_node"]),
        )
    except InputError as error:
        return {"fault": str(error)}, None
    if case["replay"] is not None:
        trace = RoutingTrace.load(case["replay"])
        engine.decoder.replay = ReplayedRouting.of(trace, engine.decoder.config, cluster.device)
    for request in case["requests"][:-1]:
        engine.generate(request_of(request))
    recorder, computed, caches = JobRecorder(engine), computed_choices(engine), live_caches()
    places, logits = [], []
    spy.log, spy.bytes_sent, spy.chunks = [], [], []
    spy.begin_pass()

    def observe(rows: Rows, logits_TV: Tensor) -> None:
        places.append(torch.stack([rows.sequence_T, rows.position_T], dim=1))
        logits.append(logits_TV)
        spy.begin_pass()

    generation = engine.generate(request_of(case["requests"][-1]), observe)
    log, spy.log = spy.log, []
    trace = recorder.trace()
    if cluster.rank == 0:
        trace.save(folder / f"{case['name']}.trace")
    seen = {
        "generation": asdict(generation),
        "collectives": log,
        "bytes_sent": spy.bytes_sent,
        "chunks": spy.chunks,
        "experts_held": experts_held(engine),
        "computed": computed,
        "more_caches": live_caches() - caches,
    }
    return seen, (torch.cat(places).numpy(), torch.cat(logits).numpy())


def request_of(stored: dict[str, Any]) -> Request:
    return Request(**(stored | {"sampling": Sampling(**stored["sampling"])}))


def experts_held(engine: Engine) -> list[int]:
    return [len(module.experts.w_in) for module in engine.decoder.modules() if isinstance(module, MoE)]


def live_caches() -> int:
    """Caches of keys and values that something still holds; nothing is collected, so cycles count."""
    return sum(isinstance(each, KVCache) for each in gc.get_objects())


def computed_choices(engine: Engine) -> list[int]:
    """Count, from now on, the choices that this rank's experts compute in each MoE layer."""
    layers = [module for module in engine.decoder.modules() if isinstance(module, MoE)]
    counted = [0] * len(layers)

    def watch(layer: MoE) -> None:
        def count(_: Any, inputs: tuple[Tensor, ...]) -> None:
            counted[layer.index] += int((inputs[1] >= 0).sum())

        layer.experts.register_forward_pre_hook(count)

    for layer in layers:
        watch(layer)
    return counted


def main(folder: Path) -> None:
    gc.disable()
    torch.set_num_threads(1)
    with join_cluster("cpu") as cluster:
        seen, arrays = {}, {}
        for case in json.loads((folder / "cases.json").read_text()):
            seen[case["name"]], logits = run_case(case, cluster, folder)
            if logits is not None:
                arrays[f"{case['name']}/places"], arrays[f"{case['name']}/logits"] = logits
        (folder / f"rank-{cluster.rank}.json").write_text(json.dumps(seen))
        np.savez(folder / f"rank-{cluster.rank}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

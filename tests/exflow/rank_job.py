"""One rank of a job that runs many cases: `torchrun ... rank_job.py FOLDER`, started by test_distributed.py.

Reads FOLDER/cases.json. Rank r writes FOLDER/rank-r.json (what it saw of each case) and rank-r.npz (its
logits); rank 0 writes the merged traces too. The collectives are counted here as torch sees them, and the
rows as they lie in the buffers, so that the program's own counters can be checked against something else.
"""

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

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


@dataclass
class Spy:
    """Stands in for torch's collectives. `log` has a list for each pass: prefill, then every step."""

    log: list[list[str]] = field(default_factory=list)
    rows_sent: list[list[int]] = field(default_factory=list)  # of each all-to-all: rows to each rank

    def watch(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            if self.log:
                self.log[-1].append(name)
                if name == "all_to_all":
                    self.rows_sent.append(first_numbers(args[1]))
            return collective(*args, **options)

        return watched


def first_numbers(chunks: Tensor) -> list[int]:
    """The int32 that each chunk to another rank begins with: how many rows follow."""
    numbers: list[int] = chunks[:, :4].contiguous().view(torch.int32)[:, 0].tolist()
    return numbers


spy = Spy()
dist.all_to_all_single = spy.watch("all_to_all", dist.all_to_all_single)
dist.all_reduce = spy.watch("all_reduce", dist.all_reduce)
setattr(dist, GATHER, spy.watch("gather", getattr(dist, GATHER)))

# only now, since the gather is looked up when the module is loaded
from exflow.decoder import MoE, Rows  # noqa: E402
from exflow.deploy import Deployment, deploy  # noqa: E402
from exflow.distributed import Cluster, join_cluster  # noqa: E402
from exflow.engine import Engine, Request  # noqa: E402
from exflow.errors import InputError  # noqa: E402
from exflow.job_trace import JobRecorder  # noqa: E402
from exflow.placement.plan import Plan  # noqa: E402
from exflow.sampling import Sampling  # noqa: E402


def run_case(case: dict[str, Any], cluster: Cluster, folder: Path) -> tuple[dict[str, Any], Any]:
    """What this rank saw of the case, and the logits by which it chose tokens: [n, 2] places and [n, V]."""
    models = case["models"]  # one for each rank, or one for all
    try:
        engine = deploy(
            Deployment(Path(models[cluster.rank % len(models)]), case["strategy"], Plan.load(case["plan"])),
            replace(cluster, ranks_per_node=case["ranks_per_node"]),
        )
    except InputError as error:
        return {"fault": str(error)}, None
    for request in case["requests"][:-1]:
        engine.generate(request_of(request))
    recorder, computed = JobRecorder(engine), computed_choices(engine)
    places, logits = [], []
    spy.log, spy.rows_sent = [[]], []

    def observe(rows: Rows, logits_TV: Tensor) -> None:
        places.append(torch.stack([rows.sequence_T, rows.position_T], dim=1))
        logits.append(logits_TV)
        spy.log.append([])

    generation = engine.generate(request_of(case["requests"][-1]), observe)
    log, spy.log = spy.log, []
    trace = recorder.trace()
    if cluster.rank == 0:
        trace.save(folder / f"{case['name']}.trace")
    seen = {
        "generation": asdict(generation),
        "collectives": log,
        "rows_sent": spy.rows_sent,
        "experts_held": experts_held(engine),
        "computed": computed,
    }
    return seen, (torch.cat(places).numpy(), torch.cat(logits).numpy())


def request_of(stored: dict[str, Any]) -> Request:
    return Request(**(stored | {"sampling": Sampling(**stored["sampling"])}))


def experts_held(engine: Engine) -> list[int]:
    return [len(module.experts.w_in) for module in engine.decoder.modules() if isinstance(module, MoE)]


def computed_choices(engine: Engine) -> list[int]:
    """How many choices of tokens this rank's experts compute in each MoE layer, counted from now on."""
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

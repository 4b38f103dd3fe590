"""transformers' own expert parallelism as a baseline for decode steps, beside ExFlow's on the same shapes.

    torchrun --nproc-per-node 2 -m benchmarks.decode.transformers_ep configs/shapes/gpt-oss-20b \\
        configs/shapes/mixtral-8x7b [--how NAME]... [--batch N]... [--seconds N] -o FILE.json

Its `ep_plan` gives each rank whole experts. Attention and gate run for every token on every rank, and one
all-reduce a layer sums the experts' outputs: what ExFlow calls `replicated`. The ways to run a step:

- eager: as transformers runs it
- captured: the eager step in one CUDA graph, which we capture
- dispatch-combine, replicated: ExFlow's captured steps, one-sided writes, contiguous placement
- compiled: torch.compile(fullgraph=True, mode="reduce-overhead"), the documented way to be fast

Models have random weights, and their own gates choose: of 256 sequences the busiest expert of a layer has 1.1
to 1.6 times the mean, the busier of two ranks 1.01 to 1.06 times (drawn on a CPU). Keys and values of
--context tokens are noise in a static cache; every step is the one after them. A layer's time is the
difference between models of 6 and of 2 layers by 4. A step of full depth is that times its layers, plus rest.

Mixtral's code runs every shape: what configs/shapes models is what it computes, and torch's attention serves
it. gpt-oss-20b runs in its own code too, with full attention in every layer.

The logits of a row are one sequence's first ones: they must not depend on the way or on the number of ranks,
one among them (with --dtype float32 to some digits; in bfloat16 a choice of experts may tip). Written as it
goes; once --seconds are over nothing more is begun.
"""

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.decode.transformers_model import ATTENTION, EXPERTS, Bench, transformers_model
from benchmarks.decode.transformers_step import STEPS, transformers_step
from exflow.bench.job import CONTEXT, WARM_UP
from exflow.files import atomic_path
from exflow.job.cluster import Cluster, all_gather_object, join_cluster
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.device import choose_device
from exflow.model.random_weights import RandomWeights, random_decoder
from exflow.placement.plan.topology import Topology
from exflow.runtime.deploy import default_plan, experts_of
from exflow.runtime.expert_parallel import PlanTables

DEPTHS = (2, 6)  # layers of the models that are timed
EXFLOW = ("dispatch-combine", "replicated")
NO_TIME = "no time left"
HOWS = ("eager", "captured", *EXFLOW, "compiled")  # what takes longest to prepare comes last
CODES = {"gpt-oss-20b": ("mixtral", "gpt_oss")}  # whose code runs a shape; the others: Mixtral's


@torch.inference_mode()
def exflow_model(bench: Bench, shape: ModelConfig, code: str, depth: int) -> Any:
    config = shape.model_copy(update={"num_hidden_layers": depth})
    plan = default_plan(config, Topology(gpus_per_node=bench.cluster.num_ranks))
    here = experts_of(plan, bench.cluster.rank)
    return random_decoder(RandomWeights(config), bench.cluster.device, bench.dtype, here), plan


@torch.inference_mode()
def exflow_step(bench: Bench, model: Any, how: str, batch: int) -> dict[str, Any]:
    """Time of ExFlow's captured step. Collective."""
    from exflow.bench.decode import fill_with_noise
    from exflow.bench.timing import begin_synthetic_batch, decode_synthetic_batch, time_steps
    from exflow.runtime.graph_runner import Capture

    decoder, plan = model
    tables = PlanTables.of(plan, bench.cluster.device)
    capture = Capture(decoder, tables, bench.cluster, 1, how == "replicated", "one-sided")
    stepping = decode_synthetic_batch(capture, batch, bench.context, STEPS + WARM_UP)
    fill_with_noise(stepping.cache, stepping.shape.sequence_of_rows(), bench.context)
    begin_synthetic_batch(stepping, batch, bench.context)
    return {"us": time_steps(stepping, STEPS).median_us}


def attempted(cluster: Cluster, work: Callable[[], Any]) -> tuple[Any, str]:
    """(result of `work`, ""), or (None, first line of some rank's error), on all ranks alike. Collective."""
    result, fault = None, ""
    try:
        result = work()
    except Exception as error:
        traceback.print_exc()
        fault = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    faults = [each for each in all_gather_object(cluster, fault) if each]
    return (None, faults[0]) if faults else (result, "")


def row_of(bench: Bench, shape: ModelConfig, models: list[Any], how: str, batch: int) -> dict[str, Any]:
    """Times of both depths, and of a layer, of all but the layers and of a step of full depth. Collective."""
    measure = exflow_step if how in EXFLOW else transformers_step
    few, many = (measure(bench, model, how, batch) for model in models)
    layer = (many["us"] - few["us"]) / (DEPTHS[1] - DEPTHS[0])
    rest = few["us"] - DEPTHS[0] * layer
    step = rest + shape.num_hidden_layers * layer
    return {
        "measured_us": {depth: figures.pop("us") for depth, figures in zip(DEPTHS, (few, many), strict=True)},
        "layer_us": layer,
        "rest_us": rest,
        "step_us": step,
        "tokens_per_s": batch / step * 1e6,
        **many,
    }


def rows(
    bench: Bench, shape: ModelConfig, how: str, batches: list[int], late: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each code that runs the shape, and batch; a failed one says why. Collective."""
    load = exflow_model if how in EXFLOW else transformers_model
    for code in ("exflow",) if how in EXFLOW else CODES.get(shape.name, ("mixtral",)):

        def both(code: str = code) -> list[Any]:
            return [load(bench, shape, code, depth) for depth in DEPTHS]

        models, fault = ([], NO_TIME) if late() else attempted(bench.cluster, both)
        for batch in batches:
            row = {"shape": shape.name, "code": code, "how": how, "batch": batch}
            stopped = fault or (NO_TIME if late() else "")
            if not stopped:
                found, stopped = attempted(bench.cluster, partial(row_of, bench, shape, models, how, batch))
            tidy_up(bench.cluster)
            yield row | ({"stopped": stopped} if stopped else found)


def tidy_up(cluster: Cluster) -> None:
    """Let go of compiled steps too: NCCL does not end before the graphs that it is in."""
    torch._dynamo.reset()
    gc.collect()
    if cluster.device.type == "cuda":
        torch.cuda.empty_cache()


def show(row: dict[str, Any]) -> None:
    what = f"{row['shape']:12} {row['code']:8} {row['how']:16} {row['batch']:5}"
    if "stopped" in row:
        print(f"{what} {row['stopped']}", flush=True)
        return
    times = f"{row['layer_us']:9.1f} {row['rest_us']:8.0f} {row['step_us']:9.0f}"
    print(f"{what} {times} {row['tokens_per_s']:10.0f}", flush=True)


def setting(bench: Bench) -> dict[str, Any]:
    ranks, on_gpu = bench.cluster.num_ranks, bench.cluster.device.type == "cuda"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{ranks} x {torch.cuda.get_device_name() if on_gpu else 'process on CPU'}",
        "versions": versions | ({"nccl": torch.cuda.nccl.version()} if on_gpu else {}),
        "command": " ".join(["torchrun", "--nproc-per-node", str(ranks), *sys.argv]),
        "context": bench.context,
        "steps": STEPS,
        "dtype": str(bench.dtype).removeprefix("torch."),
        "depths": DEPTHS,
        "attention": {code: name for code, (name, _) in ATTENTION.items()},
        "experts": EXPERTS,
        "exchange": "all-reduce of partial sums; attention and gate of all tokens on all ranks",
        "routing": "by each model's own gates, random weights",
        "rows": [],
    }


def run(arguments: argparse.Namespace, cluster: Cluster) -> None:
    deadline = time.monotonic() + arguments.seconds

    def late() -> bool:
        return any(all_gather_object(cluster, time.monotonic() > deadline))

    bench = Bench.of(cluster, getattr(torch, arguments.dtype), arguments.context)
    document = setting(bench)
    if cluster.rank == 0:
        print("shape        code     how              batch  layer us  rest us   step us   tokens/s")
    for how in arguments.how:
        for shape in map(load_model_config, arguments.shapes):
            for row in rows(bench, shape, how, arguments.batch, late):
                document["rows"].append(row)
                if cluster.rank == 0:
                    show(row)
                    with atomic_path(arguments.output) as path:
                        path.write_text(json.dumps(document, indent=1) + "\n")


def main() -> None:
    device = choose_device(None)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shapes", type=Path, nargs="+", help="folders with a config.json, as configs/shapes")
    parser.add_argument("--how", action="append", choices=HOWS, help="by default all; repeatable")
    parser.add_argument("--batch", type=int, action="append", help="repeatable")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.how = arguments.how or (HOWS if device.type == "cuda" else ("eager", "compiled"))
    arguments.batch = arguments.batch or [16, 64, 256, 512]
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast is not used
    transformers.logging.set_verbosity_error()
    with join_cluster(
        device.type, patience_s=180
    ) as cluster:  # a rank that fails alone is not waited for long
        run(arguments, cluster)


if __name__ == "__main__":
    main()

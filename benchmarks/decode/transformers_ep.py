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
difference between models of 6 and of 2 layers by 4, and a step of full depth is so many layers and the rest.

Mixtral's code runs every shape: what configs/shapes models is what it computes, and torch's attention serves
it. gpt-oss-20b runs in its own code too, with full attention in every layer.

The logits of a row are one sequence's first ones: they must not depend on the way or on the number of ranks,
one among them (with --dtype float32 to some digits; in bfloat16 a choice of experts may tip). Written as it
goes; once --seconds are over nothing more is begun.
"""

import argparse
import gc
import inspect
import json
import os
import statistics
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel, StaticCache
from transformers.distributed import DistributedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

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
STEPS = 24
EXFLOW = ("dispatch-combine", "replicated")
NO_TIME = "no time left"
HOWS = ("eager", "captured", *EXFLOW, "compiled")  # what takes longest to prepare comes last
CODES = {"gpt-oss-20b": ("mixtral", "gpt_oss")}  # whose code runs a shape; the others: Mixtral's

# With a mask transformers' sdpa copies keys and values for every query head. It needs none: all positions of
# the cache are filled. Attention that it knows no masks for gets none. For sinks there is the eager one, and
# flash kernels that have to be downloaded.
ATTENTION = {
    "mixtral": ("unmasked_sdpa", sdpa_attention_forward),
    "gpt_oss": ("unmasked_eager", eager_attention_forward),
}
EXPERTS = "grouped_mm"  # batched_mm copies the matrices for each token and choice: more bytes at all batches


@dataclass(frozen=True)
class Bench:
    """What all rows share. distributed: how transformers spreads a model, and over what (None: one rank)."""

    cluster: Cluster
    dtype: torch.dtype
    context: int
    distributed: Any
    mesh: Any

    @classmethod
    def of(cls, cluster: Cluster, dtype: torch.dtype, context: int) -> "Bench":
        ranks = cluster.num_ranks
        # 5.17 has no ep_size; in 5.24 the flag without it means an empty tp_plan, which it then refuses
        wanted = {"tp_size": ranks, "ep_size": ranks, "enable_expert_parallel": ranks > 1}
        distributed, _, mesh = PreTrainedModel.prepare_distribute_model(DistributedConfig.from_dict(wanted))
        return cls(cluster, dtype, context, distributed, mesh)


def transformers_model(bench: Bench, shape: ModelConfig, code: str, depth: int) -> Any:
    """The first `depth` layers of a shape in the code of a family, with this rank's experts."""
    layers = {"layer_types": ["full_attention"] * depth} if code == "gpt_oss" else {}
    config = AutoConfig.for_model(
        code,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        pad_token_id=None,
        **layers,
    )
    attention, function = ATTENTION[code]
    AttentionInterface.register(attention, function)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=bench.dtype, attn_implementation=attention, experts_implementation=EXPERTS
        )
    # dense weights whole on every rank: a rule of tensor parallelism for experts yields to the ep_plan's
    model.tp_plan = {"model.layers.*.mlp.experts": "moe_tp_experts"}
    model = model.maybe_distribute_model(model, bench.distributed, bench.mesh)
    model.to_empty(device=bench.cluster.device)
    # its buffers are no weights, and were on no device
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(bench.cluster.device)
    draw_weights(model, bench.cluster)
    return model.eval().requires_grad_(False)


def held(parameter: Tensor) -> Tensor:
    """The part of a parameter that lies on this rank."""
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part


@torch.no_grad()
def draw_weights(model: Any, cluster: Cluster) -> None:
    """Random weights that depend on names and experts alone, and keep the size of what passes through them.

    Biases are small: what they add to all tokens alike would make some experts everyone's choice.
    """
    generator = torch.Generator(cluster.device)

    def draw(values: Tensor, key: str) -> None:
        generator.manual_seed(zlib.crc32(key.encode()))
        share = 0.1 if "bias" in key else 1.0
        values.normal_(std=share * values.shape[-1] ** -0.5, generator=generator)

    for name, parameter in model.named_parameters():
        part = held(parameter)
        if "norm" in name:
            part.fill_(1)
        elif ".experts." in name:
            first = cluster.rank * len(part)
            for expert, values in enumerate(part, first):
                draw(values, f"{name} {expert}")
        else:
            draw(part, name)


class Decode:
    """Steps of `batch` sequences, one after another at the same position: the greedy choice is fed back."""

    def __init__(self, bench: Bench, model: Any, batch: int) -> None:
        config, device = model.config, bench.cluster.device
        self.forward, self.context, self.vocabulary = model, bench.context, config.vocab_size
        self.cache: Any = StaticCache(config=config, max_cache_len=bench.context + 1)
        size = (batch, config.num_key_value_heads, config.head_dim)
        self.cache.early_initialization(*size, dtype=bench.dtype, device=device)
        generator = torch.Generator(device).manual_seed(0)
        for layer in self.cache.layers:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)
        self.token = torch.empty(batch, 1, dtype=torch.int64, device=device)
        named = "cache" in inspect.signature(model.forward).parameters  # its newer name
        self.cache_name = "cache" if named else "past_key_values"

    def begin(self) -> None:
        self.token.copy_(torch.arange(len(self.token), device=self.token.device)[:, None] % self.vocabulary)

    def rewind(self) -> None:
        """Put the position where it was before a step."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)

    def step(self) -> Tensor:
        """Logits [batch, vocabulary]."""
        logits: Tensor = self.forward(
            input_ids=self.token, use_cache=True, **{self.cache_name: self.cache}
        ).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits


def prepared(decode: Decode, how: str) -> Callable[[], Tensor]:
    """The step in the given way, after what it needs to be fast."""
    if how == "compiled":
        torch._dynamo.utils.counters.clear()
        decode.forward = torch.compile(decode.forward, mode="reduce-overhead", fullgraph=True, dynamic=False)
    for _ in range(WARM_UP):
        decode.rewind()
        decode.step()
    return captured(decode) if how == "captured" else decode.step


def captured(decode: Decode) -> Callable[[], Tensor]:
    """The eager step as one CUDA graph."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    decode.rewind()
    with torch.cuda.graph(graph):
        logits = decode.step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def median_us(cluster: Cluster, step: Callable[[], Tensor], rewind: Callable[[], None]) -> float:
    """Microseconds of a step of the slowest rank, after a warm-up. Collective."""
    on_gpu = cluster.device.type == "cuda"
    marks: list[tuple[Any, Any]] = []
    for _ in range(WARM_UP + STEPS):
        rewind()
        start, end = (torch.cuda.Event(enable_timing=True) if on_gpu else Clock() for _ in range(2))
        start.record()
        step()
        end.record()
        marks.append((start, end))
    if on_gpu:
        torch.cuda.synchronize()
    taken = [1000 * start.elapsed_time(end) for start, end in marks[WARM_UP:]]
    return float(statistics.median(map(max, zip(*all_gather_object(cluster, taken), strict=True))))


class Clock:
    """What a torch.cuda.Event is, on a CPU."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Clock") -> float:
        return 1000 * (end.at - self.at)


@torch.no_grad()
def transformers_step(bench: Bench, model: Any, how: str, batch: int) -> dict[str, Any]:
    """Time and first logits of one way to run a step. Collective."""
    decode = Decode(bench, model, batch)
    decode.begin()
    step = prepared(decode, how)
    figures: dict[str, Any] = {"us": median_us(bench.cluster, step, decode.rewind)}
    decode.begin()
    decode.rewind()
    figures["logits"] = step()[0, :8].tolist()
    figures["experts_here"] = len(held(model.model.layers[0].mlp.experts.down_proj))
    if how == "compiled":  # graphs that inductor did not capture after all
        figures["cudagraph_skips"] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    return figures


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
    """What came of it, and else the first line of some rank's error, on all ranks alike. Collective."""
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
    """One for each code that runs the shape, and batch; what failed says why. Collective."""
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

"""Makes the cases of benchmarks/decode/run.py from recorded traces: routing to replay, and plans.

    python -m benchmarks.decode.cases TRACES -o CASES [--ranks 2]

TRACES is a folder of recorded routing (recorded.py), which is taken as it is. A trace is split by sequence:
on three in four the affinity placement is made, the others are replayed. Each case is a folder with a model's
config.json, the trace to replay, and plans contiguous.json and affinity.json. Of 16 experts no real routing
is at hand: that case is generated.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.routing.generated import generate
from benchmarks.routing.recorded import NoTrace, joined, read
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.profiling.trace import RoutingTrace

LAYERS = 24
# between GPUs of a host a message costs less than waiting for the busiest
BALANCED = Objective(balance_price=2.5, owner_price=2.5)
SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


@dataclass(frozen=True)
class Source:
    """The source of a case's routing: a model's name (None: generated), its domains (empty: all), and the
    first `choices` of each token."""

    model: str | None
    choices: int
    domains: tuple[str, ...] = ()
    shape: str | None = None  # of configs/shapes; None is the grid's own


SOURCES = {
    "top1-8": Source("Mixtral-8x7B", 1),
    "top1-16": Source(None, 1),
    "top1-32": Source("gpt-oss-20b", 1, ("MMLU",)),
    "top1-64": Source("DeepSeek-V2-Lite", 1),
    "gpt-oss-20b": Source("gpt-oss-20b", 4, ("MMLU",), shape="gpt-oss-20b"),
    "mixtral-8x7b": Source("Mixtral-8x7B", 2, shape="mixtral-8x7b"),
}


def grid_config(name: str, experts: int) -> ModelConfig:
    """The grid's model: 24 layers, 1024 wide, 4096 inside an expert, top-1."""
    return ModelConfig(
        name=name,
        vocab_size=32000,
        max_positions=2048,
        num_hidden_layers=LAYERS,
        hidden_size=1024,
        num_attention_heads=16,
        num_kv_heads=16,
        intermediate_size=4096,
        num_experts=experts,
    )


def routing(source: Source, config: ModelConfig, traces: Path) -> tuple[RoutingTrace, RoutingTrace]:
    """The routing to place by, and the routing to replay."""
    if source.model is None:
        return generated(config.num_experts, source.choices)
    found = joined(read(traces, source.model, source.domains).values())
    experts = found.trace.experts[:, : config.num_hidden_layers, : source.choices]
    number, held_out = found.trace.num_experts, found.held_out
    # replayed in short sequences, and mixed, so that a batch is of many texts, as requests of many users are
    replayed = experts[held_out]
    piece = np.arange(len(replayed)) // 32
    mixed = np.random.default_rng(0).permutation(piece[-1] + 1)
    return (
        RoutingTrace.from_arrays(experts[~held_out], num_experts=number, sequence=found.unit[~held_out]),
        RoutingTrace.from_arrays(replayed, num_experts=number, sequence=mixed[piece]),
    )


def generated(experts: int, choices: int) -> tuple[RoutingTrace, RoutingTrace]:
    trace = generate(
        tokens=40_000,
        layers=LAYERS,
        experts=experts,
        top_k=choices,
        skew=0.3,
        affinity=0.7,
        sequences=400,
        seed=0,
    )
    held_out = trace.sequence % 4 == 3
    return trace.select(~held_out), trace.select(held_out)


def write_case(name: str, source: Source, traces: Path, folder: Path, ranks: int) -> None:
    if source.shape:
        config = load_model_config(SHAPES / source.shape)
    else:
        config = grid_config(name, int(name.rpartition("-")[2]))
    train, test = routing(source, config, traces)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config.model_dump_json())
    test.save(folder / "trace")
    for placement, method in (("contiguous", "contiguous"), ("affinity", "auto")):
        plan = place(
            train, Topology(gpus_per_node=ranks), objective=BALANCED, solving=Solving(method, time_limit=20)
        )
        plan.save(folder / f"{placement}.json")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path, help="folder of recorded routing")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    try:
        for name, source in SOURCES.items():
            write_case(name, source, arguments.traces, arguments.output / name, arguments.ranks)
            print(name, flush=True)
    except NoTrace as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

"""`exflow simulate` beside measured runs, on clusters that nobody has, and in the ExFlow paper's settings.

    python -m benchmarks.simulate calibrate TRACES -o FILE.json
    python -m benchmarks.simulate SCENARIO TRACES -o FILE.json [--gpus N]...
    python -m benchmarks.simulate paper TRACES -o FILE.json [--gpus N]... [--routing recorded]
    python -m benchmarks.simulate show -o FILE.json [--drawing FILE.svg]

calibrate predicts the steps of results/decode-*xh*.json and results/hosts.json, on the routing and the plans
that those benchmarks make, and prints the error of each. SCENARIO is a model on a machine in several
sizes (see SCENARIOS). Every part replaces its own entry of FILE, size by size, with command and date. TRACES
is a folder of recorded routing (.npz).
"""

import argparse
import json
import math
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode.cases import SHAPES, SOURCES, generated, grid_config, write_case
from benchmarks.decode.cases import routing as routing_of
from benchmarks.hosts import run as hosts
from benchmarks.routing.generated import generate
from exflow.commands.simulate import Size
from exflow.cost.crossover import crossovers
from exflow.cost.machine import Link, Machine
from exflow.cost.machines import load_machine
from exflow.cost.predict import predict
from exflow.cost.simulate import Layout, Point, Step, Variant, fastest, step, variants
from exflow.cost.workload import Workload
from exflow.files import atomic_path, read_json
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from exflow.report.scaling import DRAWN, scaling_drawing

HERE = Path(__file__).parent
MACHINES = HERE.parent / "configs" / "machines"
FITTED = ("top1-8", "top1-64")  # the models, on two GPUs, whose steps layer_s was fitted to
RUNS = ("decode-2xh200", "decode-4xh200", "decode-2xh100", "decode-4xh100")
OLD_GATHER = ("decode-2xh200", "decode-4xh200")  # whose collective K/V gather was replaced since
UNREACHED = {"latency_s": 0.0, "bytes_per_s": math.inf}
LAYER_S = 35e-6  # as configs/machines has it, from what these runs are fitted to
FLOPS_PER_S = 600e12  # of H200s, whose runs did not store theirs
PLACE_SECONDS = 6.0

# EP, us of a dispatch in fp8, us of a combine in bf16: 128 tokens a GPU, 7168 wide, 8 experts, RDMA alone.
# github.com/deepseek-ai/DeepEP, README of February 2025, H800s with 400 Gbit/s cards
DEEPEP = ((8, 163, 318), (16, 173, 329), (32, 182, 350), (64, 186, 353), (128, 192, 369), (256, 194, 360))
DEEPEP_BYTES = (128 * 8 * (7168 + 4 * 7168 // 128), 128 * 8 * 2 * 7168)


def tell(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


# -- Beside measured runs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A step that was timed, and the variant that it ran."""

    run: str
    case: str
    transport: str
    seconds: float
    variant: Variant
    point: Point

    @property
    def use(self) -> str:
        """fitted: layer_s knows it. old gather: its K/V gather was replaced since. Else predicted."""
        if self.transport == "collective" and self.variant.strategy == "coherent" and self.run in OLD_GATHER:
            return "old gather"
        return "fitted" if self.run == RUNS[0] and self.case in FITTED else "predicted"

    def on(self, machine: Machine) -> Step:
        return step(self.variant, replace(self.point, machine=machine))


def measured_steps(traces: Path, folder: Path) -> Iterator[Measured]:
    """The captured steps of the decode benchmark."""
    for run in RUNS:
        document = read_json(HERE / "results" / f"{run}.json", "result", "run benchmarks/decode/run.py")
        ranks = int(run.split("-")[1][0])
        found: dict[tuple[str, str, str], Variant] = {}
        for case in document["cases"]:
            at = folder / run / case["case"]
            if not at.exists():
                tell(f"{run}: placing {case['case']}")
                write_case(case["case"], SOURCES[case["case"]], traces, at, ranks)
            config, trace = load_model_config(at), RoutingTrace.load(at / "trace")
            middle = document["context"] + (document["steps"] + 3) // 2  # of the timed steps, after 3
            for row in case["rows"]:
                if row["transport"] == "eager":
                    continue
                name = (case["case"], row["strategy"], row["placement"])
                if name not in found:
                    plan = Plan.load(at / f"{row['placement']}.json")
                    found[name] = Variant.of(Strategy(row["strategy"]), row["placement"], plan, trace)
                machine = measured_machine(document, row["transport"])
                point = Point(config, case["batch"], middle, machine)
                yield Measured(
                    run, case["case"], row["transport"], row["median_us"] / 1e6, found[name], point
                )


def measured_machine(document: dict[str, Any], transport: str) -> Machine:
    """Links, memory and arithmetic as measured in the same job; what a layer takes besides is LAYER_S."""
    (stored,) = (dict(each) for each in document["machines"] if each["transport"] == transport)
    inside, between = (Link(**(stored.pop(link) or UNREACHED)) for link in ("inside", "between"))
    changes = {"layer_s": LAYER_S, "hides": float(transport != "collective")}
    return Machine(inside, between, **({"flops_per_s": FLOPS_PER_S} | stored | changes))


def fitted_layer_s(steps: list[Measured]) -> float:
    """The median of what the steps that it is fitted to leave for a layer, launches left out."""
    left = [
        (each.seconds - each.on(replace(each.point.machine, layer_s=0.0)).seconds)
        / each.point.model.num_hidden_layers
        for each in steps
        if each.use == "fitted"
    ]
    return statistics.median(left)


def calibrate(traces: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="exflow-simulate-") as temporary:
        steps = list(measured_steps(traces, Path(temporary)))
    layer_s, rows = fitted_layer_s(steps), [_row(each) for each in steps]
    return {
        "fitted_layer_us": 1e6 * layer_s,
        "fitted_to": f"{', '.join(FITTED)} on two GPUs",
        "captured": rows,
        "summary": _summary(rows),
        "ratios": _ratios(rows),
        "choice": _choices(rows),
        "hosts": list(host_rows(traces)),
        "published": list(published()),
    }


def _row(each: Measured) -> dict[str, Any]:
    predicted = each.on(each.point.machine).seconds
    return {
        "run": each.run,
        "case": each.case,
        "batch": each.point.batch,
        "strategy": each.variant.strategy,
        "transport": each.transport,
        "placement": each.variant.placement,
        "measured_ms": 1e3 * each.seconds,
        "predicted_ms": 1e3 * predicted,
        "error": predicted / each.seconds - 1,
        "use": each.use,
    }


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Signed errors by run, use and transport."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        groups.setdefault((row["run"], row["use"], row["transport"]), []).append(row["error"])
    return [
        {"run": run, "use": use, "transport": transport, "steps": len(errors)}
        | {"mean": statistics.mean(errors), "least": min(errors), "most": max(errors)}
        | {"mean_absolute": statistics.mean(map(abs, errors))}
        for (run, use, transport), errors in groups.items()
    ]


def _ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each strategy takes over dispatch-combine, both over one-sided writes with the same placement."""
    by_name = {
        (row["run"], row["case"], row["batch"], row["placement"], row["strategy"]): row
        for row in rows
        if row["transport"] == "one-sided"
    }
    found = []
    for (*where, strategy), row in by_name.items():
        base = by_name[(*where, "dispatch-combine")]
        if strategy != "dispatch-combine":
            measured, predicted = (row[of] / base[of] for of in ("measured_ms", "predicted_ms"))
            names = dict(zip(("run", "case", "batch", "placement"), where, strict=True))
            found.append(names | {"strategy": strategy, "measured": measured, "predicted": predicted})
    return found


def _choices(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case, over one-sided writes: the strategy predicted to be fastest, and what it costs to believe
    it."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["transport"] == "one-sided":
            cases.setdefault((row["run"], row["case"], row["batch"]), []).append(row)
    found = []
    for (run, case, batch), mine in cases.items():
        if len({row["strategy"] for row in mine}) == 1:
            continue  # no choice
        chosen = min(mine, key=lambda row: row["predicted_ms"])
        best = min(mine, key=lambda row: row["measured_ms"])
        found.append(
            {"run": run, "case": case, "batch": batch}
            | {"chosen": chosen["strategy"], "best": best["strategy"]}
            | {"times_best": chosen["measured_ms"] / best["measured_ms"]}
        )
    return found


def host_rows(traces: Path) -> Iterator[dict[str, Any]]:
    """The runs on emulated hosts, predicted from the figures that each job measured of itself before."""
    document = read_json(HERE / "results" / "hosts.json", "result", "run benchmarks/hosts/run.py")
    for result in document["results"]:
        parts = hosts.split(result["shape"], traces, result["steps"] + 1)
        trace = hosts.replayed(parts, result["batch"])
        decoded = trace.select(trace.position > 0)
        machine = _machine_of_hosts(result["machine"])
        tell(f"hosts: placing {result['shape']}")
        for placement, plan in hosts.plans_of(parts.train, result["hosts"]).items():
            load = Workload.of(parts.config, plan, result["batch"], result["steps"] // 2, 4)
            for variant in result["variants"]:
                if variant["placement"] == placement:
                    moved = hosts.moved_of(variant["strategy"], plan, decoded)
                    predicted = 1e3 * predict("coherent", load, moved, machine).step_s
                    yield {
                        "shape": result["shape"],
                        "group": variant["strategy"],
                        "placement": placement,
                        "measured_ms": variant["step_ms"],
                        "predicted_ms": predicted,
                        "error": predicted / variant["step_ms"] - 1,
                    }


def _machine_of_hosts(figures: dict[str, float]) -> Machine:
    """A machine as `measure_here` of benchmarks/hosts/rank.py wrote it."""
    machine = load_machine(MACHINES / "hosts-1gbit.yaml")
    link = replace(
        machine.between,
        latency_s=figures["exchange_latency_ms"] / 1e3,
        bytes_per_s=1e6 * figures["megabytes_per_s_of_a_rank"],
    )
    return replace(
        machine,
        inside=link,
        between=link,
        layer_s=figures["layer_ms"] / 1e3,
        token_s=figures["token_us"] / 1e6,
        shared=bool(figures["shared"]),
        memory_bytes=math.inf,
    )


def published() -> Iterator[dict[str, Any]]:
    """What DeepEP publishes, by the link between nodes of h200.yaml, which was fitted to it."""
    link = load_machine(MACHINES / "h200.yaml").between
    for ranks, *times in DEEPEP:
        for what, size, measured in zip(("dispatch", "combine"), DEEPEP_BYTES, times, strict=True):
            predicted = 1e6 * (link.latency_s + link.peer_s * (ranks - 1) + size / link.bytes_per_s)
            yield {"ranks": ranks, "what": what, "published_us": measured, "predicted_us": predicted} | {
                "error": predicted / measured - 1
            }


# -- On clusters that nobody measured ------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    """A model with its routing on a machine, in several sizes; batches are sequences a GPU."""

    model: str
    machines: tuple[str, ...]
    gpus_per_node: int
    gpus: tuple[int, ...]
    batches: tuple[int, ...]
    context: int


SIZES = (2, 4, 8, 16, 32, 64, 128, 256)  # of a group; more GPUs than experts are further groups
MOST = 1024  # GPUs that curves go to
SCENARIOS = {
    "gpt-oss": Scenario("gpt-oss-20b", ("h200", "h200-relayed", "h200-nccl"), 8, SIZES[:5], (1, 8, 64), 1024),
    "deepseek": Scenario("deepseek-v3-like", ("h200",), 8, SIZES[3:], (1, 8, 64), 4096),
    "top1": Scenario("top1-64", ("a100-hdr",), 4, SIZES[1:6], (1, 8, 64), 512),
    "hosts": Scenario("hosts-top1", ("hosts-1gbit",), 1, SIZES[:5], (1, 8, 128), 8),
    "hosts-gpt-oss": Scenario("hosts-gpt-oss", ("hosts-1gbit",), 1, SIZES[:5], (1, 8, 128), 8),
}


def routing(model: str, traces: Path) -> tuple[ModelConfig, RoutingTrace, RoutingTrace]:
    """The model, routing to place by, and routing to judge by."""
    if model.startswith("hosts-"):
        parts = hosts.split(model.removeprefix("hosts-"), traces, 32)
        test = parts.windows.reshape(-1, *parts.windows.shape[2:])
        return parts.config, parts.train, _trace(test, parts.config)
    if model == "deepseek-v3-like":
        return _deepseek()
    source = SOURCES[model]
    experts = int(model.rpartition("-")[2]) if source.shape is None else 0
    config = load_model_config(SHAPES / source.shape) if source.shape else grid_config(model, experts)
    return config, *routing_of(source, config, traces)


def _trace(experts: np.ndarray[Any, np.dtype[Any]], config: ModelConfig) -> RoutingTrace:
    return RoutingTrace.from_arrays(
        experts,
        num_experts=config.num_experts,
        sequence=np.arange(len(experts)) // 32,
        model=config.name,
        moe_layer_ids=config.moe_layer_ids,
        num_hidden_layers=config.num_hidden_layers,
    )


def _deepseek() -> tuple[ModelConfig, RoutingTrace, RoutingTrace]:
    """DeepSeek-V3's sizes in this package's terms, on generated routing: nothing of it was recorded.

    Its latent of 576 numbers is one K/V head of 288; so many query heads that attention and the shared expert
    weigh what theirs do (231 million numbers a layer). What its attention multiplies is not modelled.
    """
    config = ModelConfig(
        name="deepseek-v3-like",
        vocab_size=129280,
        max_positions=8192,
        num_hidden_layers=61,
        hidden_size=7168,
        num_attention_heads=56,
        num_kv_heads=1,
        head_dim=288,
        intermediate_size=2048,
        dense_layers=(0, 1, 2),
        dense_intermediate_size=18432,
        activation="swiglu",
        num_experts=256,
        top_k=8,
    )
    trace = generate(
        tokens=24_000,
        layers=len(config.moe_layer_ids),
        experts=256,
        top_k=8,
        skew=0.3,
        affinity=0.7,
        sequences=1000,
        seed=0,
    )
    held_out = trace.sequence % 2 == 1
    return config, _trace(trace.experts[~held_out], config), _trace(trace.experts[held_out], config)


def simulate(scenario: Scenario, traces: Path, sizes: list[int]) -> dict[str, Any]:
    """By machine, GPUs and batch; the turns of the batch of 64 a GPU (or of the middle one)."""
    config, train, test = routing(scenario.model, traces)
    found: dict[str, Any] = {}
    choices: dict[Topology, list[Variant]] = {}
    for gpus in sizes or scenario.gpus:
        layout = Layout.of(gpus, scenario.gpus_per_node, config.num_experts)
        if layout.topology not in choices:
            choices[layout.topology] = variants(train, test, layout.topology, PLACE_SECONDS, tell)
        choice = choices[layout.topology]
        for machine in scenario.machines:
            of_machine = found.setdefault(machine, {}).setdefault(str(gpus), {})
            for batch in scenario.batches:
                of_machine[str(batch)] = size_of(layout, batch, config, scenario.context, machine, choice)
    return found


def size_of(
    layout: Layout, batch: int, config: ModelConfig, context: int, machine: str, choice: list[Variant]
) -> dict[str, Any]:
    point = Point(config, batch * layout.width, context, load_machine(MACHINES / f"{machine}.yaml"))
    steps = tuple(step(variant, point) for variant in choice)
    return Size(layout, batch * layout.gpus, point, steps, tuple(crossovers(choice, point))).as_json()


# -- The ExFlow paper's settings -----------------------------------------------------------------------------


PAPER = ((8, (4, 8)), (16, (4, 8, 16)), (32, (4, 8, 16, 32)), (64, (4, 8, 16, 32, 64)))
PAPER_BATCHES = (64, 512)  # sequences a GPU: not known
PAPER_CONTEXT = 128  # not known


def paper(traces: Path, kinds: list[str], only: list[int]) -> list[dict[str, Any]]:
    """Coherent with affinity against dispatch-combine with contiguous placement, on A100s, four a node.

    Routing is `recorded` (first choices of other models; of 16 experts generated), or `generated`, level and
    with planted affinity. Sharing keys and values takes what it must, or nothing, as the paper counts.
    """
    machine, found = load_machine(MACHINES / "a100-hdr.yaml"), []
    for kind in kinds:
        for experts, sizes in PAPER:
            config = grid_config(f"paper-{experts}", experts)
            name = f"top1-{experts}"
            train, test = routing(name, traces)[1:] if kind == "recorded" else generated(experts, 1)
            for gpus in [gpus for gpus in sizes if gpus in (only or sizes)]:
                topology = Layout.of(gpus, 4, experts).topology
                choice = variants(train, test, topology, PLACE_SECONDS, tell)
                for batch in PAPER_BATCHES:
                    point = Point(config, batch * gpus, PAPER_CONTEXT, machine)
                    found.append({"routing": kind, "experts": experts, "gpus": gpus, "batch": batch})
                    found[-1] |= against_vanilla(choice, point)
    return found


def against_vanilla(choice: list[Variant], point: Point) -> dict[str, Any]:
    """Of each strategy with affinity, and of coherence without: what its exchanges save of vanilla's, its
    throughput over vanilla's, and that if sharing keys and values took no time."""
    by_name = {(each.strategy, each.placement): step(each, point) for each in choice}
    vanilla = by_name["dispatch-combine", "contiguous"]
    figures: dict[str, Any] = {
        "vanilla_ms": 1e3 * vanilla.seconds,
        "vanilla_exchange_ms": 1e3 * vanilla.prediction.exchange_s,
    }
    for (strategy, placement), mine in by_name.items():
        if placement == "affinity" or strategy == "coherent":
            shared_s = mine.prediction.background_s
            figures[f"{strategy}, {placement}"] = {
                "exchange_less": 1 - mine.prediction.exchange_s / vanilla.prediction.exchange_s,
                "throughput": vanilla.seconds / mine.seconds,
                "throughput_if_sharing_were_free": vanilla.seconds / (mine.seconds - shared_s),
                "background_ms": 1e3 * shared_s,
                "attending": mine.variant.traffic.attention_imbalance,
                "fits": mine.fits,
            }
    best = fastest(choice, point)
    figures["fastest"] = None if best is None else [best.variant.strategy, best.variant.placement]
    return figures


DRAWING = ("gpt-oss", "h200", "64")  # scenario, machine, sequences a GPU


# -- What is printed -----------------------------------------------------------------------------------------


def show(document: dict[str, Any]) -> None:
    if "calibrate" in document:
        _show_calibration(document["calibrate"])
    for name in SCENARIOS:
        if name in document:
            _show_scenario(name, document[name])
    for row in document.get("paper", {}).get("rows", []):
        _show_paper(row)


def draw(document: dict[str, Any], path: Path) -> None:
    """The curves of docs/simulate.md: of every number of GPUs in groups of every size that was simulated."""
    scenario, machine, batch = DRAWING
    groups = [batches[batch] for batches in document[scenario]["machines"][machine].values()]
    sizes = [
        group | {"gpus": gpus}
        for group in groups
        for gpus in (group["gpus"] << more for more in range(MOST.bit_length()))
        if gpus <= MOST
    ]
    with atomic_path(path) as temporary:
        temporary.write_text(scaling_drawing(sizes, *DRAWN["throughput"]), encoding="utf-8")


def _show_calibration(found: dict[str, Any]) -> None:
    print(f"layer_s fitted: {found['fitted_layer_us']:.1f} us, to {found['fitted_to']}")
    print("run, case, batch, strategy, transport, placement, measured ms, predicted ms, error")
    for row in found["captured"]:
        what = f"{row['strategy']:17} {row['transport']:11} {row['placement']:10}"
        times = f"{row['measured_ms']:9.3f} {row['predicted_ms']:9.3f} {row['error']:+7.1%}"
        print(f"{row['run']:14} {row['case']:13} {row['batch']:5} {what} {times}  {row['use']}")
    for row in found["summary"]:
        errors = f"mean {row['mean']:+.1%}, {row['least']:+.1%} to {row['most']:+.1%}"
        what = f"{row['run']:14} {row['use']:11} {row['transport']:11} {row['steps']:3} steps"
        print(f"{what}: {errors}, absolute {row['mean_absolute']:.1%}")
    _show_ratios(found["ratios"])
    right = sum(each["chosen"] == each["best"] for each in found["choice"])
    worst = max(each["times_best"] for each in found["choice"])
    print(f"fastest: right in {right} of {len(found['choice'])} cases, at most {worst:.3f} times the best")
    for row in found["hosts"]:
        times = f"{row['measured_ms']:7.0f} {row['predicted_ms']:7.0f} {row['error']:+.1%}"
        print(f"hosts {row['shape']:9} group {row['group']} {row['placement']:10} {times}")
    for row in found["published"]:
        print(f"DeepEP {row['ranks']:3} {row['what']:8} {row['published_us']} us {row['error']:+.1%}")


def _show_ratios(ratios: list[dict[str, Any]]) -> None:
    for run in RUNS:
        for strategy in ("coherent", "replicated"):
            errors = [
                each["predicted"] / each["measured"] - 1
                for each in ratios
                if (each["run"], each["strategy"]) == (run, strategy)
            ]
            if not errors:
                continue
            spread = f"{min(errors):+.1%} to {max(errors):+.1%}"
            print(f"{run} {strategy} over dispatch-combine: {statistics.mean(errors):+.1%}, {spread}")


def _show_scenario(name: str, found: dict[str, Any]) -> None:
    for machine, sizes in found["machines"].items():
        for gpus, batches in sorted(sizes.items(), key=lambda item: int(item[0])):
            for batch, size in batches.items():
                steps = ", ".join(
                    f"{each['strategy'][:8]} {each['placement'][:3]} {each['step_ms']:.2f}"
                    for each in size["steps"]
                    if each["fits"]
                )
                where = f"{name} {machine} {gpus} GPUs ({size['expert_parallel']}) batch {batch}"
                print(f"{where}: {size['fastest']}: {steps}")
                for turn in size["turns"]:
                    value = f"x {turn['factor']:.3g} = {turn['value']:.4g} {turn['unit']}"
                    print(f"    {turn['quantity']} {value}: {turn['strategy']}")


def _show_paper(row: dict[str, Any]) -> None:
    where = f"{row['routing']:9} {row['experts']:2} experts {row['gpus']:2} GPUs batch {row['batch']:3}"
    vanilla = f"vanilla {row['vanilla_ms']:.2f} ms, {row['vanilla_exchange_ms']:.2f} of exchanges"
    print(f"{where}: {vanilla}; fastest {row['fastest']}")
    for name, each in row.items():
        if isinstance(each, dict):
            free = each["throughput_if_sharing_were_free"]
            gains = f"x {each['throughput']:.2f}, sharing free x {free:.2f}"
            rest = f"K/V not hidden {each['background_ms']:.2f} ms"
            print(f"    {name:28} exchanges {-each['exchange_less']:+.0%}, throughput {gains}, {rest}")


def in_lines(document: dict[str, Any]) -> str:
    """JSON with a line for every row."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\{[^{}\[\]]*\}", lambda row: " ".join(row[0].split()), text) + "\n"


def rounded(value: Any) -> Any:
    """With four digits: nothing here is known better."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["calibrate", *SCENARIOS, "paper", "show"])
    parser.add_argument("traces", type=Path, nargs="?", help="folder of recorded routing")
    parser.add_argument("--gpus", type=int, action="append", help="of all sizes these alone; repeatable")
    parser.add_argument("--routing", action="append", choices=["recorded", "generated"], help="of paper")
    parser.add_argument("--drawing", type=Path, help="file for the curves of docs/simulate.md")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if arguments.part == "show":
        show(document)
        if arguments.drawing is not None:
            draw(document, arguments.drawing)
        return
    if arguments.traces is None:
        parser.error("give the folder of recorded routing")
    paths = {str(arguments.traces): "TRACES", str(arguments.output): arguments.output.name}
    shown = ["benchmarks/simulate.py", *(paths.get(part, part) for part in sys.argv[1:])]
    entry: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *shown]),
    }
    before = document.get(arguments.part, {})
    match arguments.part:
        case "calibrate":
            entry |= calibrate(arguments.traces)
        case "paper":
            kinds = arguments.routing or ["recorded", "generated"]
            made = paper(arguments.traces, kinds, arguments.gpus or [])
            anew = {(row["routing"], row["gpus"]) for row in made}
            kept = [row for row in before.get("rows", []) if (row["routing"], row["gpus"]) not in anew]
            of_sizes = {f"{kind}, {gpus}": entry["command"] for kind, gpus in sorted(anew)}
            entry |= {"batches": PAPER_BATCHES, "context": PAPER_CONTEXT, "rows": kept + made}
            entry["commands"] = before.get("commands", {}) | of_sizes
            del entry["command"]
        case name:
            scenario = SCENARIOS[name]
            entry |= {"scenario": asdict(scenario), "machines": before.get("machines", {})}
            of_sizes = dict.fromkeys(map(str, arguments.gpus or scenario.gpus), entry.pop("command"))
            entry["commands"] = before.get("commands", {}) | of_sizes
            for machine, sizes in simulate(scenario, arguments.traces, arguments.gpus or []).items():
                entry["machines"].setdefault(machine, {}).update(sizes)
    document[arguments.part] = rounded(entry)
    with atomic_path(arguments.output) as path:
        path.write_text(in_lines(document), encoding="utf-8")
    show({arguments.part: entry})


if __name__ == "__main__":
    main()

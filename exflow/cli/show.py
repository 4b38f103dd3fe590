"""Results on stdout: JSON for tools, tables for people."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from exflow.doctor import Finding
    from exflow.place import Placement
    from exflow.placement.exporters.registry import Exported
    from exflow.placement.plan import Plan
    from exflow.profiling.trace import RoutingTrace


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=1))


def print_figures(figures: dict[str, Any], as_json: bool) -> None:
    """One figure a line."""
    if as_json:
        print_json(figures)
        return
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):<{width}}  {_readable(value)}")


def trace_figures(trace: "RoutingTrace") -> dict[str, Any]:
    return {
        "model": trace.model,
        "tokens": trace.num_tokens,
        "sequences": len(set(trace.sequence.tolist())),
        "moe_layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
    }


def print_placement(result: "Placement", output: Path | None, as_json: bool) -> None:
    """What was solved and how well; then the tables that were asked for."""
    figures = {} if output is None else {"plan": str(output), **plan_figures(result.plan)}
    tables = {
        "pareto": result.pareto,
        "learning_curve": result.learning_curve,
        "verdict": result.verdict,
        "messages_by_trace": result.by_trace,
    }
    if as_json:
        print_json(figures | {name: table for name, table in tables.items() if table is not None})
        return
    if figures:
        print_figures(figures | (result.by_trace or {}), as_json=False)
    for rows, columns in ((result.pareto, _PARETO_COLUMNS), (result.learning_curve, _CURVE_COLUMNS)):
        if rows is not None:
            _print_table([], columns, rows)
    if result.verdict is not None:
        print(result.verdict)


def plan_figures(plan: "Plan") -> dict[str, Any]:
    """What was solved and how well, and the expected traffic of every strategy."""
    messages = {
        f"messages_{name}": figures["messages_per_token_layer"]
        for name, figures in plan.expected["strategies"].items()
        if name != "replicated"
    }
    held_out = plan.expected.get("held_out", {})
    return {
        "strategy": plan.strategy,
        "method": plan.method,
        "slots": plan.num_slots,
        "objective": plan.objective,
        "lower_bound": plan.lower_bound,
        "gap": plan.gap,
        "optimal": plan.optimal,
        **messages,
        "local_fraction": plan.expected["local_fraction"],
        "imbalance_mean": plan.expected["imbalance"]["mean"],
        "imbalance_max": plan.expected["imbalance"]["max"],
        **{f"held_out_{name}": figure for name, figure in held_out.items()},
    }


_PARETO_COLUMNS = {
    "price": "balance_price",
    "messages": "messages_per_token_layer",
    "imbalance": "imbalance_mean",
    "worst layer": "imbalance_max",
}
_CURVE_COLUMNS = {
    "tokens": "tokens",
    "on its own": "on_its_own",
    "held out": "held_out",
    "from": "low",
    "to": "high",
}


def print_findings(findings: "list[Finding]", as_json: bool) -> None:
    """What was found, line by line; then what is missing, for what, and how to get it."""
    if as_json:
        from exflow.doctor import as_json as in_json

        print_json(in_json(findings))
        return
    there = [each for each in findings if not each.missing]
    width = max(len(each.name) for each in there)
    for each in there:
        print(f"{each.name:{width}}  {each.found}")
    for each in findings:
        if each.missing:
            print(f"missing: {each.name}, for {each.needed_for}: {each.remedy}")


def print_evaluation(result: dict[str, Any], as_json: bool) -> None:
    """A line a strategy, then locality and balance."""
    if as_json:
        print_json(result)
        return
    print(f"{result['tokens']:,} tokens on {result['ranks']} ranks; messages per token and MoE layer")
    _print_table(
        ["strategy"],
        _EVALUATION_COLUMNS,
        [
            {"strategy": name.replace("_", "-"), **each, "owners": each["owner_imbalance"]["mean"]}
            for name, each in result["strategies"].items()
        ],
    )
    imbalance = result["imbalance"]
    print(f"local fraction {result['local_fraction']:.3f} of adjacent-layer transitions stay on a rank")
    print(
        f"imbalance      {imbalance['mean']:.3f} busiest rank over mean, worst layer {imbalance['max']:.3f}"
    )
    reduced = result["strategies"]["replicated"]["all_reduce_copies"]
    print("owners         tokens of the rank that owns most over the mean, averaged over layers")
    print(f"replicated     sends no messages, its all-reduces move {reduced} rows a token and layer (ring)")


_EVALUATION_COLUMNS = {
    "messages": "messages_per_token_layer",
    "dispatch": "dispatch",
    "return": "return",
    "in node": "intra_node",
    "between": "inter_node",
    "K/V": "kv_copies",
    "owners": "owners",
    "exchanges": "exchanges_per_step",
}


def print_run(checkpoint: Path, held_out_bits_per_byte: float, as_json: bool) -> None:
    """The folder of a training run's last checkpoint; how good it is was said on the way."""
    if as_json:
        print_json({"checkpoint": str(checkpoint), "held_out_bits_per_byte": held_out_bits_per_byte})
        return
    print(checkpoint)


def print_export(done: "Exported", as_json: bool) -> None:
    """The files, the engine's options to copy, and its traps."""
    if as_json:
        result = {
            "file": str(done.path),
            "sidecar": str(done.sidecar),
            "format": done.format,
            "options": list(done.usage.options),
            "traps": list(done.usage.traps),
        }
        print_json(result)
        return
    print(f"{done.path} for {done.format}; {done.sidecar.name} keeps what it cannot say, for import-plan")
    print("\nUse it with")
    for line in done.usage.options:
        print(f"  {line}")
    print("\nMind that")
    for trap in done.usage.traps:
        print(f"- {trap}")


def print_generation(prompts: list[str], result: dict[str, Any], as_json: bool) -> None:
    """The texts on stdout; the figures of the run below them."""
    if as_json:
        print_json(result)
        return
    for prompt, text in zip(prompts, result["text"], strict=True):
        print(f"{prompt}{text}\n")
    print(
        f"{result['strategy']} on {result['ranks']} rank(s): TTFT {result['ttft_s']:.2f} s, "
        f"TPOT {result['tpot_ms']:.1f} ms, {result['tokens_per_s']:.1f} tokens/s"
    )
    if verified := result.get("verified"):
        print(
            f"verified: {verified['choices']} choices are those of one process, with logits within "
            f"{verified['largest_difference']:.1e} of the largest ({verified['tolerance']:.0e} is allowed), "
            "and the counters are what the routing comes to"
        )


def print_demo(result: dict[str, Any], as_json: bool) -> None:
    """The comparison as one table, the text once, and whether all variants agree."""
    if as_json:
        print_json(result)
        return
    _print_table(["strategy", "placement"], _DEMO_COLUMNS, result["variants"])
    print(_DEMO_LEGEND)
    print()
    print(result["summary"])
    print()
    for text in result["text"]:
        print(f"| {text}".replace("\n", "\n| "))
    print()
    print(result["verdict"])


_DEMO_COLUMNS = {
    "msgs": "messages_per_token_layer",
    "bytes": "critical_bytes_per_token_layer",
    "K/V": "background_bytes_per_token_layer",
    "local": "local_fraction",
    "imbal": "imbalance",
    "a2a": "all_to_alls_per_step",
    "gat": "gathers_per_step",
    "red": "all_reduces_per_step",
    "tok/s": "tokens_per_s",
}
_DEMO_LEGEND = """\
msgs, bytes  hidden states that cross between ranks on the critical path, per token and MoE layer
K/V          bytes of keys and values shared in the background, per token and MoE layer
local        share of adjacent-layer transitions that stay on a rank
imbal        busiest rank's load over the mean, averaged over layers
a2a gat red  all-to-alls, gathers and all-reduces in a decode step"""


def print_decode_bench(result: dict[str, Any], as_json: bool) -> None:
    """The table, why rows of it are empty, and what `auto` would take."""
    if as_json:
        print_json(result)
        return
    print(
        f"{result['model']} in {result['dtype']} ({result['weights']} weights) on {result['ranks']} rank(s), "
        f"{result['hardware']}; {result['context']} positions, {result['steps']} steps"
    )
    rows = [
        {name: "-" if value is None else value for name, value in row.items()} | {"batch": str(row["batch"])}
        for row in result["rows"]
    ]
    measured = {"x floor": "times_floor"} if any(row["times_floor"] for row in result["rows"]) else {}
    _print_table(
        ["strategy", "transport", "placement", "batch"], _DECODE_BENCH_COLUMNS | measured, rows, width=200
    )
    print(_DECODE_BENCH_LEGEND)
    for row in result["rows"]:
        if row["stopped"]:
            print(f"{_case(row)}: {row['stopped']}")
    for case in result["auto"]:
        clock = "not measured" if case["tpot_ms"] is None else f"{_readable(case['tpot_ms'])} ms measured"
        print(f"auto: {_case(case)}, {_readable(case['predicted_ms'])} ms predicted, {clock}")


def _case(row: dict[str, Any]) -> str:
    return f"{row['strategy']}, {row['transport']}, {row['placement']}, batch {row['batch']}"


def print_simulation(result: dict[str, Any], as_json: bool) -> None:
    """A table of all sizes; below it what is fastest on each, and from where on another strategy would be."""
    if as_json:
        print_json(result)
        return
    rows = [
        {"gpus": str(size["gpus"]), "ep": str(size["expert_parallel"])}
        | row
        | {"step_ms": row["step_ms"] if row["fits"] else "no room"}
        for size in result["sizes"]
        for row in size["steps"]
    ]
    print(f"{result['model']}, {result['context']} positions of context; predicted, not measured")
    _print_table(["gpus", "ep", "strategy", "placement"], _SIMULATION_COLUMNS, rows, width=200)
    print(_SIMULATION_LEGEND)
    for size in result["sizes"]:
        fastest = "none fits" if size["fastest"] is None else ", ".join(size["fastest"])
        print(f"{size['gpus']} GPUs in groups of {size['expert_parallel']}: {fastest}")
        for turn in size["turns"]:
            way, then = ("up" if turn["factor"] > 1 else "down"), turn["strategy"] or "none fits"
            print(f"    {turn['quantity']} {_readable(turn['value'])} {turn['unit']} and {way}: {then}")
    for note in result["notes"]:
        print(f"note: {note}")


_SIMULATION_COLUMNS = {
    "step ms": "step_ms",
    "exchange": "exchange_ms",
    "compute": "compute_ms",
    "K/V": "background_ms",
    "tokens/s": "tokens_per_s",
    "a GPU": "tokens_per_s_per_gpu",
    "GB": "memory_gb",
}
_SIMULATION_LEGEND = """\
ep   GPUs of an expert-parallel group; there are as many groups as the GPUs make
K/V  milliseconds of sharing keys and values that computing does not hide; GB a GPU needs"""


_DECODE_BENCH_COLUMNS = {
    "TPOT ms": "tpot_ms",
    "p99 ms": "p99_ms",
    "tokens/s": "tokens_per_s",
    "critical B": "critical_bytes_per_step",
    "backgr. B": "background_bytes_per_step",
    "x first": "speedup",
}
_DECODE_BENCH_LEGEND = """\
critical B, backgr. B  bytes that a rank sends in a step: hidden states; keys and values
x first                times as fast as the first row of the same batch"""


def _print_table(
    names: list[str], columns: dict[str, str], lines: list[dict[str, Any]], width: int | None = None
) -> None:
    """One row a line: its entries `names` as they are, then under each heading the figure of that key.

    width: characters at most; by default those of the terminal.
    """
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for line in lines:
        table.add_row(*(line[name] for name in names), *(_readable(line[key]) for key in columns.values()))
    Console(width=width).print(table)


def _readable(value: Any) -> str:
    """Four significant digits; large numbers whole; a figure with an interval as `value (low to high)`."""
    if isinstance(value, dict) and value.keys() == {"value", "low", "high"}:
        return "{} ({} to {})".format(*(_readable(value[key]) for key in ("value", "low", "high")))
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    return str(value)

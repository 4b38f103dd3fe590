"""Results of place and evaluate: figures of a plan, and tables of its traffic."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exflow.cli.tables import print_figures, print_json, print_table
from exflow.console import note

if TYPE_CHECKING:
    from exflow.commands.place import Placement
    from exflow.placement.plan.plan import Plan


def print_placements(results: "dict[str, Placement]", outputs: dict[str, Path | None], as_json: bool) -> None:
    """Print the placement of each phase; a phase is named where there are several."""
    if as_json:
        shown = {phase: _as_json(result, outputs[phase]) for phase, result in results.items()}
        print_json(shown if len(shown) > 1 else next(iter(shown.values())))
        return
    for phase, result in results.items():
        if len(results) > 1:
            print(f"phase {phase}")
        _print_placement(result, outputs[phase])


def _as_json(result: "Placement", output: Path | None) -> dict[str, Any]:
    figures = {} if output is None else {"plan": str(output), **plan_figures(result.plan)}
    tables = {
        "pareto": result.pareto,
        "learning_curve": result.learning_curve,
        "verdict": result.verdict,
        "messages_by_trace": result.by_trace,
        "notes": result.notes,
    }
    return figures | {name: table for name, table in tables.items() if table is not None}


def _print_placement(result: "Placement", output: Path | None) -> None:
    """Print the figures of the plan, then the requested tables, notes, and what was gained."""
    if output is not None:
        figures = {"plan": str(output), **plan_figures(result.plan)}
        print_figures(_flat(figures) | (result.by_trace or {}), as_json=False)
    for rows, columns in ((result.pareto, _PARETO_COLUMNS), (result.learning_curve, _CURVE_COLUMNS)):
        if rows is not None:
            print_table([], columns, rows)
    if result.verdict is not None:
        print(result.verdict)
    for each in result.notes:
        note(each)
    expected = result.plan.expected
    if "time" in expected:
        held_out = expected.get("held_out", {}).get("time")
        judged = "on held-out tokens" if held_out else "on the tokens placed on (judge a plan with --holdout)"
        print_times(held_out or expected["time"], expected["made_for"], judged)


def print_times(times: dict[str, Any], made_for: dict[str, Any], judged: str) -> None:
    """Print a plan beside its references; the last line is its gain over experts in order."""
    rows = {"this plan": times, **times["references"]}
    slowest = times["references"]["contiguous"]["step_us"]
    attention = {"attention": "attention_us"} if times["attention_us"] else {}
    between = {"between nodes": "node_link_rows"} if times["node_link_rows"] else {}
    table = [{"placement": name, **row, "ratio": row["step_us"] / slowest} for name, row in rows.items()]
    print_table(["placement"], _TIMES | attention | _REASONS | between, table)
    print(_TIME_LEGEND + (_BETWEEN_LEGEND if between else ""))
    gain = 100 * (1 - times["ratio_to_contiguous"])
    what = f"{abs(gain):.1f}% {'less' if gain >= 0 else 'more'} time than experts in order"
    print(
        f"for {made_for['target']}, {made_for['strategy']}, on {made_for['machine']}, with "
        f"{made_for['model']}, {made_for['batch']} tokens a GPU"
    )
    print(f"{what} {judged}")


_TIMES = {
    "of contiguous": "ratio",
    "step us": "step_us",
    "exchange": "exchange_us",
    "experts": "experts_us",
}
_REASONS = {
    "busiest link": "busiest_link_rows",
    "imbalance": "compute_imbalance",
    "messages": "messages",
}
_TIME_LEGEND = """\
of contiguous time of a step, divided by that of experts in order
step us       predicted microseconds of all MoE layers in a decode step, and their parts
busiest link  rows in or out of the GPU with most, per token of a GPU and layer
imbalance     (token, expert) pairs of the busiest GPU over the mean, in a batch
messages      hidden states sent, per token and layer"""
_BETWEEN_LEGEND = """
between nodes rows over the busiest link between nodes, per token of a GPU and layer"""


def _flat(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures that are not in the table of times."""
    return {
        name: figure for name, figure in figures.items() if name not in ("time", "held_out_time", "made_for")
    }


def plan_figures(plan: "Plan") -> dict[str, Any]:
    """Figures of a plan: solver, bounds, and the traffic of every strategy."""
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
        **{name: plan.expected[name] for name in ("made_for", "time") if name in plan.expected},
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


def print_evaluation(result: dict[str, Any], as_json: bool) -> None:
    """Print a line for each strategy, then locality and balance."""
    if as_json:
        print_json(result)
        return
    print(f"{result['tokens']:,} tokens on {result['ranks']} ranks; messages per token and MoE layer")
    print_table(
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
    print()
    print_times(result["time"], result["made_for"], "on this trace")


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

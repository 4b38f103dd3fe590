"""From traces, or loads, to a plan, and what the plan comes to: place, balance, evaluate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exflow.cli.tables import _print_table, print_json

if TYPE_CHECKING:
    from exflow.commands.place import Placement
    from exflow.placement.plan.plan import Plan

from typing import Annotated

import typer

from exflow.cli.options import METHODS, OWNED, Json, NewPlan, Nodes, Phase, PlanFile, Trace, examples, one_of
from exflow.cli.tables import print_figures
from exflow.console import TimedWork, Work
from exflow.errors import InputError
from exflow.files import check_writable
from exflow.job.signals import ctrl_c_ends_the_search

verbs = typer.Typer()
_WHERE, _WHAT, _HOW, _TRUST = "Where experts can live", "What is good", "How to search", "How far to trust it"


@verbs.command(
    epilog=examples(
        "exflow place trace/ --gpus 8 --nodes 2 -o plan.json",
        "exflow place code/ law/ --worst-case --topology cluster.yaml --redundant-experts 8 -o plan.json",
        "exflow place new/ --gpus 8 --from plan.json --max-moves 64 -o next.json",
    )
)
def place(
    traces: Annotated[list[Path], typer.Argument(help="Folders of routing traces.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File of the plan; may be left out with --pareto.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs in all.", min=1, rich_help_panel=_WHERE)] = None,
    nodes: Annotated[
        int, typer.Option(help="Nodes they are spread over.", min=1, rich_help_panel=_WHERE)
    ] = 1,
    topology: Annotated[
        Path | None,
        typer.Option(help="YAML file of GPUs and links, instead of --gpus.", rich_help_panel=_WHERE),
    ] = None,
    redundant_experts: Annotated[
        int,
        typer.Option(help="Slots a layer for replicas of hot experts.", min=0, rich_help_panel=_WHERE),
    ] = 0,
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="GiB a GPU has for experts; with --expert-size.", min=0, rich_help_panel=_WHERE),
    ] = None,
    expert_size: Annotated[
        float | None, typer.Option(help="MiB of one expert of one layer.", min=0, rich_help_panel=_WHERE)
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="Whose messages count: coherent, node-coherent, or dispatch-combine (other engines).",
            autocompletion=one_of(OWNED),
            rich_help_panel=_WHAT,
        ),
    ] = "coherent",
    balance_price: Annotated[
        float,
        typer.Option(
            help="Messages per token and layer that a unit of imbalance is worth.",
            min=0,
            rich_help_panel=_WHAT,
        ),
    ] = 0.3,
    max_imbalance: Annotated[
        float | None,
        typer.Option(
            help="In every layer, the busiest GPU's load over the mean load at most; from 1 up.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    owner_price: Annotated[
        float,
        typer.Option(
            help="The same for the tokens that a GPU owns: it attends to them, and sends them out.",
            min=0,
            rich_help_panel=_WHAT,
        ),
    ] = 0.0,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="How much each trace counts; by default its tokens.", rich_help_panel=_WHAT),
    ] = None,
    worst_case: Annotated[
        bool,
        typer.Option("--worst-case", help="Best for the trace where it is worst.", rich_help_panel=_WHAT),
    ] = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="A plan in use to start from; with --max-moves.", rich_help_panel=_WHAT),
    ] = None,
    max_moves: Annotated[
        int | None,
        typer.Option(help="Experts that may change their GPU, in all.", min=0, rich_help_panel=_WHAT),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="auto, exact, search, sweep, ilp; or contiguous, random, load-only.",
            autocompletion=one_of(METHODS),
            rich_help_panel=_HOW,
        ),
    ] = "auto",
    time_limit: Annotated[
        float, typer.Option(help="Seconds to search at most.", min=0.1, rich_help_panel=_HOW)
    ] = 30.0,
    seed: Annotated[int, typer.Option(help="Of the search.", min=0, rich_help_panel=_HOW)] = 0,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Share of the sequences to judge the plan on, not to make it.", rich_help_panel=_TRUST
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="Show what balance costs, price by price.", rich_help_panel=_TRUST),
    ] = False,
    learning_curve: Annotated[
        bool,
        typer.Option(
            "--learning-curve", help="Show whether enough tokens were profiled.", rich_help_panel=_TRUST
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Decide on which GPU each expert lives."""
    from exflow.commands.place import PlaceJob, Where, run_place
    from exflow.placement.make_plan import Solving
    from exflow.placement.solve.objective import Objective

    if output is not None:
        check_writable(output)
    elif not (pareto or learning_curve):
        raise InputError("--output is missing: name the file of the plan")
    solves = 2 if learning_curve else 1  # each within the limit
    with TimedWork("placing", solves * time_limit) as work, ctrl_c_ends_the_search():
        result = run_place(
            PlaceJob(
                traces=traces,
                where=Where(gpus, nodes, topology, redundant_experts, gpu_memory, expert_size),
                objective=Objective(strategy, balance_price, max_imbalance, owner_price),  # type: ignore[arg-type]
                solving=Solving(method, seed, time_limit),
                weights=weight,
                worst_case=worst_case,
                start=start,
                max_moves=max_moves,
                holdout=holdout,
                pareto=pareto,
                learning_curve=learning_curve,
            ),
            work.tell,
        )
        if output is not None:
            result.plan.save(output)
    print_placement(result, output, as_json)


@verbs.command(
    epilog=examples(
        "exflow balance expert_distribution_recorder_*.pt --gpus 8 --nodes 2 -o plan.json",
    )
)
def balance(
    files: Annotated[list[Path], typer.Argument(help="SGLang's stat files, or JSON.", show_default=False)],
    output: NewPlan,
    gpus: Annotated[int, typer.Option(help="GPUs in all.", min=1)],
    nodes: Nodes = 1,
    redundant_experts: Annotated[
        int, typer.Option(help="Slots of a layer beyond one for each expert.", min=0)
    ] = 0,
    model: Annotated[str, typer.Option(help="The model's name, for the plan.")] = "",
    as_json: Json = False,
) -> None:
    """Place by loads alone, for engines that count and do not record; affinity needs import and place."""
    from exflow.commands.balance import run_balance
    from exflow.placement.plan.topology import topology_of

    check_writable(output)
    with Work("balancing", "files") as work:
        where = topology_of(gpus, nodes)
        figures = run_balance(files, where, redundant_experts, model, output, work.advance)
    print_figures(figures, as_json)


@verbs.command(
    epilog=examples(
        "exflow evaluate plan.json trace/", "exflow evaluate plan.json run/ --phase decode --json"
    )
)
def evaluate(
    plan: PlanFile,
    trace: Trace,
    phase: Phase = "all",
    as_json: Json = False,
) -> None:
    """Count what a plan moves on a trace, for every strategy."""
    from exflow.placement.plan.plan import Plan
    from exflow.placement.traffic.evaluate import evaluate
    from exflow.profiling.trace import RoutingTrace

    with Work("counting"):
        figures = evaluate(Plan.load(plan), RoutingTrace.load(trace).of_phase(phase))
    print_evaluation(figures, as_json)


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

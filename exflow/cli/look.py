"""Verbs that judge a plan before it is deployed: report, simulate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from exflow.cli.options import LOOKING, Json, Nodes, Phase, TopologyFile, Trace, examples
from exflow.cli.tables import print_figures, print_json, print_table, readable
from exflow.console import Work
from exflow.files import check_writable
from exflow.job.signals import ctrl_c_ends_the_search

verbs = typer.Typer()
_TIMES, _CLUSTER, _LOAD = "Predicted times", "Cluster", "Load"


@verbs.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "exflow report trace/ plan.json -o report.html",
        "exflow report trace/ plan.json other.json --model configs/shapes/gpt-oss-20b -o report.html",
    ),
)
def report(
    trace: Trace,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.", show_default=False)],
    plans: Annotated[
        list[Path] | None,
        typer.Argument(help="Plan files to compare with experts in order.", show_default=False),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder to write the drawings to as well, as SVG files.")
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="Number of GPUs to compare on.", show_default="those of the plans", min=1),
    ] = None,
    nodes: Nodes = 1,
    topology: TopologyFile = None,
    phase: Phase = "all",
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the model's config.json, to predict times of decode steps too.",
            rich_help_panel=_TIMES,
        ),
    ] = None,
    batch: Annotated[
        int, typer.Option(help="Sequences decoded at a time, on all GPUs.", min=1, rich_help_panel=_TIMES)
    ] = 64,
    context: Annotated[
        int,
        typer.Option(help="Tokens already in each sequence's cache.", min=1, rich_help_panel=_TIMES),
    ] = 1024,
    machine: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of the speeds of GPUs and links.",
            show_default="H200 GPUs",
            rich_help_panel=_TIMES,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a self-contained HTML page that shows a trace and compares plans for it."""
    from exflow.commands.place import Where
    from exflow.commands.report import ReportJob, run_report

    check_writable(output)
    if figures is not None:
        check_writable(figures / "drawing.svg")
    where = Where(gpus, nodes, topology)
    job = ReportJob(trace, plans or [], output, phase, where, figures, model, batch, context, machine)
    with Work("reporting", "steps") as work:

        def advance(what: str, done: int, total: int) -> None:
            work.tell(what)
            work.advance(done, total)

        written = run_report(job, advance)
    summary = {"report": str(output), "bytes": written.page_bytes, "figures": written.figures}
    print_figures(summary | written.report.as_json() if as_json else summary, as_json)


@verbs.command(
    rich_help_panel=LOOKING,
    epilog=examples(
        "exflow simulate trace/ --model configs/shapes/gpt-oss-20b --gpus 32 --expert-parallel 8 "
        "--expert-parallel 32",
        "exflow simulate trace/ plan.json --model configs/shapes/gpt-oss-20b --batch 256",
        "exflow simulate trace/ --model shape/ --machine configs/machines/a100-hdr.yaml --gpus-per-node 4 "
        "--gpus 64 --figures drawings/",
    ),
)
def simulate(
    trace: Trace,
    model: Annotated[Path, typer.Option(help="Folder with the model's config.json.", show_default=False)],
    plans: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Plan files. Without them, placements are made from the trace.", show_default=False
        ),
    ] = None,
    gpus: Annotated[
        list[int] | None,
        typer.Option(
            help="Number of GPUs in all. Repeatable.",
            show_default="those of the plans",
            min=1,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    gpus_per_node: Annotated[
        int,
        typer.Option(help="GPUs of each node, where no plan says it.", min=1, rich_help_panel=_CLUSTER),
    ] = 8,
    expert_parallel: Annotated[
        list[int] | None,
        typer.Option(
            help="Expert-parallel size. Further GPUs are data-parallel copies. Repeatable.",
            show_default="all GPUs",
            min=1,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Sequences decoded at a time, on all GPUs together.",
            show_default="from --batch-per-gpu",
            min=1,
            rich_help_panel=_LOAD,
        ),
    ] = None,
    batch_per_gpu: Annotated[
        int | None,
        typer.Option(
            help="Sequences decoded at a time, per GPU.", show_default="64", min=1, rich_help_panel=_LOAD
        ),
    ] = None,
    context: Annotated[
        int, typer.Option(help="Tokens already in each sequence's cache.", min=1, rich_help_panel=_LOAD)
    ] = 1024,
    machine: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of the speeds of GPUs and links.",
            show_default="H200 GPUs",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds to search for each placement at most.", min=0.1)
    ] = 10.0,
    phase: Phase = "all",
    figures: Annotated[
        Path | None, typer.Option(help="Folder to write curves over the number of GPUs to, as SVG files.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict decode-step times on clusters that you do not have, for each strategy and placement."""
    from exflow.commands.simulate import SimulateJob, run_simulate
    from exflow.report.scaling import write_scaling

    if figures is not None:
        check_writable(figures / "drawing.svg")
    job = SimulateJob(
        trace=trace,
        model=model,
        plans=plans or [],
        gpus=gpus or [],
        gpus_per_node=gpus_per_node,
        widest=expert_parallel or [],
        batch=batch,
        batch_per_gpu=batch_per_gpu,
        context=context,
        machine=machine,
        time_limit=time_limit,
        phase=phase,
    )
    with Work("simulating") as work, ctrl_c_ends_the_search():
        result = run_simulate(job, work.tell).as_json()
    if figures is not None:
        write_scaling(result["sizes"], figures)
    print_simulation(result, as_json)


def print_simulation(result: dict[str, Any], as_json: bool) -> None:
    """Print a table of all sizes, then the fastest of each and the changes that would make another faster."""
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
    print_table(["gpus", "ep", "strategy", "placement"], _SIMULATION_COLUMNS, rows)
    print(_SIMULATION_LEGEND)
    for size in result["sizes"]:
        best = size["fastest"]
        said = "nothing fits" if best is None else f"{best[0]} with placement {best[1]} is fastest"
        print(f"{size['gpus']} GPUs, expert-parallel size {size['expert_parallel']}: {said}")
        for turn in size["turns"]:
            way, then = ("above" if turn["factor"] > 1 else "below"), turn["strategy"] or "nothing fits"
            print(f"    {then} if {turn['quantity']} is {way} {readable(turn['value'])} {turn['unit']}")
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
ep        expert-parallel size; further GPUs are data-parallel copies
exchange  milliseconds of moving hidden states; K/V: of keys and values, as far as computing does not hide it
a GPU     tokens per second and GPU; GB: memory that a GPU needs"""

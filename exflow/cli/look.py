"""A trace and plans for it, to look at before deploying: report, simulate."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exflow.cli.tables import _print_table, _readable, print_json

if TYPE_CHECKING:
    pass

from typing import Annotated

import typer

from exflow.cli.options import Json, Nodes, Phase, TopologyFile, Trace, examples
from exflow.cli.tables import print_figures
from exflow.console import Work
from exflow.files import check_writable
from exflow.job.signals import ctrl_c_ends_the_search

verbs = typer.Typer()
_TIMES = "Predicted times"


@verbs.command(
    epilog=examples(
        "exflow report trace/ plan.json -o report.html",
        "exflow report trace/ plan.json other.json --model configs/shapes/gpt-oss-20b -o report.html",
    )
)
def report(
    trace: Trace,
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the page.")],
    plans: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of plans, beside the contiguous one.", show_default=False),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder to write each drawing to as well, as SVG (there is no PNG).")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs to judge by, instead of the plans' own; or without plans.", min=1)
    ] = None,
    nodes: Nodes = 1,
    topology: TopologyFile = None,
    phase: Phase = "all",
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a checkpoint, or of a config.json alone: to predict times of decode steps.",
            rich_help_panel=_TIMES,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences of the job.", min=1, rich_help_panel=_TIMES)] = 64,
    context: Annotated[
        int, typer.Option(help="Positions that each has already.", min=1, rich_help_panel=_TIMES)
    ] = 1024,
    machine: Annotated[
        Path | None,
        typer.Option(help="YAML file of the machine, by default of H200s.", rich_help_panel=_TIMES),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained page about a trace and plans for it, to look at before deploying."""
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
    epilog=examples(
        "exflow simulate trace/ --model configs/shapes/gpt-oss-20b --gpus 32 --expert-parallel 8 "
        "--expert-parallel 32",
        "exflow simulate trace/ plan.json --model configs/shapes/gpt-oss-20b --batch 256",
        "exflow simulate trace/ --model shape/ --machine configs/machines/a100-hdr.yaml --gpus-per-node 4 "
        "--gpus 64 --figures drawings/",
    )
)
def simulate(
    trace: Trace,
    model: Annotated[
        Path, typer.Option(help="Folder of a checkpoint, or of a config.json alone.", show_default=False)
    ],
    plans: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of plans; without them placements are made.", show_default=False),
    ] = None,
    gpus: Annotated[
        list[int] | None, typer.Option(help="GPUs in all; by default the plans' own. Repeatable.", min=1)
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node, without plans.", min=1)] = 8,
    expert_parallel: Annotated[
        list[int] | None,
        typer.Option(
            help="GPUs that share all experts at most; more GPUs are further such groups. Repeatable.", min=1
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of the whole job.", min=1)] = None,
    batch_per_gpu: Annotated[
        int | None, typer.Option(help="Sequences of a GPU, instead; by default 64.", min=1)
    ] = None,
    context: Annotated[int, typer.Option(help="Positions that each has already.", min=1)] = 1024,
    machine: Annotated[
        Path | None, typer.Option(help="YAML file of the machine, by default of H200s.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds to search for each placement at most.", min=0.1)
    ] = 10.0,
    phase: Phase = "all",
    figures: Annotated[Path | None, typer.Option(help="Folder for curves over the GPUs, as SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Predict decode steps on clusters that you do not have, strategy by strategy."""
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

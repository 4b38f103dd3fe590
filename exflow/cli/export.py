"""Plans for other engines, and theirs for us: export, import-plan."""

from pathlib import Path
from typing import TYPE_CHECKING

from exflow.cli.tables import print_json

if TYPE_CHECKING:
    from exflow.placement.formats.exporters.registry import Exported

from typing import Annotated

import typer

from exflow.cli.options import PLAN_FORMATS, Json, NewPlan, Nodes, PlanFile, TopologyFile, examples, one_of
from exflow.cli.tables import print_figures

verbs = typer.Typer()


@verbs.command(epilog=examples("exflow export plan.json --format sglang -o placement.json"))
def export(
    plan: PlanFile,
    format: Annotated[
        str,
        typer.Option(
            help="sglang, trtllm, vllm-ascend, vllm, eplb, or exflow.",
            autocompletion=one_of(PLAN_FORMATS),
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the engine.")],
    as_json: Json = False,
) -> None:
    """Write a plan for another engine, and say how to use it."""
    from exflow.commands.export import run_export

    print_export(run_export(plan, format, output), as_json)


@verbs.command(
    "import-plan",
    epilog=examples(
        "exflow import-plan placement.json -o plan.json",
        "exflow import-plan moe.yaml --trace trace/ --gpus 8 -o plan.json",
    ),
)
def import_plan(
    file: Annotated[Path, typer.Argument(help="A placement in an engine's format.", show_default=False)],
    output: NewPlan,
    format: Annotated[
        str | None,
        typer.Option(
            help="As of export; by default told from the content.", autocompletion=one_of(PLAN_FORMATS)
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Folder of a trace of the model; by default FILE.meta.json tells.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs in all, where nothing tells.", min=1)] = None,
    nodes: Nodes = 1,
    topology: TopologyFile = None,
    as_json: Json = False,
) -> None:
    """Make a plan of another engine's placement, to evaluate it or to run it."""
    from exflow.commands.export import given_topology, run_import_plan

    where = given_topology(gpus, nodes, topology)
    print_figures(run_import_plan(file, format, trace, where, output), as_json)


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

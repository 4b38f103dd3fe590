"""Verbs that exchange plans with other engines: export, import-plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from exflow.cli.options import (
    ENGINES,
    PLAN_FORMATS,
    Json,
    NewPlan,
    Nodes,
    PlanFile,
    TopologyFile,
    examples,
    one_of,
)
from exflow.cli.tables import print_figures, print_json
from exflow.console import note

if TYPE_CHECKING:
    from exflow.placement.formats.exporters.registry import Exported

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=ENGINES,
    epilog=examples("exflow export plan.json --format sglang -o placement.json"),
)
def export(
    plan: PlanFile,
    format: Annotated[
        str,
        typer.Option(
            help="Engine to write for: sglang, trtllm, vllm-ascend, vllm, eplb, or exflow.",
            autocompletion=one_of(PLAN_FORMATS),
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Placement file to write.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Write a plan in another engine's format, and print the options to start the engine with.

    These engines dispatch and combine, so make the plan with exflow place --for ENGINE.
    """
    from exflow.commands.export import run_export

    print_export(run_export(plan, format, output), as_json)


@verbs.command(
    "import-plan",
    rich_help_panel=ENGINES,
    epilog=examples(
        "exflow import-plan placement.json -o plan.json",
        "exflow import-plan moe.yaml --trace trace/ --gpus 8 -o plan.json",
    ),
)
def import_plan(
    file: Annotated[Path, typer.Argument(help="Placement file of another engine.", show_default=False)],
    output: NewPlan,
    format: Annotated[
        str | None,
        typer.Option(
            help="Format of the file, one of those that exflow export writes.",
            show_default="recognised from the content",
            autocompletion=one_of(PLAN_FORMATS),
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Trace folder of the same model.", show_default="FILE.meta.json describes the model"
        ),
    ] = None,
    gpus: Annotated[
        int | None,
        typer.Option(help="Number of GPUs in all.", show_default="as FILE.meta.json or the file says", min=1),
    ] = None,
    nodes: Nodes = 1,
    topology: TopologyFile = None,
    as_json: Json = False,
) -> None:
    """Turn the placement of another engine into a plan, to evaluate it or to run it."""
    from exflow.commands.export import given_topology, run_import_plan

    where = given_topology(gpus, nodes, topology)
    print_figures(run_import_plan(file, format, trace, where, output), as_json)


def print_export(done: "Exported", as_json: bool) -> None:
    """Print the files, the engine's options to copy, and its traps; the warning goes to stderr."""
    if done.warning:
        note(done.warning)
    if as_json:
        result = {
            "file": str(done.path),
            "sidecar": str(done.sidecar),
            "format": done.format,
            "options": list(done.usage.options),
            "traps": list(done.usage.traps),
            "warning": done.warning,
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

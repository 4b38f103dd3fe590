"""The verb that judges a plan on a trace: evaluate."""

from typing import Annotated

import typer

from exflow.cli.options import PLACING, Json, Phase, PlanFile, Trace, examples
from exflow.cli.placement_tables import print_evaluation
from exflow.console import Work

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=PLACING,
    epilog=examples(
        "exflow evaluate plan.json trace/",
        "exflow evaluate plan.json run/ --phase decode --machine h200 --model gpt-oss-20b --json",
    ),
)
def evaluate(
    plan: PlanFile,
    trace: Trace,
    phase: Phase = "all",
    machine: Annotated[
        str | None,
        typer.Option(
            help="Hardware that runs the plan: a name in configs/machines, or a YAML file.",
            show_default="what the plan was made for, else h200",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose sizes count: a name in configs/shapes, or a folder with config.json.",
            show_default="the model that the trace names",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Tokens of each GPU in a decode step.",
            min=1,
            show_default="what the plan was made for, else 64",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Count the messages and the load of a plan on a trace, and predict the time of a step."""
    from exflow.commands.evaluate import run_evaluate

    with Work("counting"):
        figures = run_evaluate(plan, trace, phase, machine, model, batch)
    print_evaluation(figures, as_json)

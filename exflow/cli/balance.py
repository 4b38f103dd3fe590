"""The verb that makes a plan from counts of tokens alone: balance."""

from pathlib import Path
from typing import Annotated

import typer

from exflow.cli.options import PLACING, REDUNDANT, Json, NewPlan, Nodes, examples
from exflow.cli.tables import print_figures
from exflow.console import Work
from exflow.files import check_writable

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=PLACING,
    epilog=examples("exflow balance expert_distribution_recorder_*.pt --gpus 8 --nodes 2 -o plan.json"),
)
def balance(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Expert counts: files of SGLang's recorder in mode stat, or JSON.", show_default=False
        ),
    ],
    output: NewPlan,
    gpus: Annotated[int, typer.Option(help="Number of GPUs in all.", min=1, show_default=False)],
    nodes: Nodes = 1,
    redundant_experts: Annotated[int, typer.Option(help=REDUNDANT, min=0)] = 0,
    model: Annotated[str, typer.Option(help="Model name to store in the plan.")] = "",
    as_json: Json = False,
) -> None:
    """Balance expert load alone, from counts; use place where there is a trace."""
    from exflow.commands.balance import run_balance
    from exflow.placement.plan.topology import topology_of

    check_writable(output)
    with Work("balancing", "files") as work:
        where = topology_of(gpus, nodes)
        figures = run_balance(files, where, redundant_experts, model, output, work.advance)
    print_figures(figures, as_json)

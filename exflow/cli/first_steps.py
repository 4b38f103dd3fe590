"""Verbs to begin with: train, doctor, demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exflow.cli.options import STARTING, Device, Json, Texts, examples
from exflow.cli.tables import print_json, print_table
from exflow.cli.training import TrainingLog
from exflow.console import Work

if TYPE_CHECKING:
    from exflow.commands.doctor import Finding

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=STARTING,
    epilog=examples(
        "exflow train configs/gpt-moe-demo.yaml --text corpus/ -o runs/demo",
        "exflow train configs/gpt-moe-demo.yaml --text corpus/ -o runs/demo --resume",
    ),
)
def train(
    config: Annotated[
        Path,
        typer.Argument(help="YAML file with model, data, training and checkpoint_steps.", show_default=False),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write checkpoints to.", show_default=False)
    ],
    text: Texts = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last saved step.")] = False,
    as_json: Json = False,
) -> None:
    """Train a small Mixture-of-Experts model on text."""
    from exflow.model.device import choose_device
    from exflow.train.config import load_train_config
    from exflow.train.loop import train

    settings = load_train_config(config)
    data = settings.data.model_copy(update={"texts": settings.data.texts + (text or [])})
    with TrainingLog(settings.training.steps) as log:
        final = train(
            settings.model_copy(update={"data": data}), output, choose_device(device), resume, log.report
        )
    print_run(final, log.held_out_bits_per_byte, as_json)


@verbs.command(rich_help_panel=STARTING, epilog=examples("exflow doctor", "exflow doctor --json"))
def doctor(as_json: Json = False) -> None:
    """Check what this machine can run, and what is missing."""
    from exflow.commands.doctor import examine

    findings = examine()
    print_findings(findings, as_json)
    if any(each.missing and each.required for each in findings):
        raise typer.Exit(1)


@verbs.command(rich_help_panel=STARTING, epilog=examples("exflow demo", "exflow demo --text README.md"))
def demo(
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder.", show_default="the shipped model")
    ] = None,
    text: Texts = None,
    as_json: Json = False,
) -> None:
    """Profile, place and generate with a small model on 4 CPU processes, and compare the traffic."""
    from exflow.commands.demo import demo, shipped_model

    with Work("demo") as work:
        result = demo(model or shipped_model(), text or [], work.tell)
    print_demo(result, as_json)


def print_findings(findings: "list[Finding]", as_json: bool) -> None:
    """Print what was found, then each missing part with its use and remedy."""
    if as_json:
        from exflow.commands.doctor import as_json as in_json

        print_json(in_json(findings))
        return
    there = [each for each in findings if not each.missing]
    width = max(len(each.name) for each in there)
    for each in there:
        print(f"{each.name:{width}}  {each.found}")
    for each in findings:
        if each.missing:
            print(f"missing: {each.name}, for {each.needed_for}: {each.remedy}")


def print_run(checkpoint: Path, held_out_bits_per_byte: float, as_json: bool) -> None:
    """Print the folder of the last checkpoint; its quality was noted during training."""
    if as_json:
        print_json({"checkpoint": str(checkpoint), "held_out_bits_per_byte": held_out_bits_per_byte})
        return
    print(checkpoint)


def print_demo(result: dict[str, Any], as_json: bool) -> None:
    """Print the comparison as a table, its summary, the generated text, and whether all variants agree."""
    if as_json:
        print_json(result)
        return
    rows = [_demo_row(each) for each in result["variants"]]
    print_table(["strategy", "placement"], _DEMO_COLUMNS, rows)
    print(_DEMO_LEGEND)
    print()
    print(result["summary"])
    print()
    for text in result["text"]:
        print(f"| {text}".replace("\n", "\n| "))
    print()
    print(result["verdict"])


def _demo_row(variant: dict[str, Any]) -> dict[str, Any]:
    """A variant's figures, with its collectives in words, and `-` if it sends no messages."""
    counts = {name: variant[f"{name.replace('-', '_')}_per_step"] for name in _COLLECTIVES}
    used = [f"{count:g} {name}" for name, count in counts.items() if count]
    sends = bool(counts["all-to-alls"])
    return {
        **variant,
        "messages": variant["messages_per_token_layer"] if sends else "-",
        "collectives": ", ".join(used),
    }


_COLLECTIVES = ("all-to-alls", "gathers", "all-reduces")

_DEMO_COLUMNS = {
    "messages": "messages",
    "bytes": "critical_bytes_per_token_layer",
    "K/V bytes": "background_bytes_per_token_layer",
    "busiest": "imbalance",
    "collectives": "collectives",
}


_DEMO_LEGEND = """\
messages     hidden states sent from rank to rank, per token and MoE layer
bytes        bytes that a token waits for, per token and MoE layer
K/V bytes    keys and values copied to other ranks in the background, per token and MoE layer
busiest      load of the busiest rank, divided by the mean load
collectives  collective operations in one decode step"""

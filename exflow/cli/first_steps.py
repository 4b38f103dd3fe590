"""Where to begin: a small model of one's own, this machine, the whole pipeline: train, doctor, demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exflow.cli.tables import _print_table, print_json

if TYPE_CHECKING:
    from exflow.commands.doctor import Finding

from typing import Annotated

import typer

from exflow.cli.options import Device, Json, Texts, examples
from exflow.cli.training import TrainingLog
from exflow.console import Work

verbs = typer.Typer()


@verbs.command(
    epilog=examples(
        "exflow train configs/gpt-moe-demo.yaml --text corpus/ -o runs/demo",
        "exflow train configs/gpt-moe-demo.yaml --text corpus/ -o runs/demo --resume",
    )
)
def train(
    config: Annotated[Path, typer.Argument(help="YAML file: model, data, training, checkpoint_steps.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    text: Texts = None,
    device: Device = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last saved step.")] = False,
    as_json: Json = False,
) -> None:
    """Train a small GPT-MoE from text."""
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


@verbs.command(epilog=examples("exflow doctor", "exflow doctor --json"))
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, and what is missing for what."""
    from exflow.commands.doctor import examine

    findings = examine()
    print_findings(findings, as_json)
    if any(each.missing and each.required for each in findings):
        raise typer.Exit(1)


@verbs.command(epilog=examples("exflow demo", "exflow demo --text README.md"))
def demo(
    model: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint; by default the shipped one.")
    ] = None,
    text: Texts = None,
    as_json: Json = False,
    rank_folder: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Profile, place and generate with the shipped model on 4 CPU ranks, and compare what is moved."""
    if rank_folder is not None and model is not None:
        from exflow.commands.demo_rank import run_demo_rank

        run_demo_rank(model, rank_folder)
        return
    from exflow.commands.demo import demo, shipped_model

    with Work("demo") as work:
        result = demo(model or shipped_model(), text or [], work.tell)
    print_demo(result, as_json)


def print_findings(findings: "list[Finding]", as_json: bool) -> None:
    """What was found, line by line; then what is missing, for what, and how to get it."""
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
    """The folder of a training run's last checkpoint; how good it is was said on the way."""
    if as_json:
        print_json({"checkpoint": str(checkpoint), "held_out_bits_per_byte": held_out_bits_per_byte})
        return
    print(checkpoint)


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

"""Where to begin: a small model of one's own, this machine, the whole pipeline: train, doctor, demo."""

from pathlib import Path
from typing import Annotated

import typer

from exflow.cli.options import Device, Json, Texts, examples
from exflow.cli.show import print_demo, print_findings, print_run
from exflow.console import TrainingLog, Work

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
    from exflow.device import choose_device
    from exflow.train import train
    from exflow.train_config import load_train_config

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
    from exflow.doctor import examine

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
        from exflow.demo_rank import run_demo_rank

        run_demo_rank(model, rank_folder)
        return
    from exflow.demo import demo, shipped_model

    with Work("demo") as work:
        result = demo(model or shipped_model(), text or [], work.tell)
    print_demo(result, as_json)

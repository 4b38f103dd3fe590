"""The command line: one thin function a verb. Results go to stdout, progress and errors to stderr.

Exit codes: 0 success, 2 bad usage or bad input, 1 anything else. Torch and the solvers are imported inside the
verbs that need them, so that `exflow --help` answers at once.
"""

import sys
from pathlib import Path
from typing import Annotated

import typer

from exflow.console import TrainingLog, print_result, progress_bar
from exflow.errors import InputError

app = typer.Typer(
    name="exflow",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Decide on which GPU each expert of a Mixture-of-Experts model lives, and decode with one all-to-all "
    "a layer.",
)


@app.command(epilog="Example: exflow train configs/gpt-moe-demo.yaml --text corpus/ -o runs/demo")
def train(
    config: Annotated[Path, typer.Argument(help="YAML file: model, data, training, checkpoint_steps.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")],
    text: Annotated[list[str] | None, typer.Option(help="More files or folders of text.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the run's last saved step.")] = False,
) -> None:
    """Train a small GPT-MoE from text."""
    from exflow.device import choose_device
    from exflow.train import load_train_config, train

    settings = load_train_config(config)
    data = settings.data.model_copy(update={"texts": settings.data.texts + (text or [])})
    with TrainingLog(settings.training.steps) as log:
        final = train(
            settings.model_copy(update={"data": data}), output, choose_device(device), resume, log.report
        )
    print(final)


@app.command(epilog="Example: exflow profile models/gpt-moe-demo --text book.txt -o trace/")
def profile(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint.")],
    text: Annotated[list[str], typer.Option(help="Files or folders of text; {stdlib} for the library's sources.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the trace.")],
    tokens: Annotated[int, typer.Option(help="Tokens to record at most, spread evenly over the text.", min=1)] = 32768,
    length: Annotated[int | None, typer.Option(help="Tokens a sequence; by default the model's longest.", min=1)] = None,
    weights: Annotated[bool, typer.Option(help="Record the gate weights too.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was recorded as JSON.")] = False,
) -> None:
    """Run a model over text and record its routing."""
    from exflow.profile import profile_text

    with progress_bar() as bar:
        task = bar.add_task("profiling", total=None)
        trace = profile_text(
            model,
            text,
            output,
            max_tokens=tokens,
            length=length,
            weights=weights,
            device=device,
            advance=lambda done, total: bar.update(task, completed=done, total=total),
        )
    print_result(
        {
            "trace": str(output),
            "tokens": trace.num_tokens,
            "moe_layers": trace.num_layers,
            "experts": trace.num_experts,
            "top_k": trace.top_k,
        },
        as_json,
    )


def main() -> None:
    """Entry point of the `exflow` command."""
    try:
        app()
    except InputError as error:
        print(f"exflow: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("exflow: interrupted", file=sys.stderr)
        sys.exit(1)

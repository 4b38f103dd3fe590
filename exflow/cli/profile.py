"""Verbs that make a trace, from a model or from another engine's recording: profile, import."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from exflow.cli.options import RECORDING, TRACE_FORMATS, Device, Json, Texts, examples, one_of
from exflow.cli.tables import print_figures
from exflow.console import Work

if TYPE_CHECKING:
    from exflow.profiling.trace import RoutingTrace

verbs = typer.Typer()
NewTrace = Annotated[Path, typer.Option("--output", "-o", help="Trace folder to write.", show_default=False)]
_UNSAID = "Facts that the files leave out"


@verbs.command(
    rich_help_panel=RECORDING,
    epilog=examples(
        "exflow profile models/gpt-moe-demo --text book.txt -o trace/",
        "exflow profile hf:OLMoE-1B-7B/ --text book.txt --length 512 -o trace/",
    ),
)
def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="Checkpoint folder, or hf:FOLDER to run a Hugging Face model with transformers.",
            show_default=False,
        ),
    ],
    output: NewTrace,
    text: Texts = None,
    tokens: Annotated[
        int, typer.Option(help="Number of tokens to record at most, spread evenly over the text.", min=1)
    ] = 32768,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens per sequence.", show_default="2048, or the model's longest if shorter", min=1
        ),
    ] = None,
    weights: Annotated[bool, typer.Option(help="Also record the weights of the chosen experts.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the recording of an interrupted run.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run a model over text and record which experts each token takes.

    Without --text the text is Python's standard library.
    """
    from exflow.commands.profile import profile_text

    with Work("profiling", "tokens") as work:
        trace = profile_text(
            model,
            text or ["{stdlib}"],
            output,
            max_tokens=tokens,
            length=length,
            weights=weights,
            device=device,
            advance=work.advance,
            resume=resume,
        )
    print_figures({"trace": str(output), **trace_figures(trace)}, as_json)


@verbs.command(
    "import",
    rich_help_panel=RECORDING,
    epilog=examples(
        "exflow import responses.jsonl --hidden-layers 27 --top-k 6 -o trace/",
        "exflow import expert_distribution_recorder_*.pt -o trace/",
        "exflow import routing.npz -o trace/",
    ),
)
def import_trace(
    files: Annotated[list[Path], typer.Argument(help="Files of one recording.", show_default=False)],
    output: NewTrace,
    format: Annotated[
        str | None,
        typer.Option(
            help="Format of the files: responses (of SGLang or vLLM), sglang (its expert recorder), trtllm, "
            "megatron, npz, or npy.",
            show_default="recognised from the content",
            autocompletion=one_of(TRACE_FORMATS),
        ),
    ] = None,
    moe_layers: Annotated[
        str | None,
        typer.Option(help="Layers to keep, such as 1-26 or 0,2,4.", show_default="all layers with experts"),
    ] = None,
    num_experts: Annotated[
        int | None, typer.Option(help="Experts per layer of the model.", min=1, rich_help_panel=_UNSAID)
    ] = None,
    hidden_layers: Annotated[
        int | None,
        typer.Option(
            help="Layers of the model, those without experts included.", min=1, rich_help_panel=_UNSAID
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts that each token takes.", min=1, rich_help_panel=_UNSAID)
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a recording of another engine into a trace."""
    from exflow.commands.import_trace import layer_numbers, run_import
    from exflow.profiling.importers.foreign import Hints

    hints = Hints(num_experts, layer_numbers(moe_layers), hidden_layers, top_k)
    with Work("importing", "MiB") as work:
        figures = run_import(
            files, output, format, hints, lambda done, total: work.advance(done >> 20, total >> 20)
        )
    print_figures(figures, as_json)


def trace_figures(trace: "RoutingTrace") -> dict[str, Any]:
    return {
        "model": trace.model,
        "tokens": trace.num_tokens,
        "sequences": len(set(trace.sequence.tolist())),
        "moe_layers": trace.num_layers,
        "experts": trace.num_experts,
        "top_k": trace.top_k,
    }

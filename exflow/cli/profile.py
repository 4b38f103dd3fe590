"""From a model, or from another engine's recording, to a trace: profile, import."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exflow.profiling.trace import RoutingTrace

from typing import Annotated

import typer

from exflow.cli.options import TRACE_FORMATS, Device, Json, Texts, examples, one_of
from exflow.cli.tables import print_figures
from exflow.console import Work

verbs = typer.Typer()
NewTrace = Annotated[Path, typer.Option("--output", "-o", help="Folder of the trace.")]


@verbs.command(
    epilog=examples(
        "exflow profile models/gpt-moe-demo --text book.txt -o trace/",
        "exflow profile hf:OLMoE-1B-7B/ --text book.txt --length 512 -o trace/",
    )
)
def profile(
    model: Annotated[
        str,
        typer.Argument(
            help="Folder of a checkpoint, or hf:FOLDER of a Hugging Face model.", show_default=False
        ),
    ],
    output: NewTrace,
    text: Texts = None,
    tokens: Annotated[
        int, typer.Option(help="Record at most so many, spread evenly over the text.", min=1)
    ] = 32768,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens a sequence; by default the model's most, of a Hugging Face model 2048.", min=1
        ),
    ] = None,
    weights: Annotated[bool, typer.Option(help="Record the gate weights too.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what a stopped run has recorded.")
    ] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run a model over text and record its routing."""
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
            help="responses (SGLang, vLLM), sglang (its recorder), trtllm, megatron, npz or npy; "
            "by default told from the content.",
            autocompletion=one_of(TRACE_FORMATS),
        ),
    ] = None,
    num_experts: Annotated[int | None, typer.Option(help="Where the files do not say.", min=1)] = None,
    moe_layers: Annotated[
        str | None, typer.Option(help="The layers to keep, as 1-26 or 0,2,4; by default all that route.")
    ] = None,
    hidden_layers: Annotated[
        int | None, typer.Option(help="Of the model, where the files do not say.", min=1)
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts a token takes, where the files do not say.", min=1)
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn routing recorded by another engine into a trace."""
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

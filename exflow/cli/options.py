"""Parts that verbs share: options, names that the shell completes, panels of the help, examples."""

from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from exflow import __version__
from exflow.console import verbosity
from exflow.errors import InputError
from exflow.placement.plan.strategy import AUTO, Strategy

# Repeated here, since shell completion must load neither torch nor a solver; a test compares them.
TRACE_FORMATS = ("responses", "sglang", "trtllm", "megatron", "npz", "npy")
PLAN_FORMATS = ("sglang", "trtllm", "vllm-ascend", "vllm", "eplb", "exflow")
STRATEGIES = (*Strategy, AUTO)
TRANSPORTS = ("one-sided", "relayed", "collective", "eager")
METHODS = ("auto", "exact", "search", "sweep", "ilp", "contiguous", "random", "load-only")
TARGETS = ("exflow", "sglang", "vllm", "vllm-ascend", "tensorrt-llm", "transformers", "eplb")
OBJECTIVES = ("time", "messages")
PHASES = ("all", "prefill", "decode")
DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")

# Panels of `exflow --help`, in this order, and the panel of rarely needed options.
RECORDING, PLACING, LOOKING, ENGINES, RUNNING, STARTING = (
    "Record routing",
    "Place experts",
    "Look before deploying",
    "Other engines",
    "Run a model",
    "Get started",
)
EXPERTS = "For experts"


def one_of(names: Sequence[str]) -> Callable[[], list[str]]:
    """Completion of an option to one of `names`."""
    return lambda: list(names)


Trace = Annotated[
    Path, typer.Argument(help="Trace folder, written by exflow profile or exflow import.", show_default=False)
]
PlanFile = Annotated[
    Path, typer.Argument(help="Plan file, written by exflow place or exflow import-plan.", show_default=False)
]
NewPlan = Annotated[Path, typer.Option("--output", "-o", help="Plan file to write.", show_default=False)]
Nodes = Annotated[int, typer.Option(help="Number of nodes that the GPUs are spread over evenly.", min=1)]
TopologyFile = Annotated[
    Path | None,
    typer.Option(
        help="YAML file of nodes, GPUs and links, or saved output of nvidia-smi topo -m. "
        "Replaces --gpus and --nodes."
    ),
]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="Text file or folder; {stdlib} is Python's standard library. Repeatable."),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device to compute on: cpu or cuda.",
        show_default="cuda if there is a GPU",
        autocompletion=one_of(DEVICES),
    ),
]
REDUNDANT = (
    "Extra slots per layer, for replicas of the busiest experts. "
    "More are added until every GPU has equally many."
)
Phase = Annotated[
    str, typer.Option(help="Tokens to count: all, prefill, or decode.", autocompletion=one_of(PHASES))
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def examples(*lines: str) -> str:
    """Epilog of a verb's help: commands to copy."""
    return "\n\n".join(["Examples:" if len(lines) > 1 else "Example:", *(f"    {line}" for line in lines)])


def _version(value: bool) -> None:
    if value:
        print(f"exflow {__version__}")
        raise typer.Exit


def _mind(option: typer.CallbackParam, value: bool) -> bool:
    """Store --quiet or --verbose, given before the verb or after it."""
    if value:
        setattr(verbosity, str(option.name), True)
    if verbosity.quiet and verbosity.verbose:
        verbosity.verbose = False
        raise InputError("--quiet and --verbose ask for opposite things; give one")
    return value


def general(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", callback=_mind, help="Print only errors to stderr.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", callback=_mind, help="Print progress lines and tracebacks to stderr."
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every verb."""


class Verbs(TyperGroup):
    """The verbs; --quiet and --verbose may also follow the verb."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        shared = [copy(option) for option in self.params if option.name in ("quiet", "verbose")]
        for option in shared:
            option.expose_value = False  # the verbs' functions do not know them
        for verb in self.commands.values():
            for each in (verb, *getattr(verb, "commands", {}).values()):
                each.params = [*each.params, *shared]

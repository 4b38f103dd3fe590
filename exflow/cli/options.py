"""What verbs have in common: options, names that the shell completes, examples."""

from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from exflow import __version__
from exflow.console import manners
from exflow.errors import InputError

# Written down again, since completing shall load neither torch nor a solver; a test compares.
TRACE_FORMATS = ("responses", "sglang", "trtllm", "megatron", "npz", "npy")
PLAN_FORMATS = ("sglang", "trtllm", "vllm-ascend", "vllm", "eplb", "exflow")
STRATEGIES = ("dispatch-combine", "coherent", "node-coherent", "replicated", "auto")
OWNED = ("coherent", "node-coherent", "dispatch-combine")  # what a plan can be for
TRANSPORTS = ("one-sided", "relayed", "collective", "eager")
METHODS = ("auto", "exact", "search", "sweep", "ilp", "contiguous", "random", "load-only")
PHASES = ("all", "prefill", "decode")
DTYPES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")


def one_of(names: Sequence[str]) -> Callable[[], list[str]]:
    """What the shell completes an option to."""
    return lambda: list(names)


Trace = Annotated[Path, typer.Argument(help="Folder of a routing trace.", show_default=False)]
PlanFile = Annotated[Path, typer.Argument(help="File of a plan.", show_default=False)]
NewPlan = Annotated[Path, typer.Option("--output", "-o", help="File of the plan.")]
Nodes = Annotated[int, typer.Option(help="Nodes they are spread over.", min=1)]
TopologyFile = Annotated[Path | None, typer.Option(help="YAML file of GPUs and links, instead of --gpus.")]
Texts = Annotated[
    list[str] | None,
    typer.Option("--text", help="A file or folder of text; {stdlib} is Python's library. Repeatable."),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu or cuda; by default cuda where there is one.", autocompletion=one_of(DEVICES)),
]
Phase = Annotated[
    str,
    typer.Option(help="Which tokens to count: all, prefill or decode.", autocompletion=one_of(PHASES)),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


def examples(*lines: str) -> str:
    """The end of a verb's help."""
    return "\n\n".join(["Examples:" if len(lines) > 1 else "Example:", *(f"    {line}" for line in lines)])


def _version(value: bool) -> None:
    if value:
        print(f"exflow {__version__}")
        raise typer.Exit


def _mind(option: typer.CallbackParam, value: bool) -> bool:
    """--quiet or --verbose, said before the verb or behind it."""
    if value:
        setattr(manners, str(option.name), True)
    if manners.quiet and manners.verbose:
        manners.verbose = False
        raise InputError("--quiet and --verbose ask for opposite things; give one")
    return value


def general(
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", callback=_mind, help="On stderr errors alone.")
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", callback=_mind, help="On stderr lines of progress, and tracebacks."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What every verb takes."""


class Verbs(TyperGroup):
    """--quiet and --verbose may stand behind the verb too."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        shared = [copy(option) for option in self.params if option.name in ("quiet", "verbose")]
        for option in shared:
            option.expose_value = False  # the verbs' functions do not know them
        for verb in self.commands.values():
            for each in (verb, *getattr(verb, "commands", {}).values()):
                each.params = [*each.params, *shared]

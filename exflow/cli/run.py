"""Verbs that run a model, on one process or on many ranks: generate, bench decode."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from exflow.cli.options import (
    DTYPES,
    EXPERTS,
    RUNNING,
    STRATEGIES,
    TRANSPORTS,
    Device,
    Json,
    examples,
    one_of,
)
from exflow.cli.run_job import run_job
from exflow.cli.run_tables import print_decode_bench, print_generation
from exflow.job.launch import PATIENCE_S

verbs = typer.Typer()
bench = typer.Typer(
    name="bench",
    rich_help_panel=RUNNING,
    no_args_is_help=True,
    help="Time strategies, transports and placements side by side.",
)
_SAMPLING, _PARALLEL, _CHECKS = "Sampling", "Parallelism and precision", "Record and check"

Nproc = Annotated[
    int | None,
    typer.Option(
        help="Ranks to start on this machine, one per GPU. torchrun starts ranks on several machines.",
        show_default="one process",
        min=1,
        rich_help_panel=_PARALLEL,
    ),
]
Replay = Annotated[
    Path | None,
    typer.Option(
        help="Trace folder whose routing replaces the choices of the gates.", rich_help_panel=_CHECKS
    ),
]
Patience = Annotated[
    float,
    typer.Option(
        help="Seconds without an answer from a rank until the job is given up. Raise it on slow machines.",
        min=0.1,
        rich_help_panel=EXPERTS,
    ),
]


@verbs.command(
    rich_help_panel=RUNNING,
    epilog=examples(
        'exflow generate models/gpt-moe-demo --prompt "Once"',
        'exflow generate models/gpt-moe-demo --prompt "Once" --plan plan.json --nproc 4 --strategy coherent',
    ),
)
def generate(
    model: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint folder, from exflow train or of a Hugging Face model.", show_default=False
        ),
    ],
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue. Repeatable.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Text file with one prompt per line.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add to each prompt.", min=1)] = 64,
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Plan file that says where experts live.",
            show_default="experts in order",
            rich_help_panel=_PARALLEL,
        ),
    ] = None,
    nproc: Nproc = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="How ranks share the work. auto measures the ranks and takes the fastest. "
            "dispatch-combine: two all-to-alls per layer, as in other engines. "
            "coherent: every rank keeps all keys and values, so a token can go straight to its next expert. "
            "replicated: every rank computes all tokens, with all-reduces. "
            "node-coherent: coherent inside each node; a research setting.",
            autocompletion=one_of(STRATEGIES),
            rich_help_panel=_PARALLEL,
        ),
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision: float32, bfloat16, or auto. On GPUs auto is the precision of the checkpoint, "
            "with bfloat16 for float16 and quantised ones. On CPUs it is float32.",
            autocompletion=one_of(("auto", *DTYPES)),
            rich_help_panel=_PARALLEL,
        ),
    ] = "auto",
    device: Device = None,
    temperature: Annotated[
        float,
        typer.Option(
            help="Randomness of the choice of tokens; 0 takes the likeliest.", rich_help_panel=_SAMPLING
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            help="Sample among the likeliest tokens whose probabilities reach this sum.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Random seed of the sampling.", min=0, rich_help_panel=_SAMPLING)
    ] = 0,
    ignore_end: Annotated[
        bool,
        typer.Option("--ignore-end", help="Continue after an end-of-text token.", rich_help_panel=_SAMPLING),
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option(help="Trace folder to record the routing of this run to.", rich_help_panel=_CHECKS),
    ] = None,
    replay: Replay = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare logits, tokens and counters with those of one process. Exit code 1 if they differ.",
            rich_help_panel=_CHECKS,
        ),
    ] = False,
    transport: Annotated[
        str,
        typer.Option(
            help="How ranks exchange tokens; leave at auto. CUDA graphs of decode steps: one-sided (in a "
            "node), relayed (between nodes), or collective (NCCL). eager: no CUDA graphs. relayed, with "
            "prompts too and on CPUs: one message per token and remote node, passed on inside the node.",
            autocompletion=one_of(("auto", *TRANSPORTS)),
            rich_help_panel=EXPERTS,
        ),
    ] = "auto",
    patience: Patience = PATIENCE_S,
    as_json: Json = False,
) -> None:
    """Generate text from prompts. --nproc starts several ranks on this machine."""
    from exflow.commands.generate import generate
    from exflow.commands.generate_job import GenerateOptions, read_prompts
    from exflow.model.sampling import Sampling

    prompts = read_prompts(prompt or [], prompt_file)
    sampling = Sampling(temperature, top_p, seed)
    options = GenerateOptions(
        model=model,
        prompts=prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        plan=plan,
        strategy=strategy,
        device=device,
        dtype=dtype,
        trace=trace,
        ignore_end=ignore_end,
        replay=replay,
        transport=transport,
        verify=verify,
        patience_s=patience,
    )
    run_job(options, nproc, generate, partial(print_generation, prompts, as_json=as_json))


@bench.command(
    "decode",
    epilog=examples(
        "exflow bench decode models/gpt-moe-demo --nproc 2 --batch 8",
        "exflow bench decode configs/shapes/gpt-oss-20b --plan plan.json --replay trace/ --nproc 2",
    ),
)
def bench_decode(
    model: Annotated[
        Path,
        typer.Argument(
            help="Checkpoint folder, or a folder with config.json alone: weights are random then.",
            show_default=False,
        ),
    ],
    plan: Annotated[
        list[Path] | None,
        typer.Option(
            help="Plan file to time beside experts in order. Repeatable.", rich_help_panel=_PARALLEL
        ),
    ] = None,
    nproc: Nproc = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="Strategy to time: dispatch-combine, coherent, node-coherent (a research setting), or "
            "replicated. Repeatable.",
            show_default="all that differ here",
            autocompletion=one_of(STRATEGIES[:-1]),
            rich_help_panel=_PARALLEL,
        ),
    ] = None,
    replay: Replay = None,
    transport: Annotated[
        list[str] | None,
        typer.Option(
            help="Transport to time: one-sided, relayed, collective, or eager. Repeatable.",
            show_default="eager on CPUs, the others on GPUs",
            autocompletion=one_of(TRANSPORTS),
            rich_help_panel=EXPERTS,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            help="Sequences decoded at a time, on all ranks together. Repeatable.", show_default="16", min=1
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens already in each sequence's cache.",
            show_default="512, or as many as the model allows",
            min=1,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to time, after a warm-up.", min=1)] = 20,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision: float32 or bfloat16.",
            show_default="bfloat16 on GPUs, float32 on CPUs",
            autocompletion=one_of(DTYPES),
            rich_help_panel=_PARALLEL,
        ),
    ] = None,
    device: Device = None,
    patience: Patience = PATIENCE_S,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file to write, row by row while the benchmark runs."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time decode steps of strategies, transports and placements, with the same weights and routing."""
    from exflow.bench.decode import bench_decode
    from exflow.bench.job import BenchOptions

    options = BenchOptions(
        model=model,
        plans=plan or [],
        strategies=strategy or [],
        transports=transport or [],
        batches=batch or [],
        context=context,
        steps=steps,
        replay=replay,
        dtype=dtype,
        device=device,
        output=output,
        patience_s=patience,
    )
    run_job(options, nproc, bench_decode, partial(print_decode_bench, as_json=as_json))

"""From a model and a plan to tokens, on one process or on many ranks: generate, bench decode."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from exflow.cli.tables import _print_table, _readable, print_json

if TYPE_CHECKING:
    pass

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from exflow.cli.options import DTYPES, STRATEGIES, TRANSPORTS, Device, Json, examples, one_of
from exflow.errors import InputError
from exflow.job.launch import PATIENCE_S, check_start, run_ranks, torchrun_place

verbs = typer.Typer()
bench = typer.Typer(name="bench", no_args_is_help=True, help="Time variants side by side in one job.")

Nproc = Annotated[int | None, typer.Option(help="Ranks to start here; by default one process.", min=1)]
Replay = Annotated[
    Path | None,
    typer.Option(help="Folder of a routing trace that dictates the experts, whatever the gates say."),
]
Patience = Annotated[
    float,
    typer.Option(help="Seconds to wait for a rank, which may be slow, before the job is given up.", min=0.1),
]


@verbs.command(
    epilog=examples(
        'exflow generate models/gpt-moe-demo --prompt "Once"',
        'exflow generate models/gpt-moe-demo --prompt "Once" --plan plan.json --nproc 4 --strategy auto',
    )
)
def generate(
    model: Annotated[Path, typer.Argument(help="Folder of a checkpoint.", show_default=False)],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. Repeatable.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Where the experts live; by default contiguous.")] = None,
    nproc: Nproc = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="dispatch-combine, coherent, node-coherent, replicated, or auto.",
            autocompletion=one_of(STRATEGIES),
        ),
    ] = "coherent",
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to add to each prompt.", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample among the likeliest that reach this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.", min=0)] = 0,
    ignore_end: Annotated[bool, typer.Option(help="Do not stop at the end-of-text token.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Record the run's routing to this folder.")] = None,
    replay: Replay = None,
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16.", autocompletion=one_of(DTYPES))
    ] = "float32",
    transport: Annotated[
        str,
        typer.Option(
            help="How decode steps run: captured, on GPUs, as one-sided (one node), relayed (several) or "
            "collective; or eager. auto takes the first that works.",
            autocompletion=one_of(("auto", *TRANSPORTS)),
        ),
    ] = "auto",
    hierarchical: Annotated[
        bool,
        typer.Option(
            "--hierarchical",
            help="Between nodes one message a token, passed on inside, in prompts and steps; for top-k.",
        ),
    ] = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Compare logits, tokens and counters with those of one process; exit code 1 if they differ.",
        ),
    ] = False,
    device: Device = None,
    patience: Patience = PATIENCE_S,
    as_json: Json = False,
) -> None:
    """Generate text, on one process or on many ranks (--nproc starts them here)."""
    from exflow.commands.generate import GenerateJob, generate, read_prompts
    from exflow.model.sampling import Sampling

    if nproc is not None and prompt_file is not None and not prompt_file.is_file() and prompt_file.exists():
        raise InputError(
            f"--prompt-file {prompt_file}: can be read once alone, and each rank reads it; give a file"
        )
    prompts = read_prompts(prompt or [], prompt_file)
    sampling = Sampling(temperature, top_p, seed)
    job = GenerateJob(
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
        hierarchical=hierarchical,
        verify=verify,
        patience_s=patience,
    )
    if _ranks_did_it(nproc, patience, lambda: job.check(nproc or 1)):
        return
    if (result := generate(job)) is not None:
        print_generation(prompts, result, as_json)


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
            help="Folder of a checkpoint, or of a config.json alone: random weights then.", show_default=False
        ),
    ],
    plan: Annotated[
        list[Path] | None, typer.Option(help="A placement beside the contiguous one. Repeatable.")
    ] = None,
    nproc: Nproc = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="As of generate, but auto; by default all that differ here. Repeatable.",
            autocompletion=one_of(STRATEGIES[:-1]),
        ),
    ] = None,
    transport: Annotated[
        list[str] | None,
        typer.Option(
            help="one-sided, relayed, collective or eager; by default eager on CPUs, the others on GPUs. "
            "Repeatable.",
            autocompletion=one_of(TRANSPORTS),
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Sequences of the job; by default 16. Repeatable.", min=1)
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Positions that each has already; by default 512.", min=1)
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to time, after a warm-up.", min=1)] = 20,
    replay: Replay = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32 or bfloat16; by default bfloat16 on GPUs.", autocompletion=one_of(DTYPES)),
    ] = None,
    device: Device = None,
    patience: Patience = PATIENCE_S,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File of the results, written as they come.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time decode steps of strategies, transports and placements, on the same weights and routing."""
    from exflow.bench.decode import bench_decode
    from exflow.bench.job import BenchJob

    job = BenchJob(
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
    if _ranks_did_it(nproc, patience, lambda: job.check(nproc)):
        return
    if (result := bench_decode(job)) is not None:
        print_decode_bench(result, as_json)


def _ranks_did_it(nproc: int | None, patience_s: float, check: Callable[[], None]) -> bool:
    """Start the ranks that --nproc asks for, if `check` finds no fault in their job: they do the work.

    False where this process is to do it: it is alone, or one of torchrun's ranks. Raises InputError and
    RankDied.
    """
    check_start()
    place = torchrun_place()
    if place is None:
        check()
        if nproc is not None:
            run_ranks(sys.argv[1:], nproc, patience_s)
            return True
    elif nproc not in (None, place.num_ranks):
        raise InputError(
            f"--nproc {nproc}: the job has {place.num_ranks} ranks (WORLD_SIZE); leave --nproc out"
        )
    return False


def print_generation(prompts: list[str], result: dict[str, Any], as_json: bool) -> None:
    """The texts on stdout; the figures of the run below them."""
    if as_json:
        print_json(result)
        return
    for prompt, text in zip(prompts, result["text"], strict=True):
        print(f"{prompt}{text}\n")
    print(
        f"{result['strategy']} on {result['ranks']} rank(s): TTFT {result['ttft_s']:.2f} s, "
        f"TPOT {result['tpot_ms']:.1f} ms, {result['tokens_per_s']:.1f} tokens/s"
    )
    if verified := result.get("verified"):
        print(
            f"verified: {verified['choices']} choices are those of one process, with logits within "
            f"{verified['largest_difference']:.1e} of the largest ({verified['tolerance']:.0e} is allowed), "
            "and the counters are what the routing comes to"
        )


def print_decode_bench(result: dict[str, Any], as_json: bool) -> None:
    """The table, why rows of it are empty, and what `auto` would take."""
    if as_json:
        print_json(result)
        return
    print(
        f"{result['model']} in {result['dtype']} ({result['weights']} weights) on {result['ranks']} rank(s), "
        f"{result['hardware']}; {result['context']} positions, {result['steps']} steps"
    )
    rows = [
        {name: "-" if value is None else value for name, value in row.items()} | {"batch": str(row["batch"])}
        for row in result["rows"]
    ]
    measured = {"x floor": "times_floor"} if any(row["times_floor"] for row in result["rows"]) else {}
    _print_table(
        ["strategy", "transport", "placement", "batch"], _DECODE_BENCH_COLUMNS | measured, rows, width=200
    )
    print(_DECODE_BENCH_LEGEND)
    for row in result["rows"]:
        if row["stopped"]:
            print(f"{_case(row)}: {row['stopped']}")
    for case in result["auto"]:
        clock = "not measured" if case["tpot_ms"] is None else f"{_readable(case['tpot_ms'])} ms measured"
        print(f"auto: {_case(case)}, {_readable(case['predicted_ms'])} ms predicted, {clock}")


def _case(row: dict[str, Any]) -> str:
    return f"{row['strategy']}, {row['transport']}, {row['placement']}, batch {row['batch']}"


_DECODE_BENCH_COLUMNS = {
    "TPOT ms": "tpot_ms",
    "p99 ms": "p99_ms",
    "tokens/s": "tokens_per_s",
    "critical B": "critical_bytes_per_step",
    "backgr. B": "background_bytes_per_step",
    "x first": "speedup",
}


_DECODE_BENCH_LEGEND = """\
critical B, backgr. B  bytes that a rank sends in a step: hidden states; keys and values
x first                times as fast as the first row of the same batch"""

"""The command line: one thin function a verb. Results go to stdout, progress and errors to stderr.

Exit codes: 0 success, 2 bad usage or bad input, 128 + N stopped by signal N (130: Ctrl-C), 1 anything else.
Torch and the solvers are imported inside the verbs that need them, so that `exflow --help` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from exflow.console import TimedWork, TrainingLog, Work, begin, say, say_error
from exflow.errors import InputError, WrongResult, out_of_memory
from exflow.files import check_writable
from exflow.launch import (
    BAD_INPUT,
    LOST_CONTACT,
    PATIENCE_S,
    LostContact,
    RankDied,
    end,
    run_ranks,
    torchrun_place,
)
from exflow.options import (
    DEVICES,
    DTYPES,
    METHODS,
    OWNED,
    PHASES,
    PLAN_FORMATS,
    STRATEGIES,
    TRACE_FORMATS,
    TRANSPORTS,
    Verbs,
    examples,
    general,
    one_of,
)
from exflow.show import (
    print_decode_bench,
    print_demo,
    print_evaluation,
    print_figures,
    print_generation,
    print_placement,
    print_run,
    print_simulation,
    trace_figures,
)
from exflow.signals import (
    Stopped,
    answer_signals,
    ctrl_c_ends_the_search,
    leave_signals,
)

app = typer.Typer(
    name="exflow",
    cls=Verbs,
    callback=general,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Decide on which GPU each expert of a Mixture-of-Experts model lives, and decode with one "
    "all-to-all a layer.",
    epilog="Results go to stdout; progress, notes and errors to stderr. NO_COLOR is heeded. Exit codes: 0 "
    "success, 2 bad usage or bad input, 128 + N stopped by signal N, 1 anything else.",
)
bench = typer.Typer(no_args_is_help=True, help="Time variants side by side in one job.")
app.add_typer(bench, name="bench")

_WHERE, _WHAT, _HOW, _TRUST = "Where experts can live", "What is good", "How to search", "How far to trust it"
_TIMES = "Predicted times"
Model = Annotated[Path, typer.Argument(help="Folder of a checkpoint.", show_default=False)]
Trace = Annotated[Path, typer.Argument(help="Folder of a routing trace.", show_default=False)]
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
Patience = Annotated[
    float,
    typer.Option(help="Seconds to wait for a rank, which may be slow, before the job is given up.", min=0.1),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]


@app.command(
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
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the trace.")],
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
    from exflow.profile import profile_text

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


@app.command(
    "import",
    epilog=examples(
        "exflow import responses.jsonl --hidden-layers 27 --top-k 6 -o trace/",
        "exflow import expert_distribution_recorder_*.pt -o trace/",
        "exflow import routing.npz -o trace/",
    ),
)
def import_trace(
    files: Annotated[list[Path], typer.Argument(help="Files of one recording.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the trace.")],
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
    from exflow.import_trace import layer_numbers, run_import
    from exflow.profiling.importers.foreign import Hints

    hints = Hints(num_experts, layer_numbers(moe_layers), hidden_layers, top_k)
    with Work("importing", "MiB") as work:
        figures = run_import(
            files, output, format, hints, lambda done, total: work.advance(done >> 20, total >> 20)
        )
    print_figures(figures, as_json)


@app.command(
    epilog=examples(
        "exflow place trace/ --gpus 8 --nodes 2 -o plan.json",
        "exflow place code/ law/ --worst-case --topology cluster.yaml --redundant-experts 8 -o plan.json",
        "exflow place new/ --gpus 8 --from plan.json --max-moves 64 -o next.json",
    )
)
def place(
    traces: Annotated[list[Path], typer.Argument(help="Folders of routing traces.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File of the plan; may be left out with --pareto.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs in all.", min=1, rich_help_panel=_WHERE)] = None,
    nodes: Annotated[
        int, typer.Option(help="Nodes they are spread over.", min=1, rich_help_panel=_WHERE)
    ] = 1,
    topology: Annotated[
        Path | None,
        typer.Option(help="YAML file of GPUs and links, instead of --gpus.", rich_help_panel=_WHERE),
    ] = None,
    redundant_experts: Annotated[
        int,
        typer.Option(help="Slots a layer for replicas of hot experts.", min=0, rich_help_panel=_WHERE),
    ] = 0,
    gpu_memory: Annotated[
        float | None,
        typer.Option(help="GiB a GPU has for experts; with --expert-size.", min=0, rich_help_panel=_WHERE),
    ] = None,
    expert_size: Annotated[
        float | None, typer.Option(help="MiB of one expert of one layer.", min=0, rich_help_panel=_WHERE)
    ] = None,
    strategy: Annotated[
        str,
        typer.Option(
            help="Whose messages count: coherent, node-coherent, or dispatch-combine (other engines).",
            autocompletion=one_of(OWNED),
            rich_help_panel=_WHAT,
        ),
    ] = "coherent",
    balance_price: Annotated[
        float,
        typer.Option(
            help="Messages per token and layer that a unit of imbalance is worth.",
            min=0,
            rich_help_panel=_WHAT,
        ),
    ] = 0.3,
    max_imbalance: Annotated[
        float | None,
        typer.Option(
            help="In every layer, the busiest GPU's load over the mean load at most; from 1 up.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    owner_price: Annotated[
        float,
        typer.Option(
            help="The same for the tokens that a GPU owns: it attends to them, and sends them out.",
            min=0,
            rich_help_panel=_WHAT,
        ),
    ] = 0.0,
    weight: Annotated[
        list[float] | None,
        typer.Option(help="How much each trace counts; by default its tokens.", rich_help_panel=_WHAT),
    ] = None,
    worst_case: Annotated[
        bool,
        typer.Option("--worst-case", help="Best for the trace where it is worst.", rich_help_panel=_WHAT),
    ] = False,
    start: Annotated[
        Path | None,
        typer.Option("--from", help="A plan in use to start from; with --max-moves.", rich_help_panel=_WHAT),
    ] = None,
    max_moves: Annotated[
        int | None,
        typer.Option(help="Experts that may change their GPU, in all.", min=0, rich_help_panel=_WHAT),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="auto, exact, search, sweep, ilp; or contiguous, random, load-only.",
            autocompletion=one_of(METHODS),
            rich_help_panel=_HOW,
        ),
    ] = "auto",
    time_limit: Annotated[
        float, typer.Option(help="Seconds to search at most.", min=0.1, rich_help_panel=_HOW)
    ] = 30.0,
    seed: Annotated[int, typer.Option(help="Of the search.", min=0, rich_help_panel=_HOW)] = 0,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Share of the sequences to judge the plan on, not to make it.", rich_help_panel=_TRUST
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option("--pareto", help="Show what balance costs, price by price.", rich_help_panel=_TRUST),
    ] = False,
    learning_curve: Annotated[
        bool,
        typer.Option(
            "--learning-curve", help="Show whether enough tokens were profiled.", rich_help_panel=_TRUST
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Decide on which GPU each expert lives."""
    from exflow.place import PlaceJob, Where, run_place
    from exflow.placement.objective import Objective
    from exflow.placement.place import Solving

    if output is not None:
        check_writable(output)
    elif not (pareto or learning_curve):
        raise InputError("--output is missing: name the file of the plan")
    solves = 2 if learning_curve else 1  # each within the limit
    with TimedWork("placing", solves * time_limit) as work, ctrl_c_ends_the_search():
        result = run_place(
            PlaceJob(
                traces=traces,
                where=Where(gpus, nodes, topology, redundant_experts, gpu_memory, expert_size),
                objective=Objective(strategy, balance_price, max_imbalance, owner_price),  # type: ignore[arg-type]
                solving=Solving(method, seed, time_limit),
                weights=weight,
                worst_case=worst_case,
                start=start,
                max_moves=max_moves,
                holdout=holdout,
                pareto=pareto,
                learning_curve=learning_curve,
            ),
            work.tell,
        )
        if output is not None:
            result.plan.save(output)
    print_placement(result, output, as_json)


@app.command(
    epilog=examples(
        "exflow balance expert_distribution_recorder_*.pt --gpus 8 --nodes 2 -o plan.json",
    )
)
def balance(
    files: Annotated[list[Path], typer.Argument(help="SGLang's stat files, or JSON.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the plan.")],
    gpus: Annotated[int, typer.Option(help="GPUs in all.", min=1)],
    nodes: Annotated[int, typer.Option(help="Nodes they are spread over.", min=1)] = 1,
    redundant_experts: Annotated[
        int, typer.Option(help="Slots of a layer beyond one for each expert.", min=0)
    ] = 0,
    model: Annotated[str, typer.Option(help="The model's name, for the plan.")] = "",
    as_json: Json = False,
) -> None:
    """Place by loads alone, for engines that count and do not record; affinity needs import and place."""
    from exflow.balance import run_balance
    from exflow.placement.topology import topology_of

    check_writable(output)
    with Work("balancing", "files") as work:
        where = topology_of(gpus, nodes)
        figures = run_balance(files, where, redundant_experts, model, output, work.advance)
    print_figures(figures, as_json)


@app.command(
    epilog=examples(
        "exflow evaluate plan.json trace/", "exflow evaluate plan.json run/ --phase decode --json"
    )
)
def evaluate(
    plan: Annotated[Path, typer.Argument(help="File of a plan.", show_default=False)],
    trace: Trace,
    phase: Phase = "all",
    as_json: Json = False,
) -> None:
    """Count what a plan moves on a trace, for every strategy."""
    from exflow.placement.evaluate import evaluate
    from exflow.placement.plan import Plan
    from exflow.profiling.trace import RoutingTrace

    with Work("counting"):
        figures = evaluate(Plan.load(plan), RoutingTrace.load(trace).of_phase(phase))
    print_evaluation(figures, as_json)


@app.command(
    epilog=examples(
        "exflow report trace/ plan.json -o report.html",
        "exflow report trace/ plan.json other.json --model configs/shapes/gpt-oss-20b -o report.html",
    )
)
def report(
    trace: Trace,
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the page.")],
    plans: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of plans, beside the contiguous one.", show_default=False),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Folder to write each drawing to as well, as SVG (there is no PNG).")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs to judge by, instead of the plans' own; or without plans.", min=1)
    ] = None,
    nodes: Annotated[int, typer.Option(help="Nodes they are spread over.", min=1)] = 1,
    topology: Annotated[
        Path | None, typer.Option(help="YAML file of GPUs and links, instead of --gpus.")
    ] = None,
    phase: Phase = "all",
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a checkpoint, or of a config.json alone: to predict times of decode steps.",
            rich_help_panel=_TIMES,
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences of the job.", min=1, rich_help_panel=_TIMES)] = 64,
    context: Annotated[
        int, typer.Option(help="Positions that each has already.", min=1, rich_help_panel=_TIMES)
    ] = 1024,
    machine: Annotated[
        Path | None,
        typer.Option(help="YAML file of the machine, by default of H200s.", rich_help_panel=_TIMES),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained page about a trace and plans for it, to look at before deploying."""
    from exflow.place import Where
    from exflow.report.run import ReportJob, run_report

    check_writable(output)
    if figures is not None:
        check_writable(figures / "drawing.svg")
    where = Where(gpus, nodes, topology)
    job = ReportJob(trace, plans or [], output, phase, where, figures, model, batch, context, machine)
    with Work("reporting", "steps") as work:

        def advance(what: str, done: int, total: int) -> None:
            work.tell(what)
            work.advance(done, total)

        written = run_report(job, advance)
    summary = {"report": str(output), "bytes": written.page_bytes, "figures": written.figures}
    print_figures(summary | written.report.as_json() if as_json else summary, as_json)


@app.command(
    epilog=examples(
        "exflow simulate trace/ --model configs/shapes/gpt-oss-20b --gpus 32 --expert-parallel 8 "
        "--expert-parallel 32",
        "exflow simulate trace/ plan.json --model configs/shapes/gpt-oss-20b --batch 256",
        "exflow simulate trace/ --model shape/ --machine configs/machines/a100-hdr.yaml --gpus-per-node 4 "
        "--gpus 64 --figures drawings/",
    )
)
def simulate(
    trace: Trace,
    model: Annotated[
        Path, typer.Option(help="Folder of a checkpoint, or of a config.json alone.", show_default=False)
    ],
    plans: Annotated[
        list[Path] | None,
        typer.Argument(help="Files of plans; without them placements are made.", show_default=False),
    ] = None,
    gpus: Annotated[
        list[int] | None, typer.Option(help="GPUs in all; by default the plans' own. Repeatable.", min=1)
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of a node, without plans.", min=1)] = 8,
    expert_parallel: Annotated[
        list[int] | None,
        typer.Option(
            help="GPUs that share all experts at most; more GPUs are further such groups. Repeatable.", min=1
        ),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences of the whole job.", min=1)] = None,
    batch_per_gpu: Annotated[
        int | None, typer.Option(help="Sequences of a GPU, instead; by default 64.", min=1)
    ] = None,
    context: Annotated[int, typer.Option(help="Positions that each has already.", min=1)] = 1024,
    machine: Annotated[
        Path | None, typer.Option(help="YAML file of the machine, by default of H200s.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option(help="Seconds to search for each placement at most.", min=0.1)
    ] = 10.0,
    phase: Phase = "all",
    figures: Annotated[Path | None, typer.Option(help="Folder for curves over the GPUs, as SVG.")] = None,
    as_json: Json = False,
) -> None:
    """Predict decode steps on clusters that you do not have, strategy by strategy."""
    from exflow.report.scaling import write_scaling
    from exflow.simulate_run import SimulateJob, run_simulate

    if figures is not None:
        check_writable(figures / "drawing.svg")
    job = SimulateJob(
        trace=trace,
        model=model,
        plans=plans or [],
        gpus=gpus or [],
        gpus_per_node=gpus_per_node,
        widest=expert_parallel or [],
        batch=batch,
        batch_per_gpu=batch_per_gpu,
        context=context,
        machine=machine,
        time_limit=time_limit,
        phase=phase,
    )
    with Work("simulating") as work, ctrl_c_ends_the_search():
        result = run_simulate(job, work.tell).as_json()
    if figures is not None:
        write_scaling(result["sizes"], figures)
    print_simulation(result, as_json)


@app.command(epilog=examples("exflow export plan.json --format sglang -o placement.json"))
def export(
    plan: Annotated[Path, typer.Argument(help="File of a plan.", show_default=False)],
    format: Annotated[
        str,
        typer.Option(
            help="sglang, trtllm, vllm-ascend, vllm, eplb, or exflow.",
            autocompletion=one_of(PLAN_FORMATS),
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="File for the engine.")],
    as_json: Json = False,
) -> None:
    """Write a plan for another engine, and say how to use it."""
    from exflow.export import print_export, run_export

    print_export(run_export(plan, format, output), as_json)


@app.command(
    "import-plan",
    epilog=examples(
        "exflow import-plan placement.json -o plan.json",
        "exflow import-plan moe.yaml --trace trace/ --gpus 8 -o plan.json",
    ),
)
def import_plan(
    file: Annotated[Path, typer.Argument(help="A placement in an engine's format.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of the plan.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="As of export; by default told from the content.", autocompletion=one_of(PLAN_FORMATS)
        ),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Folder of a trace of the model; by default FILE.meta.json tells.")
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs in all, where nothing tells.", min=1)] = None,
    nodes: Annotated[int, typer.Option(help="Nodes they are spread over.", min=1)] = 1,
    topology: Annotated[
        Path | None, typer.Option(help="YAML file of GPUs and links, instead of --gpus.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a plan of another engine's placement, to evaluate it or to run it."""
    from exflow.export import given_topology, run_import_plan

    where = given_topology(gpus, nodes, topology)
    print_figures(run_import_plan(file, format, trace, where, output), as_json)


@app.command(
    epilog=examples(
        'exflow generate models/gpt-moe-demo --prompt "Once"',
        'exflow generate models/gpt-moe-demo --prompt "Once" --plan plan.json --nproc 4 --strategy auto',
    )
)
def generate(
    model: Model,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt. Repeatable.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with one prompt a line.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Where the experts live; by default contiguous.")] = None,
    nproc: Annotated[
        int | None, typer.Option(help="Ranks to start here; by default one process.", min=1)
    ] = None,
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
    replay: Annotated[
        Path | None,
        typer.Option(help="Folder of a routing trace that dictates the experts, whatever the gates say."),
    ] = None,
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
    """Generate text, on one process or on many ranks (torchrun is started with --nproc)."""
    from exflow.generate import GenerateJob, generate, read_prompts
    from exflow.sampling import Sampling

    prompts = read_prompts(prompt or [], prompt_file)
    sampling = Sampling(temperature, top_p, seed)
    job = GenerateJob(
        model,
        prompts,
        max_new_tokens,
        sampling,
        plan,
        strategy,
        device,
        dtype,
        trace,
        ignore_end,
        replay,
        transport,
        hierarchical,
        verify,
        patience,
    )
    place = torchrun_place()
    if place is None:
        job.check(nproc or 1)
        if nproc is not None:
            run_ranks(sys.argv[1:], nproc)
            return
    elif nproc not in (None, place.num_ranks):
        raise InputError(f"--nproc {nproc}: torchrun has started {place.num_ranks} ranks; leave --nproc out")
    result = generate(job)
    if result is not None:
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
    nproc: Annotated[
        int | None, typer.Option(help="Ranks to start here; by default one process.", min=1)
    ] = None,
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
    replay: Annotated[
        Path | None,
        typer.Option(help="Folder of a routing trace that dictates the experts, whatever the gates say."),
    ] = None,
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
    from exflow.bench_decode import bench_decode
    from exflow.bench_setting import BenchJob

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
    place = torchrun_place()
    if place is None:
        job.check(nproc)
        if nproc is not None:
            run_ranks(sys.argv[1:], nproc)
            return
    elif nproc not in (None, place.num_ranks):
        raise InputError(f"--nproc {nproc}: torchrun has started {place.num_ranks} ranks; leave --nproc out")
    result = bench_decode(job)
    if result is not None:
        print_decode_bench(result, as_json)


@app.command(
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


@app.command(epilog=examples("exflow doctor", "exflow doctor --json"))
def doctor(as_json: Json = False) -> None:
    """Say what this machine has, and what is missing for what."""
    from exflow.doctor import examine
    from exflow.show import print_findings

    findings = examine()
    print_findings(findings, as_json)
    if any(each.missing and each.required for each in findings):
        raise typer.Exit(1)


@app.command(epilog=examples("exflow demo", "exflow demo --text README.md"))
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


def main() -> None:
    """Entry point of the `exflow` command."""
    # torch's threads shall not spin while they wait: where cores are few or busy they stall each other
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # of its warnings when a rank is lost: we say it
    answer_signals()
    begin()
    try:
        run()
    except Stopped as stop:
        say(str(stop))
        end(128 + stop.signal)
    finally:
        leave_signals()


def run() -> None:
    """Do what the command line says, and say what came in the way."""
    place = torchrun_place()
    try:
        app()
    except InputError as error:
        if place is None or place.local_rank == 0:  # all ranks find the same fault: once a node is enough
            say_error(error)
        end(BAD_INPUT)
    except (RankDied, WrongResult) as error:
        say(str(error))
        end(1)
    except LostContact as error:
        if not error.told:
            say(str(error))
        end(LOST_CONTACT)
    except Exception as error:
        if (shortage := out_of_memory(error)) is not None:
            say(shortage if place is None else f"rank {place.rank}: {shortage}")
        elif place is None:
            raise
        else:
            sys.excepthook(*sys.exc_info())
        end(1)


if __name__ == "__main__":
    main()

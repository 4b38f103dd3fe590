"""The verb that makes a plan from traces: place."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from exflow.cli.options import (
    EXPERTS,
    METHODS,
    OBJECTIVES,
    PHASES,
    PLACING,
    REDUNDANT,
    TARGETS,
    Json,
    examples,
    one_of,
)
from exflow.cli.placement_tables import print_placements
from exflow.console import TimedWork
from exflow.errors import InputError
from exflow.files import check_writable
from exflow.job.signals import ctrl_c_ends_the_search
from exflow.placement.plan.strategy import OWNED

verbs = typer.Typer()
_WHERE, _GOAL, _IN_USE = "GPUs and slots", "Goal", "Change a plan in use"
_SEARCH, _TRUST = "Search", "Judge the result"


@verbs.command(
    rich_help_panel=PLACING,
    epilog=examples(
        "exflow place trace/ --gpus 8 --for sglang --model gpt-oss-20b -o plan.json",
        "exflow place trace/ --gpus 16 --nodes 2 --machine h200 --batch 128 --holdout 0.25 -o plan.json",
        "exflow place code/ law/ --worst-case --topology cluster.yaml --redundant-experts 8 -o plan.json",
        "exflow place new/ --gpus 8 --from plan.json --max-moves 64 -o next.json",
    ),
)
def place(
    traces: Annotated[
        list[Path],
        typer.Argument(help="Trace folders of one model, one for each kind of text.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Plan file to write. Optional with --pareto and --learning-curve."
        ),
    ] = None,
    phase: Annotated[
        list[str] | None,
        typer.Option(
            help="Tokens to place for: all, prefill, or decode. Given twice, each phase gets a plan of its "
            "own: plan.prefill.json, plan.decode.json.",
            show_default="all",
            autocompletion=one_of(PHASES),
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Number of GPUs in all.", min=1, rich_help_panel=_WHERE)
    ] = None,
    nodes: Annotated[
        int,
        typer.Option(
            help="Number of nodes that the GPUs are spread over evenly.", min=1, rich_help_panel=_WHERE
        ),
    ] = 1,
    topology: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of nodes, GPUs and links, or saved output of nvidia-smi topo -m. "
            "Replaces --gpus and --nodes.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    cost_matrix: Annotated[
        Path | None,
        typer.Option(
            help="JSON list of lists: the cost of a message between each two GPUs. Replaces --gpus.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    redundant_experts: Annotated[int, typer.Option(help=REDUNDANT, min=0, rich_help_panel=_WHERE)] = 0,
    gpu_memory: Annotated[
        float | None,
        typer.Option(
            help="GiB for experts on each GPU. The plan is refused if it needs more. Needs --expert-size.",
            min=0,
            rich_help_panel=_WHERE,
        ),
    ] = None,
    expert_size: Annotated[
        float | None,
        typer.Option(
            help="MiB of one expert in one layer. Needs --gpu-memory.", min=0, rich_help_panel=_WHERE
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--for",
            help="Engine that runs the plan: exflow, sglang, vllm, vllm-ascend, tensorrt-llm, transformers, "
            "or eplb.",
            autocompletion=one_of(TARGETS),
            rich_help_panel=_GOAL,
        ),
    ] = "exflow",
    machine: Annotated[
        str,
        typer.Option(
            help="Hardware that runs the plan: a name in configs/machines, or a YAML file.",
            rich_help_panel=_GOAL,
        ),
    ] = "h200",
    model: Annotated[
        str | None,
        typer.Option(
            help="Model whose sizes count: a name in configs/shapes, or a folder with config.json.",
            show_default="the model that the trace names",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            help="Tokens of each GPU in a step.",
            min=1,
            show_default="64, or 2048 for --phase prefill",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    keep_groups: Annotated[
        int,
        typer.Option(
            help="Number of routing groups (n_group) of a gate that picks groups first. Their experts stay "
            "together and the groups in order, as a renumbered checkpoint needs.",
            min=1,
            rich_help_panel=_GOAL,
        ),
    ] = 1,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="How tokens travel. dispatch-combine: every token comes home after each layer, as in all "
            "engines. coherent: ExFlow alone. node-coherent: ExFlow alone; a research setting.",
            show_default="what --for runs",
            autocompletion=one_of(OWNED),
            rich_help_panel=_GOAL,
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="time: the predicted time of a decode step. messages: the number of messages, as in the "
            "ExFlow paper.",
            show_default="time; messages with an option of that objective",
            autocompletion=one_of(OBJECTIVES),
            rich_help_panel=_GOAL,
        ),
    ] = None,
    balance_price: Annotated[
        float | None,
        typer.Option(
            help="Price of imbalance (load of the busiest GPU over the mean), in messages per token and "
            "layer. Higher: more even load, more messages. For --objective messages.",
            min=0,
            show_default="0.3",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    max_imbalance: Annotated[
        float | None,
        typer.Option(
            help="Limit on the imbalance of every layer: 1 is even load, 1.2 allows the busiest GPU 20% more "
            "than the mean.",
            show_default="no limit",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    weight: Annotated[
        list[float] | None,
        typer.Option(
            help="Weight of each trace, in the order of the traces. Repeatable.",
            show_default="its number of tokens",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    worst_case: Annotated[
        bool,
        typer.Option(
            "--worst-case",
            help="Minimise the messages of the worst trace instead of the weighted mean.",
            rich_help_panel=_GOAL,
        ),
    ] = False,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Plan in use, to change as little as --max-moves says.", rich_help_panel=_IN_USE
        ),
    ] = None,
    max_moves: Annotated[
        int | None,
        typer.Option(
            help="Number of experts that may move to another GPU, over all layers. Needs --from.",
            min=0,
            rich_help_panel=_IN_USE,
        ),
    ] = None,
    time_limit: Annotated[
        float,
        typer.Option(
            help="Seconds to search at most. Ctrl-C ends the search with the best plan so far.",
            min=0.1,
            rich_help_panel=_SEARCH,
        ),
    ] = 30.0,
    seed: Annotated[int, typer.Option(help="Random seed of the search.", min=0, rich_help_panel=_SEARCH)] = 0,
    holdout: Annotated[
        float | None,
        typer.Option(
            help="Share of the sequences to keep out of the search and to judge the plan on, such as 0.2.",
            show_default="none",
            rich_help_panel=_TRUST,
        ),
    ] = None,
    pareto: Annotated[
        bool,
        typer.Option(
            "--pareto",
            help="Print messages and imbalance for a range of balance prices.",
            rich_help_panel=_TRUST,
        ),
    ] = False,
    learning_curve: Annotated[
        bool,
        typer.Option(
            "--learning-curve",
            help="Print whether a longer trace would make a better plan.",
            rich_help_panel=_TRUST,
        ),
    ] = False,
    method: Annotated[
        str,
        typer.Option(
            help="Leave at auto. Solvers: exact, search, sweep, ilp. Baselines to compare with: contiguous, "
            "random, load-only.",
            autocompletion=one_of(METHODS),
            rich_help_panel=EXPERTS,
        ),
    ] = "auto",
    owner_price: Annotated[
        float | None,
        typer.Option(
            help="Price of uneven token ownership, in messages per token and layer; coherent only. "
            "Higher: more even attention work, more messages. For --objective messages.",
            min=0,
            show_default="0",
            rich_help_panel=EXPERTS,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose the GPU of each expert, so that a decode step takes the least time on your machine."""
    from exflow.commands.place import Goal, PlaceJob, Where, run_place
    from exflow.placement.make_plan import Solving
    from exflow.placement.solve.objective import BALANCE_PRICE, Objective

    of_messages = {
        "--balance-price": balance_price is not None,
        "--max-imbalance": max_imbalance is not None,
        "--owner-price": owner_price is not None,
        "--weight": bool(weight),
        "--worst-case": worst_case,
        "--from": start is not None,
        "--max-moves": max_moves is not None,
        "--pareto": pareto,
        "--method": method not in ("auto", "contiguous", "random", "load-only"),
        "--learning-curve": learning_curve,
    }
    goal = Goal(_objective(objective, of_messages), target, strategy, machine, model, batch, keep_groups)
    if goal.objective == "messages" and strategy is None:
        strategy = "coherent"
    if goal.objective == "messages" and keep_groups > 1:
        raise InputError("--keep-groups: belongs to --objective time; leave the options of messages out")
    if output is None and not (pareto or learning_curve):
        raise InputError("--output is missing: name the file of the plan")
    outputs = _outputs(phase or ["all"], output)
    for file in outputs.values():
        if file is not None:
            check_writable(file)
    job = PlaceJob(
        traces=traces,
        phase="all",
        where=Where(gpus, nodes, topology, redundant_experts, gpu_memory, expert_size, cost_matrix),
        goal=goal,
        objective=Objective(
            strategy or "coherent",  # type: ignore[arg-type]
            BALANCE_PRICE if balance_price is None else balance_price,
            max_imbalance,
            owner_price or 0.0,
        ),
        solving=Solving(method, seed, time_limit),
        weights=weight,
        worst_case=worst_case,
        start=start,
        max_moves=max_moves,
        holdout=holdout,
        pareto=pareto,
        learning_curve=learning_curve,
    )
    solves = len(outputs) * (2 if learning_curve else 1)  # each within the time limit
    with TimedWork("placing", solves * time_limit) as work, ctrl_c_ends_the_search() as interrupted:
        job = replace(job, solving=replace(job.solving, stop=interrupted.is_set))
        results = {each: run_place(replace(job, phase=each), work.tell) for each in outputs}
        for each, result in results.items():
            file = outputs[each]
            if file is not None:
                result.plan.save(file)
    print_placements(results, outputs, as_json)


def _outputs(phases: list[str], output: Path | None) -> dict[str, Path | None]:
    """The file of each phase's plan. Raises InputError where a phase is given twice, or all beside others."""
    if len(set(phases)) < len(phases) or ("all" in phases and len(phases) > 1):
        raise InputError(f"--phase {' --phase '.join(phases)}: name each phase once, or all alone")
    if output is None or len(phases) == 1:
        return dict.fromkeys(phases, output)
    return {each: output.with_name(f"{output.stem}.{each}{output.suffix}") for each in phases}


def _objective(given: str | None, of_messages: dict[str, bool]) -> str:
    """The given objective, or the one that the options imply. Raises InputError if they contradict."""
    asked = [name for name, is_given in of_messages.items() if is_given]
    if given == "time" and asked:
        raise InputError(f"{asked[0]}: belongs to --objective messages; give that, or leave {asked[0]} out")
    return given or ("messages" if asked else "time")

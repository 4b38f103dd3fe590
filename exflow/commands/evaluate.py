"""The evaluate command: the figures of a plan on a trace, its predicted time among them."""

from pathlib import Path
from typing import Any

from exflow.commands.place import Goal
from exflow.placement.fastest_plan import compared, references
from exflow.placement.plan.plan import Plan
from exflow.placement.time.machines import DEFAULT
from exflow.placement.time.serving import BATCH, Serving
from exflow.placement.traffic.evaluate import evaluate
from exflow.profiling.trace import RoutingTrace


def run_evaluate(
    plan_file: Path, trace_folder: Path, phase: str, machine: str | None, model: str | None, batch: int | None
) -> dict[str, Any]:
    """The figures of `placement.evaluate`, with "made_for" and "time" (see fastest_plan.compared).

    The plan by load alone beside it is made from the trace itself. None stands for what the plan was made
    for. Raises InputError where plan, trace, machine or model is wrong, or they do not fit together.
    """
    plan, trace = Plan.load(plan_file), RoutingTrace.load(trace_folder).of_phase(phase)
    figures = evaluate(plan, trace)
    serving = serving_of(plan, trace, machine, model, batch)
    others = references(trace, plan.topology, plan.strategy, plan.num_slots)
    return figures | {"made_for": serving.as_json(), "time": compared(plan, others, trace, serving)}


def serving_of(
    plan: Plan,
    trace: RoutingTrace,
    machine: str | None = None,
    model: str | None = None,
    batch: int | None = None,
) -> Serving:
    """The setting in which a plan's time is told: the options, else what it was made for, else the defaults.

    The model is the one that the trace names, unless `model` is given. Raises InputError for unknown names.
    """
    made_for = plan.expected.get("made_for", {})
    goal = Goal(
        target=made_for.get("target", "exflow"),
        strategy=plan.strategy,
        machine=machine or made_for.get("machine", DEFAULT),
        model=model,
        batch=batch or made_for.get("batch", BATCH),
    )
    return goal.serving(trace)

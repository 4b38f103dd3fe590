"""Draws routes.svg, the picture of the README: python docs/figures/routes.py

Routing of text that the shipped model was not trained on (models/gpt-moe-demo/early-traces), on 4 GPUs. The
plan is made from three quarters of the sequences, and both placements are shown on the others.
"""

from pathlib import Path

import numpy as np
from frame import framed

from exflow.placement.make_plan import place
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.baselines import contiguous_plan
from exflow.placement.time.serving import Serving
from exflow.placement.traffic.confidence import split_by_sequence
from exflow.profiling.trace import RoutingTrace
from exflow.report import routes
from exflow.report.data import Judged, Report, gather
from exflow.report.draw.svg import text
from exflow.report.plans import Candidate

HERE = Path(__file__).parent
TRACE = HERE.parents[1] / "models" / "gpt-moe-demo" / "early-traces" / "step-002200"
GPUS = Topology(gpus_per_node=4)
LAYERS = range(6)
HIGH = 158.0  # of the bars: two drawings are shown above each other
ROW = HIGH + 74


def report_of_both() -> Report:
    """Contiguous and by affinity, on the held-out sequences."""
    profiled, held_out = split_by_sequence(RoutingTrace.load(TRACE), 0.25)
    plans = {
        "contiguous": contiguous_plan(held_out, GPUS, Strategy.COHERENT),
        "affinity": place(profiled, GPUS),
    }
    chosen = [Candidate(name, name, plan, name == "contiguous") for name, plan in plans.items()]
    servings = [Serving(strategy=Strategy.COHERENT)] * len(chosen)
    return gather(held_out, chosen, servings, None, lambda what: None, lambda: None)


def picture() -> str:
    report = report_of_both()
    contiguous, affinity = report.plans
    titles = ("Experts in order", "Experts placed by affinity")
    body = [_row(report, place, title) for place, title in enumerate(titles)]
    label = (
        f"Routes of tokens through 4 GPUs: from layer to layer {_stay(contiguous):.0%} stay on their GPU "
        f"with experts in order, {_stay(affinity):.0%} with experts placed by affinity"
    )
    return framed(2 * ROW, label, body)


def _row(report: Report, place: int, title: str) -> str:
    """One placement's routes, under a heading of their own."""
    plan = report.plans[place]
    routes._HIGH = HIGH  # a quarter of a screen each
    drawn = routes.routes(plan, report, LAYERS).svg.split(">", 1)[1].removesuffix("</svg>")
    _, without_heading = drawn.split("</text>", 1)
    heading = text(60, 18, f"{title}: {_stay(plan):.0%} stay", kind="strong")
    return f'<g transform="translate(0 {place * ROW:g})">{heading}{without_heading}</g>'


def _stay(plan: Judged) -> float:
    return float(np.mean(plan.local))


if __name__ == "__main__":
    (HERE / "routes.svg").write_text(picture(), encoding="utf-8")

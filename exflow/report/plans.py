"""Plans that a report compares: the given plans, and the contiguous placement on the same GPUs."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.baselines import contiguous_plan
from exflow.profiling.trace import RoutingTrace

BASELINE = "contiguous"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan and its name in the report. `slug` is a unique name for links and files."""

    name: str
    slug: str
    plan: Plan
    baseline: bool = False


def candidates(trace: RoutingTrace, paths: Sequence[Path], topology: Topology | None) -> list[Candidate]:
    """List the baseline of each set of GPUs, followed by the plans for these GPUs.

    If `topology` is given, all plans are judged on it. Raises InputError if a file is no plan, or a plan is
    for another model or another number of GPUs.
    """
    named = [(name, _load(path, trace, topology)) for name, path in _names(paths)]
    shapes = list(dict.fromkeys(plan.topology for _, plan in named)) or ([topology] if topology else [])
    found: list[tuple[str, Plan, bool]] = []
    for shape in shapes:
        ours = [(name, plan, False) for name, plan in named if plan.topology == shape]
        name = BASELINE if len(shapes) == 1 else f"{BASELINE}, {shape}"
        strategy = ours[0][1].strategy if ours else Strategy.COHERENT
        found += [(name, contiguous_plan(trace, shape, strategy), True), *ours]
    slugs = _slugs([name for name, _, _ in found])
    return [
        Candidate(name, slug, plan, baseline)
        for slug, (name, plan, baseline) in zip(slugs, found, strict=True)
    ]


def _slugs(names: Sequence[str]) -> list[str]:
    """Reduce names to letters, digits and dashes. Equal results get a suffix."""
    slugs: list[str] = []
    for name in names:
        parts = re.findall("[a-z0-9]+", name.lower())
        slug = "-".join(parts)[-60:] or "plan"
        while slug in slugs:
            slug += "-2"
        slugs.append(slug)
    return slugs


def _names(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """Name each file by its stem, or by its whole path if two files have the same stem."""
    stems = Counter(path.stem for path in paths)
    names = [path.stem if stems[path.stem] == 1 and path.stem != BASELINE else str(path) for path in paths]
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise InputError(f"{twice[0]}: this plan is given twice; give each once")
    return list(zip(names, paths, strict=True))


def _load(path: Path, trace: RoutingTrace, topology: Topology | None) -> Plan:
    plan = Plan.load(path)
    try:
        plan.check_trace(trace)
        if topology is not None and topology.num_ranks != plan.num_ranks:
            raise InputError(
                f"the plan is for {plan.topology}, to be judged on {topology}; give as many GPUs, or "
                "another plan"
            )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return plan if topology is None else replace(plan, topology=topology)

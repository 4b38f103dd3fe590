"""Data of the tables of time: predicted MoE layers of a step under each plan and two plain placements."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from exflow.placement.plan.topology import Topology
from exflow.placement.time.serving import Serving
from exflow.report.data import Judged, Report

_PLAIN = {"contiguous": "contiguous placement", "load-only": "placement by load alone"}


@dataclass(frozen=True)
class TimeRow:
    """A placement's time. figures: those of StepTime. ratio: step time over that of contiguous placement."""

    name: str
    figures: dict[str, Any]
    ratio: float


@dataclass(frozen=True)
class TimeTable:
    """Times in one setting, on the same batches. made_for: a plan was made for it; else it is the default."""

    topology: Topology
    slots: int
    serving: Serving
    made_for: bool
    rows: tuple[TimeRow, ...]

    @property
    def has_attention(self) -> bool:
        return any(row.figures["attention_us"] for row in self.rows)


def time_tables(report: Report) -> list[TimeTable]:
    """A table for each setting and number of slots among the plans; without plans, one for each baseline."""
    judged = [each for each in report.plans if not each.baseline] or report.plans
    groups: dict[tuple[Topology, int, Serving], list[Judged]] = {}
    for each in judged:
        groups.setdefault((each.plan.topology, each.plan.num_slots, each.serving), []).append(each)
    return [_table(*setting, plans) for setting, plans in groups.items()]


def _table(topology: Topology, slots: int, serving: Serving, plans: Sequence[Judged]) -> TimeTable:
    plain: dict[str, dict[str, Any]] = plans[0].time["references"]
    named = [(_PLAIN[name], figures) for name, figures in plain.items()]
    named += [(each.name, each.time) for each in plans if not each.baseline]
    usual = plain["contiguous"]["step_us"]
    rows = tuple(TimeRow(name, figures, figures["step_us"] / usual) for name, figures in named)
    made_for = any("made_for" in each.plan.expected for each in plans)
    return TimeTable(topology, slots, serving, made_for, rows)

"""The summary: placement and coherence are compared apart."""

import json
import re
from pathlib import Path

import pytest

from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.objective import Objective
from exflow.report.draw.figure import number, percent
from exflow.report.summary import Change
from tests.report.pages import Checked, Run, make_trace, save


def test_placement_and_coherence_are_compared_apart(run: Run) -> None:
    trace = make_trace()
    save(trace, Topology(gpus_per_node=4), "mine.json")
    for_engines = Objective(strategy=Strategy.DISPATCH_COMBINE)
    solving = Solving(method="sweep")
    place(trace, Topology(gpus_per_node=4), objective=for_engines, solving=solving).save("engine.json")
    result = json.loads(run("report trace mine.json engine.json -o report.html --json"))
    messages = {
        (each["name"], name): figures["messages_per_token_layer"]
        for each in result["plans"]
        for name, figures in each["strategies"].items()
    }
    text = " ".join("".join(Checked(Path("report.html").read_text()).text).split())
    for plan, strategy in (("mine", "coherent"), ("engine", "dispatch-combine")):
        key = strategy.replace("-", "_")
        ours, usual = messages[plan, key], messages["contiguous", key]
        assert (
            f"{plan}, made for {strategy}: {1 - ours / usual:.0%} fewer messages than contiguous placement "
            f"under the same strategy ({number(ours)} against {number(usual)} a token and layer)."
        ) in text
    stays, home = messages["contiguous", "coherent"], messages["contiguous", "dispatch_combine"]
    assert text.count("Coherence alone") == 1
    assert (
        f"coherent sends {1 - stays / home:.0%} fewer messages than dispatch-combine, both with contiguous"
    ) in text
    rows = re.findall(
        r"<tr[^>]*><th scope=\"row\">(?:contiguous|mine|engine)</th>.*?</tr>", page_rows(), re.S
    )
    against = [re.findall(r"<td>(.*?)</td>", row, re.S)[1] for row in rows]
    changes = [
        percent(messages[plan, key] / messages["contiguous", key] - 1)
        for plan in ("mine", "engine")
        for key in ("dispatch_combine", "coherent")
    ]
    assert against == ["baseline", "baseline", "", *changes[:2], "", *changes[2:], ""]


def page_rows() -> str:
    """The table of strategies."""
    return Path("report.html").read_text().split('<section id="strategies"')[1].split("</table>")[0]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (2.0, 1.5, "25% fewer messages than"),
        (2.0, 2.5, "25% more messages than"),
        (2.0, 1.999, "as many messages as"),
        (0.0, 0.0, "as many messages as"),
    ],
)
def test_a_change_in_words(before: float, after: float, words: str) -> None:
    assert Change(before, after).words == words

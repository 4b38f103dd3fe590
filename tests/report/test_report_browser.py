"""The page in a browser: nothing goes wrong, nothing is asked for, its controls do what they say, soon.

Needs Chromium. A script at the end of a copy of the page plays the reader, and writes down what it saw.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exflow.commands.report import ReportJob, run_report
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

TRACES = Path(__file__).parents[3] / "shared" / "traces"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.all,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page cannot be opened"),
]

FIRST = """<script>window.seen = [];
addEventListener("error", (event) => seen.push(`error: ${event.message}`));
addEventListener("unhandledrejection", (event) => seen.push(`error: ${event.reason}`));
addEventListener("securitypolicyviolation", (event) => seen.push(`blocked: ${event.blockedURI}`));
for (const level of ["error", "warn"]) console[level] = (...said) => seen.push(`${level}: ${said.join(" ")}`);
</script>"""

LAST = """<script>(async () => {
const $ = (selector) => document.querySelector(selector);
const result = {ready_ms: performance.now()};
const change = (control, set, name) => {
  set(control);
  control.dispatchEvent(new Event(name, {bubbles: true}));
};
const shown = (anchor) => [...$(anchor).children].map((panel) => panel.getClientRects().length > 0);

const affinity = () => [
  $("#fig-affinity .which").textContent,
  $("#fig-affinity image[data-heat]").getAttribute("href"),
  $("#fig-affinity path[data-side]").getAttribute("d"),
];
const [order, pair] = [$("#affinity-choice select"), $("#affinity-choice input")];
change(pair, (p) => { p.value = 0; }, "input");
result.by_id = affinity();
change(order, (o) => { o.selectedIndex = 1; }, "change");
result.by_plan = affinity();
change(pair, (p) => { p.value = 1; }, "input");
result.next_pair = affinity();
result.layers = $("#affinity-choice output").textContent;

result.pairs_before = shown("#panels-pairs");
change($("[data-panels=panels-pairs]"), (s) => { s.selectedIndex = 1; }, "change");
result.pairs_after = shown("#panels-pairs");

const heat = $("#fig-expert-load image[data-heat]"), box = heat.getBoundingClientRect();
const corner = {bubbles: true, clientX: box.left + 2, clientY: box.top + 2};
heat.dispatchEvent(new PointerEvent("pointermove", corner));
const soon = () => new Promise((done) => setTimeout(done, 20));
for (let tries = 0; tries < 50 && $(".tip").hidden; tries++) await soon();
result.tip = $(".tip").textContent;

const resources = performance.getEntriesByType("resource").map((entry) => entry.name);
result.requests = resources.filter((name) => !name.startsWith("data:"));
result.wider_than_window = document.documentElement.scrollWidth > innerWidth;
result.dark = matchMedia("(prefers-color-scheme: dark)").matches;
result.background = getComputedStyle(document.body).backgroundColor;
result.seen = seen;
const out = document.createElement("pre");
out.id = "what-was-seen";
out.textContent = JSON.stringify(result);
document.body.append(out);
})();</script>"""


def random_trace(experts: int, layers: int, top_k: int) -> RoutingTrace:
    rng = np.random.default_rng(0)
    return RoutingTrace.from_arrays(
        np.argsort(rng.random((400, layers, experts)), axis=2)[:, :, :top_k],
        num_experts=experts,
        sequence=np.arange(400) // 10,
        model="<script>alert(1)</script>",
    )


def recorded_trace() -> RoutingTrace:
    """Real routing of gpt-oss-20b: 24 layers, 32 experts, top-4."""
    path = TRACES / "gptoss20b_mmlu_validation.npz"
    if not path.exists():
        pytest.skip(f"{path} is absent; it is not part of the repository")
    recorded = np.load(path, allow_pickle=False)
    sequence, count = recorded["seq"], int(recorded["num_experts"])
    return RoutingTrace.from_arrays(recorded["experts"], num_experts=count, sequence=sequence)


def make_page(folder: Path, trace: RoutingTrace, topology: Topology) -> Path:
    trace.save(folder / "trace")
    place(trace, topology, solving=Solving(method="load-only")).save(folder / "plan.json")
    job = ReportJob(folder / "trace", [folder / "plan.json"], folder / "report.html")
    run_report(job, lambda what, done, total: None)
    return job.output


def read(page: Path, *options: str, width: int = 1200) -> dict[str, Any]:
    """Return what the reader saw of the page."""
    text = page.read_text().replace("<style>", f"{FIRST}<style>", 1).replace("</body>", f"{LAST}</body>")
    played = page.with_name("played.html")
    played.write_text(text)
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900",
        f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=10000", *options,
        "--dump-dom", played.as_uri(),
    ]  # fmt: skip
    dump = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r'<pre id="what-was-seen">(.*?)</pre>', dump, re.DOTALL)
    assert found, dump[-2000:]
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.parametrize(
    ("trace", "topology"),
    [
        pytest.param(partial(random_trace, 8, 4, 2), Topology(gpus_per_node=4), id="small"),
        pytest.param(
            recorded_trace, Topology(num_nodes=2, gpus_per_node=4), id="gpt-oss-20b", marks=pytest.mark.data
        ),
        pytest.param(
            partial(random_trace, 256, 58, 8),
            Topology(num_nodes=4, gpus_per_node=8),
            id="DeepSeek-V3's shape",
        ),
    ],
)
def test_the_page_works(tmp_path: Path, trace: Callable[[], RoutingTrace], topology: Topology) -> None:
    seen = read(make_page(tmp_path, trace(), topology))
    assert seen["seen"] == []
    assert seen["requests"] == []
    assert seen["ready_ms"] < 3000
    assert not seen["wider_than_window"]

    assert seen["by_id"][0] == "layers 0 and 1, by id"
    assert seen["by_plan"][0] == "layers 0 and 1, by the GPUs of plan"
    assert seen["next_pair"][0] == "layers 1 and 2, by the GPUs of plan"
    assert seen["layers"] == "1 and 2"
    assert len({seen[name][1] for name in ("by_id", "by_plan", "next_pair")}) == 3
    assert seen["by_id"][2] == ""
    assert seen["by_plan"][2].count("M") == 2 * (topology.num_ranks - 1)
    assert seen["pairs_before"] == [True, False]
    assert seen["pairs_after"] == [False, True]
    assert re.fullmatch(r"expert: 0; layer of the model: 0; about [\d.]+ times the mean .*", seen["tip"])


def test_dark_and_narrow(tmp_path: Path) -> None:
    page = make_page(tmp_path, random_trace(8, 4, 2), Topology(gpus_per_node=4))
    light = read(page)
    dark = read(page, "--force-dark-mode", "--blink-settings=preferredColorScheme=0", width=500)
    assert (light["dark"], dark["dark"]) == (False, True)
    assert light["background"] != dark["background"]
    assert not dark["wider_than_window"]
    assert dark["seen"] == []

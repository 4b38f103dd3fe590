"""Photographs the report: python docs/figures/report.py (needs Chromium)

The first screens of a report on routing of text that the shipped model was not trained on, for a plan made
from three quarters of its sequences and judged on the others.
"""

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

from exflow.commands.report import ReportJob, run_report
from exflow.placement.make_plan import place
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.confidence import split_by_sequence
from exflow.profiling.trace import RoutingTrace

HERE = Path(__file__).parent
TRACE = HERE.parents[1] / "models" / "gpt-moe-demo" / "early-traces" / "step-002200"
GPUS = Topology(gpus_per_node=4)
SIZE = "1130,1575"


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium-browser"
    with TemporaryDirectory() as name:
        folder = Path(name)
        profiled, held_out = split_by_sequence(RoutingTrace.load(TRACE), 0.25)
        held_out.save(folder / "trace")
        place(profiled, GPUS).save(folder / "affinity.json")
        page = folder / "report.html"
        job = ReportJob(folder / "trace", [folder / "affinity.json"], page)
        run_report(job, lambda what, done, total: None)
        options = ["--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={SIZE}"]
        options += [f"--user-data-dir={folder / 'profile'}", f"--screenshot={HERE / 'report.png'}"]
        subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    main()

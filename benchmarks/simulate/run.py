"""`exflow simulate` beside measured runs, on clusters that nobody has, and in the ExFlow paper's settings.

    python -m benchmarks.simulate.run calibrate TRACES -o FILE.json
    python -m benchmarks.simulate.run SCENARIO TRACES -o FILE.json [--gpus N]...
    python -m benchmarks.simulate.run paper TRACES -o FILE.json [--gpus N]... [--routing recorded]
    python -m benchmarks.simulate.run show -o FILE.json [--drawing FILE.svg]

calibrate predicts the steps of results/decode-*xh*.json and results/hosts.json, on the routing and the plans
that those benchmarks make, and prints the error of each. SCENARIO is a model on a machine in several
sizes (see SCENARIOS). Every part replaces its own entry of FILE, size by size, with command and date. TRACES
is a folder of recorded routing (.npz).
"""

import argparse
import json
import math
import re
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.simulate.calibrate import calibrate
from benchmarks.simulate.drawing import draw
from benchmarks.simulate.paper import PAPER_BATCHES, PAPER_CONTEXT, paper
from benchmarks.simulate.scenarios import SCENARIOS, simulate
from benchmarks.simulate.show import show
from exflow.files import atomic_path


def in_lines(document: dict[str, Any]) -> str:
    """JSON with a line for every row."""
    text = json.dumps(document, indent=1)
    return re.sub(r"\{[^{}\[\]]*\}", lambda row: " ".join(row[0].split()), text) + "\n"


def rounded(value: Any) -> Any:
    """The value with floats of four digits: nothing here is known better."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value


def made(arguments: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    """Run a part and return its entry. `before` is the stored entry, of which sizes not run now are kept."""
    entry: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat()}
    command, only = command_of(arguments), arguments.gpus or []
    match arguments.part:
        case "calibrate":
            entry |= {"command": command} | calibrate(arguments.traces)
        case "paper":
            rows = paper(arguments.traces, arguments.routing or ["recorded", "generated"], only)
            anew = {(row["routing"], row["gpus"]) for row in rows}
            kept = [row for row in before.get("rows", []) if (row["routing"], row["gpus"]) not in anew]
            of_sizes = {f"{kind}, {gpus}": command for kind, gpus in sorted(anew)}
            entry |= {"batches": PAPER_BATCHES, "context": PAPER_CONTEXT, "rows": kept + rows}
            entry["commands"] = before.get("commands", {}) | of_sizes
        case name:
            scenario = SCENARIOS[name]
            entry |= {"scenario": asdict(scenario), "machines": before.get("machines", {})}
            of_sizes = dict.fromkeys(map(str, only or scenario.gpus), command)
            entry["commands"] = before.get("commands", {}) | of_sizes
            for machine, sizes in simulate(scenario, arguments.traces, only).items():
                entry["machines"].setdefault(machine, {}).update(sizes)
    return entry


def command_of(arguments: argparse.Namespace) -> str:
    paths = {str(arguments.traces): "TRACES", str(arguments.output): arguments.output.name}
    shown = [paths.get(part, part) for part in sys.argv[1:]]
    return " ".join(["python", "-m", "benchmarks.simulate.run", *shown])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["calibrate", *SCENARIOS, "paper", "show"])
    parser.add_argument("traces", type=Path, nargs="?", help="folder of recorded routing")
    parser.add_argument("--gpus", type=int, action="append", help="run only this number of GPUs; repeatable")
    parser.add_argument("--routing", action="append", choices=["recorded", "generated"], help="for paper")
    parser.add_argument("--drawing", type=Path, help="file for the curves of docs/simulate.md")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.part != "show" and arguments.traces is None:
        parser.error("give the folder of recorded routing")
    return arguments


def main() -> None:
    arguments = parse()
    document = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    if arguments.part == "show":
        show(document)
        if arguments.drawing is not None:
            draw(document, arguments.drawing)
        return
    entry = made(arguments, document.get(arguments.part, {}))
    document[arguments.part] = rounded(entry)
    with atomic_path(arguments.output) as path:
        path.write_text(in_lines(document), encoding="utf-8")
    show({arguments.part: entry})


if __name__ == "__main__":
    main()

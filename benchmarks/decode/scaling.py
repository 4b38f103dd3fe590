"""Scaling of the decode benchmark's steps with GPUs: measured on some numbers of them, predicted on more.

    python -m benchmarks.decode.scaling results/decode-2xh100.json results/decode-4xh100.json \
        --predict CASES2 CASES4 CASES8 --batch 256 -o FILE.json [--drawing FILE.svg]

RESULTs are of decode/run.py on the same cards, fewest first. CASESn is a folder of decode/cases.py --ranks n.
The cost model predicts its steps with links and memory as measured on n GPUs, or by the last RESULT. Tokens
per second of dispatch-combine with affinity placement, one-sided and over NCCL, measured and predicted.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from exflow.cost.auto import predictions
from exflow.cost.workload import Workload
from exflow.files import atomic_path, read_json
from exflow.model.config import ModelConfig
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.time.machine import Link, Machine
from exflow.report.axes import FOOT, HIGH, LEFT, TOP, Axis, axis_of, curve, frame, marker
from exflow.report.draw.svg import WIDTH, drawing, standing_alone, text
from exflow.validation import validated

STRATEGY, PLACEMENT = Strategy.DISPATCH_COMBINE, "affinity"
TRANSPORTS = ("one-sided", "collective")


def machine_of(figures: dict[str, Any]) -> Machine:
    """The machine as decode/run.py stored it."""
    known = {field.name for field in fields(Machine)}
    links = {name: Link(**figures[name]) for name in ("inside", "between")}
    return Machine(**{name: value for name, value in figures.items() if name in known} | links)


def gpus_of(result: dict[str, Any]) -> int:
    return int(result["hardware"].split()[0])


def measured(result: dict[str, Any], batch: int) -> dict[tuple[str, int, str], float]:
    """Tokens per second, by case, GPUs and transport."""
    return {
        (case["case"], gpus_of(result), row["transport"]): row["tokens_per_s"]
        for case in result["cases"]
        for row in case["rows"]
        if case["batch"] == batch and (row["strategy"], row["placement"]) == (STRATEGY, PLACEMENT)
    }


def predicted(
    folder: Path, batch: int, results: list[dict[str, Any]]
) -> Iterator[tuple[tuple[str, int, str], float]]:
    """Tokens per second by the cost model, for the cases in a folder, on as many GPUs as their plans have."""
    for at in sorted(folder.iterdir()):
        path = at / "config.json"
        config = validated(
            ModelConfig, read_json(path, "model configuration", "run benchmarks/decode/cases.py"), path
        )
        plan = Plan.load(at / f"{PLACEMENT}.json")
        result = next((each for each in results if gpus_of(each) == plan.num_ranks), results[-1])
        load = Workload.of(config, plan, batch, result["context"], 2)
        for machine in map(machine_of, result["machines"]):
            steps = {each.strategy: each.step_s for each in predictions(load, plan, machine)}
            yield (at.name, plan.num_ranks, machine.transport), batch / steps[STRATEGY]


def picture(rows: list[dict[str, Any]], case: str, batch: int) -> str:
    """The drawing: measured points with markers, predicted ones without."""
    mine = [row for row in rows if row["case"] == case]
    gpus = sorted({row["gpus"] for row in mine})
    kinds = [(transport, of) for transport in TRANSPORTS for of in ("measured", "predicted")]
    points = {
        (transport, of): sorted(
            (row["gpus"], row[of]) for row in mine if row["transport"] == transport and of in row
        )
        for transport, of in kinds
    }
    x = Axis(gpus[0], gpus[-1], LEFT + 10, WIDTH - 24, gpus, logarithmic=True)
    y = axis_of([0.0, *(value for line in points.values() for _, value in line)], TOP + HIGH, TOP)
    parts = [frame(x, y, "GPUs", "tokens/s")]
    for colour, kind in enumerate(kinds):
        places = [(x.at(at), y.at(value)) for at, value in points[kind]]
        row = TOP + HIGH + FOOT + 20.0 * colour
        parts += [marker((LEFT + 6, row - 4), colour), text(LEFT + 20, row, ", ".join(kind))]
        parts += [curve(places, colour), *(marker(place, colour) for place in places)]
    title = f"Tokens per second by number of GPUs, {case}, batch {batch}"
    return standing_alone(drawing(TOP + HIGH + FOOT + 80.0, title, parts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument(
        "--predict", type=Path, nargs="+", required=True, help="folders that decode/cases.py wrote"
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--case", default="top1-64", help="that is drawn")
    parser.add_argument("--drawing", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    results = [read_json(path, "result", "run benchmarks/decode/run.py") for path in given.results]
    speeds = {key: speed for result in results for key, speed in measured(result, given.batch).items()}
    foreseen = dict(pair for folder in given.predict for pair in predicted(folder, given.batch, results))
    rows: list[dict[str, Any]] = [
        {"case": key[0], "gpus": key[1], "transport": key[2]}
        | ({"measured": speeds[key]} if key in speeds else {})
        | {"predicted": foreseen[key]}
        for key in sorted(foreseen, key=lambda key: (key[0], key[2], key[1]))
        if key[0] in {case for case, *_ in speeds}
    ]
    for row in rows:
        took = f"{row['measured']:10,.0f}" if "measured" in row else "         -"
        print(f"{row['case']:10} {row['transport']:11} {row['gpus']} GPUs {took} {row['predicted']:10,.0f}")
    document = {"batch": given.batch, "machines": results[-1]["hardware"], "rows": rows}
    with atomic_path(given.output) as path:
        path.write_text(json.dumps(document, indent=1) + "\n")
    if given.drawing:
        with atomic_path(given.drawing) as path:
            path.write_text(picture(rows, given.case, given.batch), encoding="utf-8")


if __name__ == "__main__":
    main()

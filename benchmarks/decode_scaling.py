"""How the decode benchmark's steps scale with GPUs: measured on some numbers of them, predicted on more.

    python benchmarks/decode_scaling.py results/decode-2xh100.json results/decode-4xh100.json \
        --predict CASES8 --batch 256 -o FILE.json [--drawing FILE.svg]

RESULTs are of decode.py on the same cards. CASES8 is what decode_cases.py --ranks 8 wrote: its steps are
predicted by the cost model with the links and the memory that the last RESULT measured. Tokens per second of
dispatch-combine with affinity placement, one-sided and over NCCL, beside what the model says of each.
"""

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from exflow.auto import predictions
from exflow.config import ModelConfig, validated
from exflow.cost_model import Link, Load, Machine
from exflow.files import atomic_path, read_json
from exflow.placement.plan import Plan
from exflow.report.axes import FOOT, HIGH, LEFT, TOP, Axis, axis_of, curve, frame, marker
from exflow.report.svg import WIDTH, drawing, standing_alone, text

STRATEGY, PLACEMENT = "dispatch-combine", "affinity"
TRANSPORTS = ("one-sided", "collective")


def machine_of(figures: dict[str, Any]) -> Machine:
    """As decode.py wrote it down."""
    known = {field.name for field in fields(Machine)}
    links = {name: Link(**figures[name]) for name in ("inside", "between")}
    return Machine(**{name: value for name, value in figures.items() if name in known} | links)


def measured(result: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    ranks = int(result["hardware"].split()[0])
    return [
        {
            "case": case["case"],
            "gpus": ranks,
            "transport": row["transport"],
            "measured": row["tokens_per_s"],
            "predicted": batch / predicted_us(case, row["transport"]) * 1e6,
        }
        for case in result["cases"]
        for row in case["rows"]
        if case["batch"] == batch and (row["strategy"], row["placement"]) == (STRATEGY, PLACEMENT)
    ]


def predicted_us(case: dict[str, Any], transport: str) -> float:
    """What was predicted on the spot, before the step was timed."""
    wanted = (transport, PLACEMENT)
    return float(
        next(
            each["step_us"][STRATEGY]
            for each in case["predicted"]
            if (each["transport"], each["placement"]) == wanted
        )
    )


def foretold(folder: Path, batch: int, context: int, machines: list[Machine]) -> list[dict[str, Any]]:
    """On as many GPUs as the cases' plans have."""
    rows = []
    for at in sorted(folder.iterdir()):
        path = at / "config.json"
        config = validated(ModelConfig, read_json(path, "model configuration", "run decode_cases.py"), path)
        plan = Plan.load(at / f"{PLACEMENT}.json")
        load = Load.of(config, plan, batch, context, 2)
        for machine in machines:
            step_s = next(
                each.step_s for each in predictions(load, plan, machine) if each.strategy == STRATEGY
            )
            rows.append(
                {
                    "case": at.name,
                    "gpus": plan.num_ranks,
                    "transport": machine.transport,
                    "predicted": batch / step_s,
                }
            )
    return rows


def picture(rows: list[dict[str, Any]], case: str, batch: int) -> str:
    """Measured with markers, predicted without."""
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
    parser.add_argument("--predict", type=Path, required=True, help="folder that decode_cases.py wrote")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--case", default="top1-64", help="that is drawn")
    parser.add_argument("--drawing", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    results = [read_json(path, "result", "run benchmarks/decode.py") for path in given.results]
    machines = [machine_of(figures) for figures in results[-1]["machines"]]
    rows = [row for result in results for row in measured(result, given.batch)]
    rows += foretold(given.predict, given.batch, results[-1]["context"], machines)
    rows.sort(key=lambda row: (row["case"], row["transport"], row["gpus"]))
    for row in rows:
        took = f"{row['measured']:10,.0f}" if "measured" in row else "         -"
        foreseen = f"{row['predicted']:10,.0f} tokens/s"
        print(f"{row['case']:10} {row['transport']:11} {row['gpus']} GPUs {took} {foreseen}")
    document = {"batch": given.batch, "machines": results[-1]["hardware"], "rows": rows}
    with atomic_path(given.output) as path:
        path.write_text(json.dumps(document, indent=1) + "\n")
    if given.drawing:
        with atomic_path(given.drawing) as path:
            path.write_text(picture(rows, given.case, given.batch), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Tables of measured against predicted steps: errors, ratios of strategies, and the choice of the fastest."""

import statistics
from typing import Any

from benchmarks.simulate.measured_steps import Measured


def row(each: Measured) -> dict[str, Any]:
    predicted = each.on(each.point.machine).seconds
    return {
        "run": each.run,
        "case": each.case,
        "batch": each.point.batch,
        "strategy": each.variant.strategy,
        "transport": each.transport,
        "placement": each.variant.placement,
        "measured_ms": 1e3 * each.seconds,
        "predicted_ms": 1e3 * predicted,
        "error": predicted / each.seconds - 1,
        "use": each.use,
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Signed errors by run, use and transport."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        groups.setdefault((row["run"], row["use"], row["transport"]), []).append(row["error"])
    return [
        {"run": run, "use": use, "transport": transport, "steps": len(errors)}
        | {"mean": statistics.mean(errors), "least": min(errors), "most": max(errors)}
        | {"mean_absolute": statistics.mean(map(abs, errors))}
        for (run, use, transport), errors in groups.items()
    ]


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of each strategy over dispatch-combine's, measured and predicted, over one-sided writes and in the
    same placement."""
    by_name = {
        (row["run"], row["case"], row["batch"], row["placement"], row["strategy"]): row
        for row in rows
        if row["transport"] == "one-sided"
    }
    found = []
    for (*where, strategy), row in by_name.items():
        base = by_name[(*where, "dispatch-combine")]
        if strategy != "dispatch-combine":
            measured, predicted = (row[of] / base[of] for of in ("measured_ms", "predicted_ms"))
            names = dict(zip(("run", "case", "batch", "placement"), where, strict=True))
            found.append(names | {"strategy": strategy, "measured": measured, "predicted": predicted})
    return found


def choices(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case, over one-sided writes: the strategy predicted to be fastest, and its time over the
    best's."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["transport"] == "one-sided":
            cases.setdefault((row["run"], row["case"], row["batch"]), []).append(row)
    found = []
    for (run, case, batch), mine in cases.items():
        if len({row["strategy"] for row in mine}) == 1:
            continue  # no choice
        chosen = min(mine, key=lambda row: row["predicted_ms"])
        best = min(mine, key=lambda row: row["measured_ms"])
        found.append(
            {"run": run, "case": case, "batch": batch}
            | {"chosen": chosen["strategy"], "best": best["strategy"]}
            | {"times_best": chosen["measured_ms"] / best["measured_ms"]}
        )
    return found

"""Prints the rows of a case."""

from typing import Any

from benchmarks.decode.case import Case


def show(case: Case, batch: int, rows: list[dict[str, Any]]) -> None:
    """Print the rows. Ratios are to the host-synced baseline and to captured collectives, both contiguous."""
    base = {
        (row["strategy"], row["transport"]): row["median_us"]
        for row in rows
        if row["placement"] == "contiguous"
    }
    print(f"\n{case.name}, batch {batch}")
    print(
        "strategy          transport   placement    step us     p99   tokens/s  x floor"
        "  x host-synced  x two NCCL"
    )
    for row in rows:
        ratios = [
            f"{base[baseline] / row['median_us']:10.2f}" if baseline in base else "         -"
            for baseline in (("host-synced", "eager"), ("dispatch-combine", "collective"))
        ]
        print(
            f"{row['strategy']:17} {row['transport']:11} {row['placement']:10} {row['median_us']:9.0f} "
            f"{row['p99_us']:7.0f} {row['tokens_per_s']:10.0f} {row.get('times_floor', 0):8.2f} "
            + "   ".join(ratios),
            flush=True,
        )


def show_auto(rows: list[dict[str, Any]], predicted: list[dict[str, Any]]) -> None:
    """Print the choice of `auto` for each transport and placement, and its time over the best's."""
    taken = {(row["strategy"], row["transport"], row["placement"]): row["median_us"] for row in rows}
    for each in predicted:
        here = {
            name: taken[name, each["transport"], each["placement"]]
            for name in each["step_us"]
            if (name, each["transport"], each["placement"]) in taken
        }
        chosen = min(here, key=each["step_us"].__getitem__)
        print(
            f"auto, {each['transport']}, {each['placement']}: {chosen}, predicted "
            f"{each['step_us'][chosen]:.0f} us, x best {here[chosen] / min(here.values()):.3f}"
        )

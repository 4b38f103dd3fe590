"""Prints the entries of a file of results."""

import statistics
from typing import Any

from benchmarks.simulate.measured_steps import RUNS
from benchmarks.simulate.scenarios import SCENARIOS


def show(document: dict[str, Any]) -> None:
    if "calibrate" in document:
        _show_calibration(document["calibrate"])
    for name in SCENARIOS:
        if name in document:
            _show_scenario(name, document[name])
    for row in document.get("paper", {}).get("rows", []):
        _show_paper(row)


def _show_calibration(found: dict[str, Any]) -> None:
    print(f"layer_s fitted: {found['fitted_layer_us']:.1f} us, to {found['fitted_to']}")
    print("run, case, batch, strategy, transport, placement, measured ms, predicted ms, error")
    for row in found["captured"]:
        what = f"{row['strategy']:17} {row['transport']:11} {row['placement']:10}"
        times = f"{row['measured_ms']:9.3f} {row['predicted_ms']:9.3f} {row['error']:+7.1%}"
        print(f"{row['run']:14} {row['case']:13} {row['batch']:5} {what} {times}  {row['use']}")
    for row in found["summary"]:
        errors = f"mean {row['mean']:+.1%}, {row['least']:+.1%} to {row['most']:+.1%}"
        what = f"{row['run']:14} {row['use']:11} {row['transport']:11} {row['steps']:3} steps"
        print(f"{what}: {errors}, absolute {row['mean_absolute']:.1%}")
    _show_ratios(found["ratios"])
    right = sum(each["chosen"] == each["best"] for each in found["choice"])
    worst = max(each["times_best"] for each in found["choice"])
    print(f"fastest: right in {right} of {len(found['choice'])} cases, at most {worst:.3f} times the best")
    for row in found["hosts"]:
        times = f"{row['measured_ms']:7.0f} {row['predicted_ms']:7.0f} {row['error']:+.1%}"
        print(f"hosts {row['shape']:9} group {row['group']} {row['placement']:10} {times}")
    for row in found["published"]:
        print(f"DeepEP {row['ranks']:3} {row['what']:8} {row['published_us']} us {row['error']:+.1%}")


def _show_ratios(ratios: list[dict[str, Any]]) -> None:
    for run in RUNS:
        for strategy in ("coherent", "replicated"):
            errors = [
                each["predicted"] / each["measured"] - 1
                for each in ratios
                if (each["run"], each["strategy"]) == (run, strategy)
            ]
            if not errors:
                continue
            spread = f"{min(errors):+.1%} to {max(errors):+.1%}"
            print(f"{run} {strategy} over dispatch-combine: {statistics.mean(errors):+.1%}, {spread}")


def _show_scenario(name: str, found: dict[str, Any]) -> None:
    for machine, sizes in found["machines"].items():
        for gpus, batches in sorted(sizes.items(), key=lambda item: int(item[0])):
            for batch, size in batches.items():
                steps = ", ".join(
                    f"{each['strategy'][:8]} {each['placement'][:3]} {each['step_ms']:.2f}"
                    for each in size["steps"]
                    if each["fits"]
                )
                where = f"{name} {machine} {gpus} GPUs ({size['expert_parallel']}) batch {batch}"
                print(f"{where}: {size['fastest']}: {steps}")
                for turn in size["turns"]:
                    value = f"x {turn['factor']:.3g} = {turn['value']:.4g} {turn['unit']}"
                    print(f"    {turn['quantity']} {value}: {turn['strategy']}")


def _show_paper(row: dict[str, Any]) -> None:
    where = f"{row['routing']:9} {row['experts']:2} experts {row['gpus']:2} GPUs batch {row['batch']:3}"
    vanilla = f"vanilla {row['vanilla_ms']:.2f} ms, {row['vanilla_exchange_ms']:.2f} of exchanges"
    print(f"{where}: {vanilla}; fastest {row['fastest']}")
    for name, each in row.items():
        if isinstance(each, dict):
            free = each["throughput_if_sharing_were_free"]
            gains = f"x {each['throughput']:.2f}, sharing free x {free:.2f}"
            rest = f"K/V not hidden {each['background_ms']:.2f} ms"
            print(f"    {name:28} exchanges {-each['exchange_less']:+.0%}, throughput {gains}, {rest}")

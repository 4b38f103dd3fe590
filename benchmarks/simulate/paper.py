"""The ExFlow paper's settings: coherence with affinity against dispatch-combine with contiguous placement."""

from pathlib import Path
from typing import Any

from benchmarks.decode.cases import generated, grid_config
from benchmarks.simulate.common import MACHINES, PLACE_SECONDS, tell
from benchmarks.simulate.routing import routing
from exflow.cost.simulate import Layout, Point, Variant, fastest, step, variants
from exflow.placement.plan.strategy import Strategy
from exflow.placement.time.machines import load_machine

PAPER = ((8, (4, 8)), (16, (4, 8, 16)), (32, (4, 8, 16, 32)), (64, (4, 8, 16, 32, 64)))
PAPER_BATCHES = (64, 512)  # sequences a GPU: not known
PAPER_CONTEXT = 128  # not known


def paper(traces: Path, kinds: list[str], only: list[int]) -> list[dict[str, Any]]:
    """Coherent with affinity against dispatch-combine with contiguous placement, on A100s, four a node.

    Routing is `recorded` (first choices of other models; of 16 experts generated), or `generated`, level and
    with planted affinity. Sharing keys and values takes what it must, or nothing, as the paper counts.
    """
    machine, found = load_machine(MACHINES / "a100-hdr.yaml"), []
    for kind in kinds:
        for experts, sizes in PAPER:
            config = grid_config(f"paper-{experts}", experts)
            name = f"top1-{experts}"
            train, test = routing(name, traces)[1:] if kind == "recorded" else generated(experts, 1)
            for gpus in [gpus for gpus in sizes if gpus in (only or sizes)]:
                topology = Layout.of(gpus, 4, experts).topology
                choice = variants(train, test, topology, PLACE_SECONDS, tell)
                for batch in PAPER_BATCHES:
                    point = Point(config, batch * gpus, PAPER_CONTEXT, machine)
                    found.append({"routing": kind, "experts": experts, "gpus": gpus, "batch": batch})
                    found[-1] |= against_vanilla(choice, point)
    return found


def against_vanilla(choice: list[Variant], point: Point) -> dict[str, Any]:
    """Figures of each strategy with affinity, and of coherence without, against vanilla: saved exchange time,
    throughput, and throughput if sharing keys and values took no time."""
    by_name = {(each.strategy, each.placement): step(each, point) for each in choice}
    vanilla = by_name[Strategy.DISPATCH_COMBINE, "contiguous"]
    figures: dict[str, Any] = {
        "vanilla_ms": 1e3 * vanilla.seconds,
        "vanilla_exchange_ms": 1e3 * vanilla.prediction.exchange_s,
    }
    for (strategy, placement), mine in by_name.items():
        if placement == "affinity" or strategy == "coherent":
            shared_s = mine.prediction.background_s
            figures[f"{strategy}, {placement}"] = {
                "exchange_less": 1 - mine.prediction.exchange_s / vanilla.prediction.exchange_s,
                "throughput": vanilla.seconds / mine.seconds,
                "throughput_if_sharing_were_free": vanilla.seconds / (mine.seconds - shared_s),
                "background_ms": 1e3 * shared_s,
                "attending": mine.variant.traffic.attention_imbalance,
                "fits": mine.fits,
            }
    best = fastest(choice, point)
    figures["fastest"] = None if best is None else [best.variant.strategy, best.variant.placement]
    return figures

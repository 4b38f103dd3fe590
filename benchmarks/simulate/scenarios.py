"""Scenarios on clusters that nobody measured: a model on a machine, in several numbers of GPUs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.simulate.common import MACHINES, PLACE_SECONDS, tell
from benchmarks.simulate.routing import routing
from exflow.commands.simulate import Size
from exflow.cost.crossover import crossovers
from exflow.cost.simulate import Layout, Point, Variant, step, variants
from exflow.model.config import ModelConfig
from exflow.placement.plan.topology import Topology
from exflow.placement.time.machines import load_machine


@dataclass(frozen=True)
class Scenario:
    """A model with its routing on a machine, in several sizes; batches are sequences a GPU."""

    model: str
    machines: tuple[str, ...]
    gpus_per_node: int
    gpus: tuple[int, ...]
    batches: tuple[int, ...]
    context: int


SIZES = (2, 4, 8, 16, 32, 64, 128, 256)  # of a group; more GPUs than experts are further groups
SCENARIOS = {
    "gpt-oss": Scenario("gpt-oss-20b", ("h200", "h200-relayed", "h200-nccl"), 8, SIZES[:5], (1, 8, 64), 1024),
    "deepseek": Scenario("deepseek-v3-like", ("h200",), 8, SIZES[3:], (1, 8, 64), 4096),
    "top1": Scenario("top1-64", ("a100-hdr",), 4, SIZES[1:6], (1, 8, 64), 512),
    "hosts": Scenario("hosts-top1", ("hosts-1gbit",), 1, SIZES[:5], (1, 8, 128), 8),
    "hosts-gpt-oss": Scenario("hosts-gpt-oss", ("hosts-1gbit",), 1, SIZES[:5], (1, 8, 128), 8),
}


def simulate(scenario: Scenario, traces: Path, sizes: list[int]) -> dict[str, Any]:
    """Figures by machine, GPUs and batch; crossovers for the batch of 64 a GPU (or the middle one)."""
    config, train, test = routing(scenario.model, traces)
    found: dict[str, Any] = {}
    choices: dict[Topology, list[Variant]] = {}
    for gpus in sizes or scenario.gpus:
        layout = Layout.of(gpus, scenario.gpus_per_node, config.num_experts)
        if layout.topology not in choices:
            choices[layout.topology] = variants(train, test, layout.topology, PLACE_SECONDS, tell)
        choice = choices[layout.topology]
        for machine in scenario.machines:
            of_machine = found.setdefault(machine, {}).setdefault(str(gpus), {})
            for batch in scenario.batches:
                of_machine[str(batch)] = size_of(layout, batch, config, scenario.context, machine, choice)
    return found


def size_of(
    layout: Layout, batch: int, config: ModelConfig, context: int, machine: str, choice: list[Variant]
) -> dict[str, Any]:
    point = Point(config, batch * layout.width, context, load_machine(MACHINES / f"{machine}.yaml"))
    steps = tuple(step(variant, point) for variant in choice)
    return Size(layout, batch * layout.gpus, point, steps, tuple(crossovers(choice, point))).as_json()

"""From files to a running engine: a checkpoint, and for a job of several ranks a plan and a strategy."""

from dataclasses import dataclass
from pathlib import Path

import torch

from exflow.checkpoint import load_decoder
from exflow.config import ModelConfig, load_model_config
from exflow.distributed import Cluster, alike_on_all_ranks
from exflow.engine import Engine
from exflow.errors import InputError
from exflow.exchange import Exchange
from exflow.moe import PlanTables
from exflow.placement.baselines import contiguous
from exflow.placement.plan import Plan
from exflow.placement.topology import Topology
from exflow.strategies import Name, make_strategy, single_process


@dataclass(frozen=True)
class Deployment:
    """What every rank of a job must agree on."""

    model: Path
    strategy: Name
    plan: Plan
    dtype: torch.dtype = torch.float32


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Engine:
    """The model in checkpoint folder `folder`, whole, in this process. Raises InputError for bad files."""
    return Engine(load_decoder(Path(folder), torch.device(device), dtype), single_process())


def contiguous_plan(config: ModelConfig, topology: Topology) -> Plan:
    """The placement of a launch without a plan: the first experts on rank 0, and so on."""
    ranks = contiguous(len(config.moe_layer_ids), config.num_experts, topology.num_ranks)
    return Plan(
        model=config.name,
        num_hidden_layers=config.num_hidden_layers,
        moe_layer_ids=config.moe_layer_ids,
        num_experts=config.num_experts,
        topology=topology,
        physical_to_logical_map=ranks.argsort(axis=1, kind="stable"),
        next_owner=None,
        method="contiguous",
    )


def plan_for(model: Path, plan: Path | None, topology: Topology) -> Plan:
    """Read a plan (or make the contiguous one) and check it against the model and the ranks at hand."""
    config = load_model_config(model)
    if plan is None:
        return contiguous_plan(config, topology)
    loaded = Plan.load(plan)
    try:
        loaded.check_model(config.num_experts, config.moe_layer_ids, topology.num_ranks)
    except InputError as error:
        raise InputError(f"{plan}: {error}") from error
    return loaded


def deploy(deployment: Deployment, cluster: Cluster) -> Engine:
    """This rank's engine: it reads and holds the experts of its own slots alone. Collective.

    Raises InputError on every rank alike if any rank finds a file at fault.
    """
    plan = deployment.plan
    first = cluster.rank * plan.slots_per_rank
    experts_here = plan.physical_to_logical_map[:, first : first + plan.slots_per_rank].tolist()
    decoder = alike_on_all_ranks(
        cluster, lambda: load_decoder(deployment.model, cluster.device, deployment.dtype, experts_here)
    )
    tables = PlanTables.of(plan, cluster.device)
    config = decoder.config
    strategy = make_strategy(
        deployment.strategy, Exchange(cluster), tables, config.moe_layer_ids, config.num_hidden_layers
    )
    return Engine(decoder, strategy)

"""Building an engine from weights; a job of several ranks also has a plan and a strategy.

Weights are a checkpoint, or RandomWeights of a configuration.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exflow.comm.collectives import Exchange
from exflow.comm.pairwise import PairwiseExchange
from exflow.comm.transport import alone, choose_transport
from exflow.comm.transport_names import Transport
from exflow.errors import InputError
from exflow.job.cluster import Cluster, annotate_errors, raise_on_all_ranks
from exflow.model.checkpoint import Checkpoint
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.model.random_weights import RandomWeights, random_decoder
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.baselines import contiguous
from exflow.runtime.engine import Engine
from exflow.runtime.expert_parallel import PlanTables
from exflow.runtime.strategies import make_strategy, single_process

if TYPE_CHECKING:
    from exflow.runtime.graph_runner import Capture


@dataclass(frozen=True)
class Deployment:
    """Settings that must be equal on all ranks of a job.

    hierarchical: prompts and eager steps send tokens between nodes by relays.
    """

    weights: Checkpoint | RandomWeights
    strategy: Strategy
    plan: Plan
    dtype: torch.dtype = torch.float32
    transport: str = "auto"
    hierarchical: bool = False


def load_model(
    weights: str | Path | Checkpoint | RandomWeights,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    transport: str = "auto",
) -> Engine:
    """Load a whole model from a checkpoint folder, or with random weights, into this process.

    Raises InputError for bad files.
    """
    if not isinstance(weights, Checkpoint | RandomWeights):
        weights = Checkpoint.open(Path(weights))
    decoder = decoder_of(weights, torch.device(device), dtype)
    cluster = alone(decoder.embedding.weight.device)
    plan = default_plan(decoder.config, Topology(gpus_per_node=1))
    tables = PlanTables.of(plan, cluster.device)
    chosen = choose_transport(transport, cluster)
    return Engine(decoder, single_process(), _capture(decoder, tables, cluster, Strategy.COHERENT, chosen))


def decoder_of(
    weights: Checkpoint | RandomWeights,
    device: torch.device,
    dtype: torch.dtype,
    experts_here: list[list[int]] | None = None,
) -> Decoder:
    """Load the decoder with a rank's experts, by default all. Raises InputError for bad files."""
    if isinstance(weights, RandomWeights):
        return random_decoder(weights, device, dtype, experts_here)
    return weights.decoder(device, dtype, experts_here)


def default_plan(config: ModelConfig, topology: Topology) -> Plan:
    """The plan of a launch without a plan file: the first experts on rank 0, and so on."""
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


def plan_for(config: ModelConfig, plan: Path | None, topology: Topology) -> Plan:
    """Read a plan (or make the contiguous one) and check it against the model and the ranks at hand."""
    if plan is None:
        return default_plan(config, topology)
    loaded = Plan.load(plan)
    try:
        loaded.check_model(config.num_experts, config.moe_layer_ids, topology.num_ranks)
    except InputError as error:
        raise InputError(f"{plan}: {error}") from error
    return loaded


def experts_of(plan: Plan, rank: int) -> list[list[int]]:
    """Logical expert in each slot of a rank, for each MoE layer."""
    first = rank * plan.slots_per_rank
    experts: list[list[int]] = plan.physical_to_logical_map[:, first : first + plan.slots_per_rank].tolist()
    return experts


def deploy(deployment: Deployment, cluster: Cluster) -> Engine:
    """Build this rank's engine with only the experts of its own slots. Collective.

    Raises InputError on every rank if any rank finds a file at fault.
    """
    plan = deployment.plan
    experts_here = experts_of(plan, cluster.rank)
    with annotate_errors("the loading of the model"):
        decoder = raise_on_all_ranks(
            cluster, lambda: decoder_of(deployment.weights, cluster.device, deployment.dtype, experts_here)
        )
    tables = PlanTables.of(plan, cluster.device)
    config = decoder.config
    strategy = make_strategy(
        deployment.strategy,
        Exchange(cluster, pairwise=PairwiseExchange.between(cluster)),
        tables,
        config.moe_layer_ids,
        config.num_hidden_layers,
        deployment.hierarchical,
    )
    replicated = deployment.strategy == Strategy.REPLICATED
    transport = choose_transport(deployment.transport, cluster, replicated)
    return Engine(decoder, strategy, _capture(decoder, tables, cluster, deployment.strategy, transport))


def _capture(
    decoder: Decoder, tables: PlanTables, cluster: Cluster, strategy: Strategy, transport: Transport
) -> "Capture | None":
    """Settings of this rank's captured steps; None if steps run eagerly."""
    if transport == "eager":
        return None
    from exflow.runtime.graph_runner import Capture

    group = strategy.group_size(cluster.num_ranks, cluster.ranks_per_node)
    return Capture(decoder, tables, cluster, group, strategy == Strategy.REPLICATED, transport)

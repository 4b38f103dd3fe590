"""A case of the decode benchmark, loaded: model, replayed routing and plans."""

from dataclasses import dataclass
from pathlib import Path

import torch

from exflow.files import read_json
from exflow.job.cluster import Cluster
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder
from exflow.model.random_weights import RandomWeights, random_decoder
from exflow.model.replay import ReplayedRouting
from exflow.placement.plan.plan import Plan
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.expert_parallel import PlanTables
from exflow.validation import validated

PLACEMENTS = ("contiguous", "affinity")


@dataclass(frozen=True)
class Case:
    """A model with random weights, the routing it replays, and where its experts may live."""

    name: str
    config: ModelConfig
    decoder: Decoder
    plans: dict[str, Plan]
    tables: dict[str, PlanTables]

    @classmethod
    def load(cls, folder: Path, cluster: Cluster) -> "Case":
        path = folder / "config.json"
        config = validated(
            ModelConfig, read_json(path, "model configuration", "run benchmarks/decode/cases.py"), path
        )
        plans = {name: Plan.load(folder / f"{name}.json") for name in PLACEMENTS}
        # which expert a slot holds makes no difference to how long it takes: all placements share the weights
        held = [list(range(plans["contiguous"].slots_per_rank))] * len(config.moe_layer_ids)
        decoder = random_decoder(RandomWeights(config), cluster.device, torch.bfloat16, held)
        decoder.replay = ReplayedRouting.of(RoutingTrace.load(folder / "trace"), config, cluster.device)
        tables = {name: PlanTables.of(plan, cluster.device) for name, plan in plans.items()}
        return cls(folder.name, config, decoder, plans, tables)

"""The baseline with DeepSpeed's own MoE layer in it, `deepspeed.moe.layer.MoE`, expert-parallel over all.

Its gate decides, with random weights and no token dropped: routing is not replayed, and experts are spread
over the ranks in order. Only GELU experts of top-1 models are run.
"""

import deepspeed
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn

from benchmarks.decode.host_synced import HostSyncedDecode
from exflow.model.decoder import Decoder, MoE
from exflow.runtime.expert_parallel import PlanTables


class DeepSpeedDecode(HostSyncedDecode):
    """The host-synced baseline's attention and batch, with MoE layers of DeepSpeed."""

    def __init__(
        self, decoder: Decoder, tables: PlanTables, rank: int, ranks: int, batch: int, context: int, room: int
    ):
        super().__init__(decoder, tables, rank, ranks, batch, context, room)
        deepspeed.init_distributed("nccl")
        self.layers = [self._layer(decoder, ranks) for _ in decoder.config.moe_layer_ids]

    @staticmethod
    def _layer(decoder: Decoder, ranks: int) -> DeepSpeedMoE:
        config, like = decoder.config, decoder.embedding.weight
        expert = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size, bias=False),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size, bias=False),
        )
        layer = DeepSpeedMoE(
            config.hidden_size, expert, config.num_experts, ep_size=ranks, k=config.top_k, drop_tokens=False
        )
        layer.set_deepspeed_parallelism()
        return layer.to(like.device, like.dtype).eval()

    def moe(self, layer: MoE, hidden: Tensor, position: Tensor) -> Tensor:
        out: Tensor = self.layers[layer.index](layer.norm(hidden))[0]
        return out

    @staticmethod
    def serves(decoder: Decoder) -> bool:
        return decoder.config.top_k == 1 and decoder.config.activation == "gelu"

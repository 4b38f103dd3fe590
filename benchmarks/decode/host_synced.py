"""The baseline: an MoE layer as eager engines run it, over the weights of our decoder.

Two all-to-alls a layer whose sizes are exchanged first and read on the host, as DeepSpeed-MoE, FastMoE and
Tutel's flexible mode do it; experts by torch's grouped product, attention by torch's SDPA over a contiguous
cache. Every rank has batch / ranks sequences, its own from beginning to end.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from exflow.kernels.experts import grouped_experts
from exflow.model.decoder import Decoder, MoE
from exflow.runtime.expert_parallel import PlanTables


class HostSyncedDecode:
    """One rank's batch in the middle of its decode: `advance` runs a step."""

    def __init__(
        self, decoder: Decoder, tables: PlanTables, rank: int, ranks: int, batch: int, context: int, room: int
    ):
        config, weight = decoder.config, decoder.embedding.weight
        self.decoder, self.tables, self.rank, self.ranks = decoder, tables, rank, ranks
        self.sequence = torch.arange(rank, batch, ranks, device=weight.device)
        rows = len(self.sequence)
        shape = (config.num_hidden_layers, 2, rows, config.num_kv_heads, context + room, config.head_dim)
        self.cache = torch.randn(shape, dtype=weight.dtype, device=weight.device)
        self.position = context
        self.token = torch.randint(config.vocab_size, (rows,), device=weight.device)

    @torch.inference_mode()
    def advance(self) -> None:
        decoder, position = self.decoder, torch.full_like(self.sequence, self.position)
        hidden = decoder.embed(self.token, position)
        for layer, block in enumerate(decoder.blocks):
            hidden = self.attend(layer, block.attention, hidden)
            assert isinstance(block.mlp, MoE)
            hidden = hidden + self.moe(block.mlp, hidden, position)
        self.token = decoder.logits(decoder.norm(hidden)).argmax(-1)
        self.position += 1

    def attend(self, layer: int, attention: torch.nn.Module, hidden: Tensor) -> Tensor:
        parts = attention.qkv(attention.norm(hidden)).split(attention.widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, attention.head_dim)) for part in parts)
        keys, values = self.cache[layer]
        keys[:, :, self.position], values[:, :, self.position] = k, v
        past = slice(self.position + 1)
        # one query sees all of the past: no mask. Without cuDNN's kernel, which plans anew for every length
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(
                q[:, :, None], keys[:, :, past], values[:, :, past], enable_gqa=True
            )
        return hidden + attention.out(out.flatten(1))

    def moe(self, layer: MoE, hidden: Tensor, position: Tensor) -> Tensor:
        normed = layer.norm(hidden)
        replay = self.decoder.replay
        dictated = replay.experts(layer.index, replay.row_of(self.sequence, position)) if replay else None
        routing = layer.router(normed, dictated)
        slot = self.tables.serving_slot[self.rank, layer.index][routing.expert_TK].flatten()
        order = torch.argsort(slot)
        to = torch.bincount(slot // self.tables.slots_per_rank, minlength=self.ranks)
        come = torch.empty_like(to)
        dist.all_to_all_single(come, to)
        to_host, come_host = to.tolist(), come.tolist()  # the host waits for the GPU, and for the other ranks
        rows = normed[order // routing.expert_TK.shape[1]]
        arrived = _swap(rows, to_host, come_host)
        arrived_slot = _swap(slot[order], to_host, come_host) - self.rank * self.tables.slots_per_rank
        by_slot = torch.argsort(arrived_slot)
        counts = torch.bincount(arrived_slot, minlength=self.tables.slots_per_rank)
        experts = layer.experts
        out = grouped_experts(arrived[by_slot], counts, experts.w_in, experts.w_out, experts.activation)
        back = _swap(torch.empty_like(out).index_copy_(0, by_slot, out), come_host, to_host)
        unsorted = torch.empty_like(back).index_copy_(0, order, back).view(*routing.expert_TK.shape, -1)
        return (unsorted * routing.weight_TK[..., None].to(back.dtype)).sum(1)


def _swap(rows: Tensor, to: list[int], come: list[int]) -> Tensor:
    arrived = rows.new_empty(sum(come), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), come, to)
    return arrived

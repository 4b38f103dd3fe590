"""K/V cache of the sequences whose context this rank holds, and sharing of new entries in its group.

Shapes: T tokens, H query heads, J key/value heads, C head width, P positions, N sequences held, W = 2 J C.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from exflow.comm.collectives import Exchange, PendingGather, pack, unpack
from exflow.job.cluster import CoherenceGroup
from exflow.model.attention import causal_attention, scaled_dot_product, seen_from
from exflow.model.config import ModelConfig
from exflow.model.decoder import Attention, Rows


@dataclass(frozen=True)
class NewKV:
    """New keys and values side by side [T, W]; layer, sequence id and position of each row [T] int64."""

    layer_T: Tensor
    sequence_T: Tensor
    position_T: Tensor
    kv_TW: Tensor


class KVCache:
    """Keys (side 0) and values (1): `values[layer, side, n, :, p]` for position p of the n-th sequence held.

    The layout [layers, 2, N, J, P, C] makes the memory that a head reads contiguous.
    """

    def __init__(self, values: Tensor, held: Tensor) -> None:
        """held: ascending ids of the sequences to hold."""
        self.values = values
        self.held = held.to(values.device)

    @classmethod
    def empty(
        cls, config: ModelConfig, held: Tensor, num_positions: int, device: torch.device, dtype: torch.dtype
    ) -> Self:
        shape = cache_shape(config, len(held), num_positions)
        return cls(torch.zeros(shape, device=device, dtype=dtype), held)

    def write(self, new: "NewKV") -> None:
        place_T = torch.searchsorted(self.held, new.sequence_T)
        kv_T2JC = new.kv_TW.view(-1, 2, self.values.shape[3], self.values.shape[5])
        for side in (0, 1):
            self.values[new.layer_T, side, place_T, :, new.position_T] = kv_T2JC[:, side]

    def append(self, layer: int, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> "NewKV":
        """Write one layer's new keys and values; returns them in the form in which they are shared."""
        kv_TW = torch.stack([k_TJC, v_TJC], dim=1).flatten(1)
        new = NewKV(torch.full_like(rows.sequence_T, layer), rows.sequence_T, rows.position_T, kv_TW)
        self.write(new)
        return new

    def read(self, layer: int, sequence_T: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of each token's sequence, [T, J, length, C] each."""
        place_T = torch.searchsorted(self.held, sequence_T)
        keys, values = self.values[layer, :, place_T, :, :length]
        return keys, values


def cache_shape(config: ModelConfig, sequences: int, positions: int) -> tuple[int, ...]:
    return (config.num_hidden_layers, 2, sequences, config.num_kv_heads, positions, config.head_dim)


@dataclass
class KVSharing:
    """Sends new keys and values to the other members of this rank's coherence group, in the background."""

    cache: KVCache
    exchange: Exchange
    group: CoherenceGroup
    pending: PendingGather | None = None

    def start(self, new_kv: list[NewKV], counts: list[int]) -> None:
        """Start to share new keys and values; member i of the group has counts[i] rows."""
        self.finish()
        kv_TW = torch.cat([new.kv_TW for new in new_kv])
        places = [torch.stack([new.layer_T, new.sequence_T, new.position_T], dim=1) for new in new_kv]
        packed = pack(kv_TW, torch.cat(places).to(torch.int32))
        self.pending = self.exchange.start_gather(packed, counts, self.group, kv_TW[:1].nbytes)

    def finish(self) -> None:
        """Wait for the pending gather, if any, and write its keys and values to the cache."""
        if self.pending is None:
            return
        width = 2 * self.cache.values.shape[3] * self.cache.values.shape[5]
        kv_TW, whole = unpack(self.pending.wait(), (self.cache.values.dtype, width), (torch.int32, 3))
        layer_T, sequence_T, position_T = whole.long().T.contiguous()
        self.cache.write(NewKV(layer_T, sequence_T, position_T, kv_TW))
        self.pending = None


@dataclass
class PrefillAttention:
    """AttentionContext of whole prompts: rows are sequences one after the other.

    lengths: tokens of each sequence. sharing: gives each layer's keys and values to the group at once; None
    means no group. group_tokens: number of prompt tokens of each member of the group.
    """

    cache: KVCache
    lengths: list[int]
    sharing: KVSharing | None = None
    group_tokens: list[int] = field(default_factory=list)

    def attend(self, layer: Attention, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> Tensor:
        new = self.cache.append(layer.index, k_TJC, v_TJC, rows)
        if self.sharing is not None:
            self.sharing.start([new], self.group_tokens)
        q, k, v = (part.transpose(0, 1).split(self.lengths, dim=1) for part in (q_THC, k_TJC, v_TJC))
        attended = [
            causal_attention(*of_sequence, layer).transpose(0, 1) for of_sequence in zip(q, k, v, strict=True)
        ]
        return torch.cat(attended) if attended else q_THC


@dataclass
class DecodeAttention:
    """AttentionContext of one decode step: each row is the newest token of its sequence.

    length: number of cached positions to read, an upper bound over all sequences. before: called before each
    layer with this object and the layer's number. new_kv: the step's new keys and values so far.
    """

    cache: KVCache
    length: int
    before: Callable[["DecodeAttention", int], None] = lambda attention, layer: None
    new_kv: list[NewKV] = field(default_factory=list)

    def attend(self, layer: Attention, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> Tensor:
        self.before(self, layer.index)
        self.new_kv.append(self.cache.append(layer.index, k_TJC, v_TJC, rows))
        keys, values = self.cache.read(layer.index, rows.sequence_T, self.length)
        seen_TP = seen_from(rows.position_T, self.length, layer.window)
        return scaled_dot_product(q_THC[:, :, None], keys, values, seen_TP[:, None, None], layer.sinks)[
            :, :, 0
        ]

"""Keys and values of the sequences whose context this rank holds, and sharing new ones within its group.

Shapes: T tokens, H query heads, J key/value heads, C head width, P positions, N sequences held, W = 2 J C.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from exflow.attention import scaled_dot_product
from exflow.config import ModelConfig
from exflow.decoder import Rows
from exflow.distributed import CoherenceGroup
from exflow.exchange import Exchange, PendingGather, pack, unpack


class KVCache:
    """`values[layer, side, n, p]` is key (side 0) or value (1) of position p of the n-th sequence held."""

    def __init__(
        self, config: ModelConfig, held: Tensor, num_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """held: ascending ids of the sequences to hold."""
        shape = (config.num_hidden_layers, 2, len(held), num_positions, config.num_kv_heads, config.head_dim)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.held = held.to(device)

    def write(self, layer_T: Tensor, sequence_T: Tensor, position_T: Tensor, kv_TW: Tensor) -> None:
        place_T = torch.searchsorted(self.held, sequence_T)
        kv_T2JC = kv_TW.view(-1, 2, *self.values.shape[-2:])
        for side in (0, 1):
            self.values[layer_T, side, place_T, position_T] = kv_T2JC[:, side]

    def read(self, layer: int, sequence_T: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of each token's sequence, [T, J, length, C]."""
        place_T = torch.searchsorted(self.held, sequence_T)
        keys, values = self.values[layer, :, place_T, :length].transpose(2, 3)
        return keys, values


@dataclass
class KVSharing:
    """Gives the other members of the coherence group the keys and values born here, in the background."""

    cache: KVCache
    exchange: Exchange
    group: CoherenceGroup
    pending: PendingGather | None = None

    def start(self, layer_T: Tensor, rows: list[Rows], kv_TW: Tensor, capacity: int) -> None:
        """Begin to share the rows; at most `capacity` a member, a number all members agree on."""
        self.finish()
        whole = torch.stack(
            [
                layer_T,
                torch.cat([each.sequence_T for each in rows]),
                torch.cat([each.position_T for each in rows]),
            ],
            dim=1,
        )
        packed = pack(kv_TW, whole.to(torch.int32))
        self.pending = self.exchange.start_gather(packed, capacity, self.group, kv_TW[:1].nbytes)

    def finish(self) -> None:
        """Wait for what is under way and write it to the cache."""
        if self.pending is None:
            return
        width = 2 * self.cache.values.shape[-2] * self.cache.values.shape[-1]
        kv_TW, whole = unpack(self.pending.wait(), (self.cache.values.dtype, width), (torch.int32, 3))
        layer_T, sequence_T, position_T = whole.long().T.contiguous()
        self.cache.write(layer_T, sequence_T, position_T, kv_TW)
        self.pending = None


@dataclass
class PrefillAttention:
    """AttentionContext of whole prompts: rows are sequences one after the other, `lengths` tokens each.

    With a `sharing`, the group's members get each layer's keys and values as soon as it is done;
    `group_tokens` is the largest number of prompt tokens a member has.
    """

    cache: KVCache
    lengths: list[int]
    sharing: KVSharing | None = None
    group_tokens: int = 0

    def attend(self, layer: int, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> Tensor:
        kv_TW = torch.stack([k_TJC, v_TJC], dim=1).flatten(1)
        layer_T = torch.full_like(rows.sequence_T, layer)
        self.cache.write(layer_T, rows.sequence_T, rows.position_T, kv_TW)
        if self.sharing is not None:
            self.sharing.start(layer_T, [rows], kv_TW, self.group_tokens)
        attended = [
            scaled_dot_product(*(part.transpose(0, 1) for part in parts)).transpose(0, 1)
            for parts in zip(*(part.split(self.lengths) for part in (q_THC, k_TJC, v_TJC)), strict=True)
        ]
        return torch.cat(attended) if attended else q_THC


@dataclass
class DecodeAttention:
    """AttentionContext of one decode step: each row is the newest token of its sequence.

    length: positions to look at, an upper bound over all sequences. `born` remembers the step's new keys and
    values for `share`.
    """

    cache: KVCache
    length: int
    born: list[tuple[int, Rows, Tensor]] = field(default_factory=list)

    def attend(self, layer: int, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> Tensor:
        kv_TW = torch.stack([k_TJC, v_TJC], dim=1).flatten(1)
        layer_T = torch.full_like(rows.sequence_T, layer)
        self.cache.write(layer_T, rows.sequence_T, rows.position_T, kv_TW)
        self.born.append((layer, rows, kv_TW))
        keys, values = self.cache.read(layer, rows.sequence_T, self.length)
        seen_T1P = torch.arange(self.length, device=keys.device) <= rows.position_T[:, None, None]
        return scaled_dot_product(q_THC[:, :, None], keys, values, seen_T1P[:, None])[:, :, 0]

    def share(self, sharing: KVSharing, capacity: int) -> None:
        """Begin to share the step's new keys and values."""
        layer_T = torch.cat([torch.full_like(rows.sequence_T, layer) for layer, rows, _ in self.born])
        rows = [rows for _, rows, _ in self.born]
        sharing.start(layer_T, rows, torch.cat([kv for _, _, kv in self.born]), capacity)

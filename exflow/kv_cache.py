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


@dataclass(frozen=True)
class NewKV:
    """Keys and values side by side, [T, W], and where they belong."""

    layer_T: Tensor
    sequence_T: Tensor
    position_T: Tensor
    kv_TW: Tensor


class KVCache:
    """`values[layer, side, n, p]` is key (side 0) or value (1) of position p of the n-th sequence held."""

    def __init__(
        self, config: ModelConfig, held: Tensor, num_positions: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        """held: ascending ids of the sequences to hold."""
        shape = (config.num_hidden_layers, 2, len(held), num_positions, config.num_kv_heads, config.head_dim)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.held = held.to(device)

    def write(self, new: "NewKV") -> None:
        place_T = torch.searchsorted(self.held, new.sequence_T)
        kv_T2JC = new.kv_TW.view(-1, 2, *self.values.shape[-2:])
        for side in (0, 1):
            self.values[new.layer_T, side, place_T, new.position_T] = kv_T2JC[:, side]

    def append(self, layer: int, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> "NewKV":
        """Write one layer's new keys and values; returned in the form in which they are shared."""
        kv_TW = torch.stack([k_TJC, v_TJC], dim=1).flatten(1)
        new = NewKV(torch.full_like(rows.sequence_T, layer), rows.sequence_T, rows.position_T, kv_TW)
        self.write(new)
        return new

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

    def start(self, born: list[NewKV], capacity: int) -> None:
        """Begin to share what was born; at most `capacity` rows a member, a number all members agree on."""
        self.finish()
        kv_TW = torch.cat([new.kv_TW for new in born])
        places = [torch.stack([new.layer_T, new.sequence_T, new.position_T], dim=1) for new in born]
        packed = pack(kv_TW, torch.cat(places).to(torch.int32))
        self.pending = self.exchange.start_gather(packed, capacity, self.group, kv_TW[:1].nbytes)

    def finish(self) -> None:
        """Wait for what is under way and write it to the cache."""
        if self.pending is None:
            return
        width = 2 * self.cache.values.shape[-2] * self.cache.values.shape[-1]
        kv_TW, whole = unpack(self.pending.wait(), (self.cache.values.dtype, width), (torch.int32, 3))
        layer_T, sequence_T, position_T = whole.long().T.contiguous()
        self.cache.write(NewKV(layer_T, sequence_T, position_T, kv_TW))
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
        new = self.cache.append(layer, k_TJC, v_TJC, rows)
        if self.sharing is not None:
            self.sharing.start([new], self.group_tokens)
        attended = [
            scaled_dot_product(*(part.transpose(0, 1) for part in parts)).transpose(0, 1)
            for parts in zip(*(part.split(self.lengths) for part in (q_THC, k_TJC, v_TJC)), strict=True)
        ]
        return torch.cat(attended) if attended else q_THC


@dataclass
class DecodeAttention:
    """AttentionContext of one decode step: each row is the newest token of its sequence.

    length: positions to look at, an upper bound over all sequences. `born` collects the step's new keys and
    values, to be shared when it is over.
    """

    cache: KVCache
    length: int
    born: list[NewKV] = field(default_factory=list)

    def attend(self, layer: int, q_THC: Tensor, k_TJC: Tensor, v_TJC: Tensor, rows: Rows) -> Tensor:
        self.born.append(self.cache.append(layer, k_TJC, v_TJC, rows))
        keys, values = self.cache.read(layer, rows.sequence_T, self.length)
        seen_T1P = torch.arange(self.length, device=keys.device) <= rows.position_T[:, None, None]
        return scaled_dot_product(q_THC[:, :, None], keys, values, seen_T1P[:, None])[:, :, 0]

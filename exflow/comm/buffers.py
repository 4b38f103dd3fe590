"""Buffers through which ranks exchange rows in a captured decode step.

Their addresses are fixed, so a CUDA graph can contain them. A one-sided exchange uses symmetric memory: peers
write rows into it, and each sender raises a flag once all its rows are there. A collective exchange uses a
pair of buffers that one all-to-all of fixed capacity moves. Both use the same kernels, which write to
addresses and read the rows that bear the exchange's number. With relays, ranks write into each other's
memory inside a node, and a collective moves rows between nodes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from exflow.job.cluster import Cluster, coherence_group
from exflow.kernels.operands import ExchangeBuffer, OffNodeBuffer

_ALIGNMENT = 128  # bytes, of every region: rows are stored in whole cache lines


@dataclass(frozen=True)
class StepShape:
    """The ranks, and the static shape of a decode step on one of them.

    sequences: size of the whole batch, a multiple of num_ranks; the home of sequence b is rank b % num_ranks.
    positions: most positions of a sequence. group_size: ranks in a coherence group; all ranks for
    `replicated`. relayed: the ranks of a node write into each other's memory, and tokens travel between nodes
    by relays; otherwise every rank writes to every other.
    """

    rank: int
    num_ranks: int
    ranks_per_node: int
    group_size: int
    sequences: int
    positions: int
    replicated: bool = False
    relayed: bool = False

    @property
    def peers(self) -> range:
        """The ranks whose memory this rank writes into, itself among them."""
        if not self.relayed:
            return range(self.num_ranks)
        first = self.rank - self.rank % self.ranks_per_node
        return range(first, first + self.ranks_per_node)

    @property
    def rows(self) -> int:
        """Number of sequences that this rank may own: the sequences of its coherence group."""
        return self.sequences // self.num_ranks * self.group_size

    def sequence_of_rows(self) -> Tensor:
        """Index in the batch of each row's sequence [rows] int64."""
        row = torch.arange(self.rows)
        first = self.rank // self.group_size * self.group_size
        return row // self.group_size * self.num_ranks + first + row % self.group_size

    def sequence_ids(self, first_sequence: int) -> Tensor:
        """Sequence id of each row [rows] int64. first_sequence: id of the request's first sequence."""
        return self.sequence_of_rows() + first_sequence - first_sequence % self.num_ranks


@dataclass(frozen=True)
class PeerMemory:
    """Memory of this rank that the other ranks of its node can write to.

    own: uint8. bases: address of each rank's memory in this rank's address space, 0 for ranks of other nodes.
    meet: a barrier of the node's ranks on the GPU.
    """

    own: Tensor
    bases: list[int]
    meet: Callable[[], None] = lambda: None


Allocate = Callable[[int], PeerMemory]


def symmetric_memory(cluster: Cluster) -> Allocate:
    """Memory for one-sided writes among the ranks of each host (torch's symmetric memory, no multicast).

    Collective: every rank allocates the same sizes in the same order. Raises RuntimeError where GPUs cannot
    reach each other's memory.
    """
    import torch.distributed._symmetric_memory as symmetric

    if cluster.num_nodes == 1:
        ranks, processes = range(cluster.num_ranks), dist.group.WORLD
    else:
        node = coherence_group(cluster, cluster.ranks_per_node)
        ranks, processes = node.ranks, node.processes
    assert processes is not None

    def allocate(size: int) -> PeerMemory:
        own = symmetric.empty(size, dtype=torch.uint8, device=cluster.device)
        own.zero_()
        handle = symmetric.rendezvous(own, processes)
        bases = [0] * cluster.num_ranks
        for place, rank in enumerate(ranks):
            bases[rank] = handle.get_buffer(place, (size,), torch.uint8).data_ptr()
        torch.cuda.synchronize()
        dist.barrier(processes)  # no rank writes before all memory is zeroed
        return PeerMemory(own, bases, handle.barrier)

    return allocate


def tensor_at(address: int, like: Tensor) -> Tensor:
    """A uint8 tensor over another rank's memory at `address`, of as many bytes as `like`."""

    class Bytes:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": (like.nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Bytes(), device=like.device)


def local_memory(device: torch.device, num_ranks: int = 1) -> Allocate:
    """Memory of this rank alone: the address of every rank is that of this rank."""

    def allocate(size: int) -> PeerMemory:
        own = torch.zeros(size, dtype=torch.uint8, device=device)
        return PeerMemory(own, [own.data_ptr()] * num_ranks)

    return allocate


def rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class LayerBuffers:
    """The buffers of one layer's exchanges: dispatch and combine.

    returns: None if no partial sums travel. With relays, `returns` carries partial sums to a token's relay in
    this node, and `sums` carries the relays' sums to its next owner. Both use the same chunks: no sender has
    both kinds for one token and receiver.
    """

    dispatch: ExchangeBuffer
    returns: ExchangeBuffer | None
    sums: ExchangeBuffer | None = None

    @property
    def exchanges(self) -> list[ExchangeBuffer]:
        return [buffer for buffer in (self.dispatch, self.returns, self.sums) if buffer is not None]


def words_of(top_k: int) -> int:
    """Number of int32 words beside a hidden state: exchange number, owner, slots, weights.

    Rounded up to a power of two, as Triton's blocks must be.
    """
    return 1 << (2 + 2 * top_k - 1).bit_length()


def one_sided_buffers(
    shape: StepShape, top_k: int, hidden_bytes: int, returns: bool, allocate: Allocate
) -> LayerBuffers:
    """Buffers in memory that the peers write to. hidden_bytes: size of one hidden state."""
    peers, summed = len(shape.peers), shape.sequences if shape.relayed else shape.rows
    place = shape.rank - shape.peers.start
    words_at = rounded(4 * words_of(top_k) * shape.sequences)
    dispatch = rounded(words_at + hidden_bytes * shape.sequences)
    numbers_at = rounded(4 * summed)
    chunk = rounded(numbers_at + hidden_bytes * summed)
    flags = rounded(4 * peers)
    memory = allocate(3 * flags + 2 * dispatch + (2 * peers * chunk if returns else 0))

    def buffer(
        flags_at: int, at: int, size: int, chunk: int, payload_at: int, shared: bool
    ) -> ExchangeBuffer:
        mine = 0 if shared else place * chunk
        device = memory.own.device
        return ExchangeBuffer(
            to=torch.tensor(
                [[base + at + parity * size + mine for base in memory.bases] for parity in (0, 1)],
                device=device,
            ),
            at=torch.tensor(
                [memory.bases[shape.rank] + at + parity * size for parity in (0, 1)], device=device
            ),
            chunk=chunk,
            payload_at=payload_at,
            shared=shared,
            flags=memory.own[flags_at : flags_at + 4 * peers].view(torch.int32),
            flag_addresses=torch.tensor(
                [memory.bases[rank] + flags_at + 4 * place for rank in shape.peers], device=device
            ),
            move=lambda: None,
        )

    first, second = 3 * flags, 3 * flags + 2 * dispatch
    gated = buffer(0, first, dispatch, dispatch, words_at, True)
    if not returns:
        return LayerBuffers(gated, None)
    returned, sums = (
        buffer(flags_at, second, peers * chunk, chunk, numbers_at, False) for flags_at in (flags, 2 * flags)
    )
    return LayerBuffers(gated, returned, sums if shape.relayed else None)


def relayed_buffers(
    shape: StepShape, top_k: int, hidden_bytes: int, returns: bool, allocate: Allocate
) -> LayerBuffers:
    """Buffers in memory that the node's ranks write to, and chunks for other nodes that an all-to-all moves.

    Tokens go to the ranks with this rank's place in other nodes. Sums go to every rank there that may own a
    token relayed by this one. If rank A sends to rank B, B sends to A.
    """
    buffers = one_sided_buffers(shape, top_k, hidden_bytes, returns, allocate)
    elsewhere = [rank for rank in range(shape.num_ranks) if rank not in shape.peers]
    relays = [rank for rank in elsewhere if (rank - shape.rank) % shape.ranks_per_node == 0]
    # without coherence groups an owner has its relays' place
    owners = relays if shape.group_size == 1 else elsewhere
    words_at, numbers_at = rounded(4 * words_of(top_k) * shape.rows), rounded(4 * shape.rows)
    size = hidden_bytes * shape.rows
    return replace(
        buffers,
        dispatch=_reaching(buffers.dispatch, relays, rounded(words_at + size), words_at),
        sums=buffers.sums and _reaching(buffers.sums, owners, rounded(numbers_at + size), numbers_at),
    )


def _reaching(buffer: ExchangeBuffer, reached: list[int], chunk: int, payload_at: int) -> ExchangeBuffer:
    """`buffer` with chunks to and from the ranks `reached` of other nodes, which also reach this rank.

    chunk, payload_at: size of a chunk and offset of its hidden states, in bytes.
    """
    num_ranks, device = buffer.to.shape[1], buffer.to.device
    outgoing, incoming = torch.zeros(2, len(reached) * chunk, dtype=torch.uint8, device=device)
    sizes = [chunk if rank in reached else 0 for rank in range(num_ranks)]
    to, at = buffer.to.clone(), torch.zeros(num_ranks, dtype=torch.int64, device=device)
    for place, rank in enumerate(reached):
        to[:, rank] = outgoing.data_ptr() + place * chunk
        at[rank] = incoming.data_ptr() + place * chunk
    return replace(
        buffer,
        to=to,
        move=lambda: dist.all_to_all_single(incoming, outgoing, sizes, sizes),
        off_node=OffNodeBuffer(at, payload_at, outgoing.nbytes),
    )


def collective_buffers(
    shape: StepShape, top_k: int, hidden_bytes: int, returns: bool, device: torch.device
) -> LayerBuffers:
    """Buffers that an all-to-all moves: a chunk has room for every row that its receiver may own."""

    def buffer(chunk: int, payload_at: int) -> ExchangeBuffer:
        outgoing, incoming = torch.zeros(2, shape.num_ranks * chunk, dtype=torch.uint8, device=device)
        each = range(shape.num_ranks)
        return ExchangeBuffer(
            to=torch.tensor([[outgoing.data_ptr() + rank * chunk for rank in each]] * 2, device=device),
            at=torch.tensor([incoming.data_ptr()] * 2, device=device),
            chunk=chunk,
            payload_at=payload_at,
            shared=False,
            flags=torch.zeros(shape.num_ranks, dtype=torch.int32, device=device),
            flag_addresses=torch.zeros(shape.num_ranks, dtype=torch.int64, device=device),
            move=lambda: dist.all_to_all_single(incoming, outgoing),
        )

    words_at, numbers_at = rounded(4 * words_of(top_k) * shape.rows), rounded(4 * shape.rows)
    size = hidden_bytes * shape.rows
    if shape.replicated:  # every rank gates every token, and sends rows only to itself
        gated = one_sided_buffers(
            shape, top_k, hidden_bytes, False, local_memory(device, shape.num_ranks)
        ).dispatch
    else:
        gated = buffer(rounded(words_at + size), words_at)
    return LayerBuffers(
        gated,
        buffer(rounded(numbers_at + size), numbers_at) if returns else None,
    )

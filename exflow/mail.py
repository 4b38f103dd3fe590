"""Where ranks put rows for each other in a decode step of static shape: addresses that are known beforehand.

An exchange has a mailbox on every rank. One-sided, it is memory that the other ranks write into, and a flag
for each sender says that all it had to say is there. Collective, it is a pair of buffers that one all-to-all
of fixed capacity moves. The kernels are the same: they write to addresses, and read what bears the
exchange's number.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from exflow.distributed import Cluster

_ALIGNMENT = 128  # bytes; of every region, so that rows are stored in whole lines


@dataclass(frozen=True)
class StepShape:
    """The ranks, and the static shape of a decode step on one of them.

    sequences: of the whole batch, a multiple of num_ranks; sequence b has its home on rank b % num_ranks.
    positions: the most a sequence may have. group_size: ranks of a coherence group; all of them for
    `replicated`.
    """

    rank: int
    num_ranks: int
    ranks_per_node: int
    group_size: int
    sequences: int
    positions: int
    replicated: bool = False

    @property
    def rows(self) -> int:
        """Sequences that this rank may own: those of its coherence group."""
        return self.sequences // self.num_ranks * self.group_size

    def sequence_of_rows(self) -> Tensor:
        """The sequence of the batch that each row stands for [rows] int64."""
        row = torch.arange(self.rows)
        first = self.rank // self.group_size * self.group_size
        return row // self.group_size * self.num_ranks + first + row % self.group_size

    def sequence_ids(self, first_sequence: int) -> Tensor:
        """The same as ids [rows] int64, for a request whose first sequence has this id."""
        return self.sequence_of_rows() + first_sequence - first_sequence % self.num_ranks


@dataclass(frozen=True)
class Mailbox:
    """One exchange of an MoE layer as this rank sees it.

    to [2, ranks] int64: where to write for each rank, by its number's parity; at [2] int64: where rows
    arrive. Each sender has `chunk` bytes there, or all write into one (`shared`). flags [ranks] int32 are
    raised by the others and flag_addresses [ranks] int64 are mine in their memory. `move` carries what was
    written, where it does not arrive by itself. `payload_at`: bytes from a chunk's beginning, where numbers
    are, to its hidden states.
    """

    to: Tensor
    at: Tensor
    chunk: int
    payload_at: int
    shared: bool
    flags: Tensor
    flag_addresses: Tensor
    move: Callable[[], None]


@dataclass(frozen=True)
class PeerMemory:
    """Bytes of this rank that the other ranks can write to, and where each rank's lie in this rank's
    addresses; `meet` waits, on the GPU, until all ranks have come so far."""

    own: Tensor
    bases: list[int]
    meet: Callable[[], None] = lambda: None


Allocate = Callable[[int], PeerMemory]


def symmetric_memory(cluster: Cluster) -> Allocate:
    """Memory for one-sided writes among the ranks of one host (torch's symmetric memory, no multicast).

    Collective: every rank allocates the same sizes in the same order. Raises RuntimeError where GPUs cannot
    reach each other's memory.
    """
    import torch.distributed._symmetric_memory as symmetric

    everyone = dist.group.WORLD
    assert everyone is not None

    def allocate(size: int) -> PeerMemory:
        own = symmetric.empty(size, dtype=torch.uint8, device=cluster.device)
        own.zero_()
        handle = symmetric.rendezvous(own, everyone)
        bases = [
            handle.get_buffer(rank, (size,), torch.uint8).data_ptr() for rank in range(cluster.num_ranks)
        ]
        torch.cuda.synchronize()
        dist.barrier()  # nobody writes before everybody's zeros are there
        return PeerMemory(own, bases, handle.barrier)

    return allocate


def tensor_at(address: int, like: Tensor) -> Tensor:
    """Another rank's bytes as a tensor, as many as `like` has."""

    class Bytes:
        __cuda_array_interface__ = {  # noqa: RUF012
            "shape": (like.nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Bytes(), device=like.device)


def local_memory(device: torch.device, num_ranks: int = 1) -> Allocate:
    """Memory that this rank alone writes to: whatever rank is meant, it is its own."""

    def allocate(size: int) -> PeerMemory:
        own = torch.zeros(size, dtype=torch.uint8, device=device)
        return PeerMemory(own, [own.data_ptr()] * num_ranks)

    return allocate


def rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Mail:
    """The two exchanges of a layer. `returns` is None where no partial sums ever travel."""

    dispatch: Mailbox
    returns: Mailbox | None


def words_of(top_k: int) -> int:
    """int32 beside a hidden state: number, owner, slots, weights; a power of two, as kernels have it."""
    return 1 << (2 + 2 * top_k - 1).bit_length()


def one_sided_mail(
    shape: StepShape, top_k: int, hidden_bytes: int, returns: bool, allocate: Allocate
) -> Mail:
    """Mailboxes in memory that the other ranks write to. hidden_bytes: of one row."""
    words_at = rounded(4 * words_of(top_k) * shape.sequences)
    dispatch = rounded(words_at + hidden_bytes * shape.sequences)
    numbers_at = rounded(4 * shape.rows)
    chunk = rounded(numbers_at + hidden_bytes * shape.rows)
    flags = rounded(4 * shape.num_ranks)
    memory = allocate(2 * flags + 2 * dispatch + (2 * shape.num_ranks * chunk if returns else 0))

    def mailbox(flags_at: int, at: int, size: int, chunk: int, payload_at: int, shared: bool) -> Mailbox:
        mine = 0 if shared else shape.rank * chunk
        device = memory.own.device
        return Mailbox(
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
            flags=memory.own[flags_at : flags_at + 4 * shape.num_ranks].view(torch.int32),
            flag_addresses=torch.tensor(
                [base + flags_at + 4 * shape.rank for base in memory.bases], device=device
            ),
            move=lambda: None,
        )

    first, second = 2 * flags, 2 * flags + 2 * dispatch
    return Mail(
        mailbox(0, first, dispatch, dispatch, words_at, True),
        mailbox(flags, second, shape.num_ranks * chunk, chunk, numbers_at, False) if returns else None,
    )


def collective_mail(
    shape: StepShape, top_k: int, hidden_bytes: int, returns: bool, device: torch.device
) -> Mail:
    """Mailboxes that an all-to-all moves: a chunk for every row that a receiver may own, full or not."""

    def mailbox(chunk: int, payload_at: int) -> Mailbox:
        outgoing, incoming = torch.zeros(2, shape.num_ranks * chunk, dtype=torch.uint8, device=device)
        each = range(shape.num_ranks)
        return Mailbox(
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
    if shape.replicated:  # every rank gates every token: what it finds goes to itself
        gated = one_sided_mail(
            shape, top_k, hidden_bytes, False, local_memory(device, shape.num_ranks)
        ).dispatch
    else:
        gated = mailbox(rounded(words_at + size), words_at)
    return Mail(
        gated,
        mailbox(rounded(numbers_at + size), numbers_at) if returns else None,
    )

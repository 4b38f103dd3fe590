"""Graph runner: captures a decode step of static shape as one CUDA graph, and replays it for every token.

On a CPU the step runs without a graph, in Triton's interpreter: slow, and only for tests.
"""

import time
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from exflow.comm.buffers import (
    Allocate,
    LayerBuffers,
    PeerMemory,
    StepShape,
    collective_buffers,
    local_memory,
    one_sided_buffers,
    relayed_buffers,
    symmetric_memory,
)
from exflow.comm.transport_names import Transport
from exflow.job.cluster import Cluster, CoherenceGroup, coherence_group
from exflow.job.launch import LostContact
from exflow.kernels.advance import NONFINITE_TOKEN
from exflow.kernels.share import scatter_new_kv
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder, Rows
from exflow.model.sampling import Sampling
from exflow.profiling.listener import RoutingListener
from exflow.profiling.trace import DECODE
from exflow.runtime.decode_step import DecodeStep
from exflow.runtime.expert_parallel import PlanTables, has_return
from exflow.runtime.kv_cache import KVCache, cache_shape
from exflow.runtime.request import Observer, not_finite

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
POSITIONS = 256  # the positions of a step are a multiple of this

# torch 2.13 renamed it, and warns at every call of the older name
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def bucket(sequences: int, ranks: int) -> int:
    """Batch size in which a request of `sequences` sequences runs, a multiple of `ranks`."""
    enough = next((size for size in BUCKETS if size >= sequences), -(-sequences // 512) * 512)
    return -(-enough // ranks) * ranks


@dataclass(frozen=True)
class Capture:
    """Settings of a rank's captured steps; all but the decoder and the rank itself are equal on all ranks."""

    decoder: Decoder
    tables: PlanTables
    cluster: Cluster
    group_size: int
    replicated: bool
    transport: Transport

    @property
    def returns(self) -> bool:
        """True if partial sums may travel between ranks."""
        ranks, top_k = self.cluster.num_ranks, self.decoder.config.top_k
        return ranks > 1 and (self.replicated or has_return(top_k, self.group_size, ranks))

    def make(
        self,
        sequences: int,
        positions: int,
        sampling: Sampling,
        end_tokens: tuple[int, ...],
        kind: type[DecodeStep] = DecodeStep,
        beside: "CapturedDecode | None" = None,
    ) -> "CapturedDecode":
        """Allocate, compile and capture a step for up to `sequences` and `positions`. Collective.

        beside: another step that `has_room`. The new step uses its K/V cache and working memory too, since
        only one of them runs at a time.
        """
        return CapturedDecode(self, self.shape(sequences, positions), sampling, end_tokens, kind, beside)

    def shape(self, sequences: int, positions: int) -> StepShape:
        """Shape of the step for up to `sequences` and `positions`."""
        cluster = self.cluster
        return StepShape(
            cluster.rank,
            cluster.num_ranks,
            cluster.ranks_per_node,
            cluster.num_ranks if self.replicated else self.group_size,
            bucket(sequences, cluster.num_ranks),
            -(-positions // POSITIONS) * POSITIONS,
            self.replicated,
            self.transport == "relayed",
        )

    def cache_size(self, shape: StepShape) -> torch.Size:
        return torch.Size(cache_shape(self.decoder.config, shape.rows, shape.positions))


class CapturedDecode:
    """The captured step of one bucket, and its K/V cache.

    Use: `begin` a request, `advance` once a step, then read `chosen` and `counters`.
    """

    def __init__(
        self,
        capture: Capture,
        shape: StepShape,
        sampling: Sampling,
        end_tokens: tuple[int, ...],
        kind: type[DecodeStep],
        beside: "CapturedDecode | None",
    ) -> None:
        self.capture, self.shape = capture, shape
        start, decoder, cluster = time.perf_counter(), capture.decoder, capture.cluster
        config, weight = decoder.config, decoder.embedding.weight
        one_sided = capture.transport != "collective"
        shares = not shape.replicated and shape.group_size > 1
        in_place = one_sided and shape.group_size <= len(shape.peers)  # can write to the group's caches
        alone = local_memory(weight.device)
        peers = symmetric_memory(cluster) if one_sided and shape.num_ranks > 1 else alone
        size = capture.cache_size(shape)
        allocate = peers if in_place and shares else alone
        self.memory: PeerMemory = beside.memory if beside else allocate(size.numel() * weight.dtype.itemsize)
        self.cache = self.memory.own.view(weight.dtype)[: size.numel()].view(size)
        share = None
        if shares and not in_place:
            # not a method: a reference cycle would keep the graph from being freed
            share = partial(_gather_new_kv, coherence_group(cluster, shape.group_size), cluster)
        self.step = kind(
            decoder,
            shape,
            capture.tables,
            self._buffers(config, one_sided, peers),
            self._caches(self.memory.bases, in_place and shares),
            replace(sampling, seed=0),  # each request has its own seed
            end_tokens,
            decoder.replay,
            one_sided,
            share,
        )
        self.graph = self._captured(beside) if weight.device.type == "cuda" else None
        self.capture_s = time.perf_counter() - start

    @property
    def description(self) -> str:
        """One line about the capture, for the log."""
        shape, transport = self.shape, self.capture.transport
        return (
            f"decode step captured in {self.capture_s:.1f} s ({transport}): {shape.sequences} sequences of "
            f"{shape.positions} positions, {self.cache.nbytes / 1e9:.2g} GB of keys and values on a rank"
        )

    def _buffers(self, config: ModelConfig, one_sided: bool, peers: Allocate) -> LayerBuffers:
        row = config.hidden_size * self.cache.dtype.itemsize
        if one_sided:
            make = relayed_buffers if self.shape.relayed else one_sided_buffers
            return make(self.shape, config.top_k, row, self.capture.returns, peers)
        return collective_buffers(self.shape, config.top_k, row, self.capture.returns, self.cache.device)

    def _caches(self, bases: list[int], shared: bool) -> list[int]:
        """Addresses of the caches that get new keys and values: the group's, or only this rank's."""
        first = self.shape.rank // self.shape.group_size * self.shape.group_size
        return bases[first : first + self.shape.group_size] if shared else [self.cache.data_ptr()]

    def _captured(self, beside: "CapturedDecode | None") -> torch.cuda.CUDAGraph:
        """Capture the step as a graph. Two steps before, in which no token is owned, compile the kernels."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step.state.owned.zero_()
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=beside.graph.pool() if beside and beside.graph else None):
            self.run()
        return graph

    def use_tables(self, tables: PlanTables) -> None:
        """Switch to another placement with the same number of slots.

        Tables are copied into the captured buffers, so the graph is not captured again.
        """
        self.capture = replace(self.capture, tables=tables)
        self.step.tables.use(tables)

    def run(self) -> None:
        """Run the step without the graph."""
        for _ in self.step.run():
            pass  # kernels or collectives wait for other ranks

    def kv_cache(self, first_sequence: int) -> KVCache:
        """The cache of a request; padding rows have ids of no sequence.

        first_sequence: id of the request's first sequence.
        """
        return KVCache(self.cache, self.shape.sequence_ids(first_sequence))

    def begin(
        self, first_sequence: int, lengths: list[int], token_T: Tensor, rows: Rows, seed: int = 0
    ) -> None:
        """Begin to decode a request after its prompts. Collective.

        lengths: tokens of each prompt. token_T, rows: the newest tokens of this rank [T]. seed: seed of the
        samples.
        """
        id_M = self.shape.sequence_ids(first_sequence)
        length_M = torch.tensor([*lengths, 0])[(id_M - first_sequence).clamp(-1, len(lengths))]
        place_T = torch.searchsorted(id_M, rows.sequence_T.cpu())
        token_M, owned_M = torch.zeros_like(id_M), torch.zeros_like(id_M)
        token_M[place_T], owned_M[place_T] = token_T.cpu(), 1
        self.step.start(first_sequence, token_M, length_M, owned_M, seed)
        self._meet()

    def _meet(self) -> None:
        """Wait until all ranks are ready, since a step writes into the memory of other ranks."""
        if self.shape.num_ranks > 1:
            if self.cache.device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier()

    def advance(self) -> None:
        """Run one step."""
        if self.graph is not None:
            self.graph.replay()
        else:
            self.run()

    def serves(self, sequences: int, positions: int, sampling: Sampling, end_tokens: tuple[int, ...]) -> bool:
        """True if this step equals the one that `Capture.make` would make, or has more positions."""
        wanted, step = self.capture.shape(sequences, positions), self.step
        room = wanted == replace(self.shape, positions=wanted.positions) and positions <= self.shape.positions
        return room and (step.sampling, step.end_tokens) == (replace(sampling, seed=0), end_tokens)

    def has_room(self, sequences: int, positions: int) -> bool:
        """True if the K/V cache is large enough for a step of `sequences` and `positions`."""
        wanted = self.capture.cache_size(self.capture.shape(sequences, positions))
        return wanted.numel() * self.cache.dtype.itemsize <= self.memory.own.nbytes

    def report(self, observe: Observer | None, listeners: list[RoutingListener]) -> None:
        """Pass the latest step's routing to the listeners, and its logits to `observe`."""
        state, outputs = self.step.state, self.step.outputs
        position_M = state.position - 1
        routing = zip(outputs.routing, outputs.routing_weight, strict=True)
        for layer, (expert_MK, weight_MK) in enumerate(routing):
            here = expert_MK[:, 0] >= 0
            for listener in listeners:
                listener(
                    layer,
                    expert_MK[here].long(),
                    weight_MK[here],
                    state.sequence[here],
                    position_M[here],
                    DECODE,
                )
        if observe is not None:
            here = outputs.chosen[int(outputs.done) - 1] >= 0
            observe(Rows(state.sequence[here], position_M[here], DECODE), self.step.logits[here])

    def check(self) -> None:
        """Raise LostContact if another rank's flag did not come in time.

        Raises WrongResult if a token was chosen here from logits that are NaN or infinite.
        """
        if number := int(self.step.state.progress.failed):
            raise LostContact(f"no word from another rank in exchange {number} of the decode steps")
        if len(wrong := (self.step.outputs.chosen == NONFINITE_TOKEN).nonzero()):
            step, row = wrong[0].tolist()  # the first step comes first
            raise not_finite(int(self.step.state.number[row]), step + 1)

    def all_ended(self) -> bool:
        """True if no rank owns a token any more. Collective."""
        left = self.step.state.owned.sum()
        if self.shape.num_ranks > 1:
            dist.all_reduce(left)
        return not left.item()

    def chosen(self, steps: int) -> list[tuple[int, int, int]]:
        """(number of the sequence in the request, position, token) of each choice here in `steps` steps."""
        token = self.step.outputs.chosen[:steps].cpu()
        step, row = (token >= 0).nonzero(as_tuple=True)
        state = self.step.state
        number, start = state.number.cpu(), state.position.cpu() - steps
        places = zip(
            number[row].tolist(), (start[row] + step + 1).tolist(), token[step, row].tolist(), strict=True
        )
        return list(places)


def _gather_new_kv(group: CoherenceGroup, cluster: Cluster, step: DecodeStep) -> None:
    """Give the step's new keys and values to the group by all-gather, if its caches cannot be written to."""
    members, new_kv, owned = len(group.ranks), step.work.new_kv, step.work.new_kv_owned
    everyone = new_kv.new_empty(members, *new_kv.shape)
    owners = owned.new_empty(members, *owned.shape)
    _all_gather(everyone, new_kv, group=group.processes)
    _all_gather(owners, owned, group=group.processes)
    scatter_new_kv(
        everyone=everyone,
        owners=owners,
        position=step.state.position,
        cache=step.tables.caches,
        positions=step.shape.positions,
        member=cluster.rank % members,
        width=step.decoder.config.head_dim,
        launch=step.launch,
    )

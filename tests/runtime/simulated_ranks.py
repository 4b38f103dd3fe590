"""Ranks of a decode step of static shape, simulated in one process and run in step."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from exflow.comm.buffers import (
    Allocate,
    ExchangeBuffer,
    PeerMemory,
    StepShape,
    collective_buffers,
    one_sided_buffers,
    relayed_buffers,
)
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder, MoE
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.runtime.decode_step import DecodeStep
from exflow.runtime.decoding import Choices, EagerDecoding, run_prompts
from exflow.runtime.deploy import default_plan
from exflow.runtime.expert_parallel import PlanTables
from exflow.runtime.kv_cache import cache_shape
from exflow.runtime.request import Request
from exflow.runtime.strategies import single_process

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def of_rank(decoder: Decoder, plan: Plan, rank: int) -> Decoder:
    """The decoder with the experts of one rank's slots alone."""
    part = Decoder(decoder.config, plan.slots_per_rank)
    state = dict(decoder.state_dict())
    first = rank * plan.slots_per_rank
    for name, module in decoder.named_modules():
        if isinstance(module, MoE):
            held = plan.physical_to_logical_map[module.index, first : first + plan.slots_per_rank]
            for each in (key for key in decoder.state_dict() if key.startswith(f"{name}.experts.")):
                state[each] = state[each][held.tolist()]
    part.load_state_dict(state)
    return part.to(DEVICE).eval().requires_grad_(False)


class SimulatedMemory:
    """Symmetric memory of ranks in one process: the n-th allocation of every rank is one set."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.sets: list[list[Tensor]] = []

    def of(self, rank: int) -> Allocate:
        calls = iter(range(1000))

        def allocate(size: int) -> PeerMemory:
            number = next(calls)
            if number == len(self.sets):
                zeros = [torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(self.num_ranks)]
                self.sets.append(zeros)
            members = self.sets[number]
            return PeerMemory(members[rank], [each.data_ptr() for each in members])

        return allocate


@dataclass
class Job:
    """Simulated ranks that have run the prompts of a request and stand before its first decode step."""

    steps: list[DecodeStep]
    keep: list[Tensor]

    def run(self, count: int) -> None:
        for _ in range(count):
            walks = [step.run() for step in self.steps]
            while [next(walk, "over") for walk in walks] != ["over"] * len(walks):
                self.raise_flags()

    def raise_flags(self) -> None:
        """Ranks that run in turn cannot wait for each other: all are done with their puts here."""
        for step in self.steps:
            for box in step.buffers.exchanges:
                box.flags.fill_(1 << 30)

    def chosen(self, count: int) -> Tensor:
        """Tokens [sequences, count] of the batch, whoever chose them; -1 where nobody did."""
        tokens = torch.full((self.steps[0].shape.sequences, count), -1)
        for step in self.steps:
            mine = step.outputs.chosen[:count].T.cpu()
            sequence = step.shape.sequence_of_rows()
            both = (mine >= 0) & (tokens[sequence] >= 0)
            assert (mine[both] == tokens[sequence][both]).all(), "two ranks chose differently"
            assert step.shape.replicated or not both.any(), "two ranks chose for one sequence"
            tokens[sequence] = torch.where(mine >= 0, mine, tokens[sequence])
        return tokens


Sent = tuple[Tensor, list[int] | None]


class SimulatedAllToAll:
    """Stands in for torch's: every rank's buffers are known from a first call, which moves nothing.

    A meeting has of each rank what is sent and the bytes for each of them.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[list[Sent], int]] = {}  # by the receiving buffer's address, and the rank
        self.meeting: list[Sent] | None = None

    def meet(self, exchange: list[ExchangeBuffer | None]) -> None:
        """The buffers of all ranks for one exchange."""
        self.meeting = []
        for box in exchange:
            if box is not None:
                box.move()
        self.meeting = None

    def __call__(
        self,
        incoming: Tensor,
        outgoing: Tensor,
        come: list[int] | None = None,
        sizes: list[int] | None = None,
    ) -> None:
        if self.meeting is not None:
            self.known[incoming.data_ptr()] = (self.meeting, len(self.meeting))
            self.meeting.append((outgoing, sizes))
            return
        ranks, mine = self.known[incoming.data_ptr()]
        chunks = [outgoing.split(sizes or len(outgoing) // len(ranks))[mine] for outgoing, sizes in ranks]
        assert come is None or [len(chunk) for chunk in chunks] == come
        incoming.copy_(torch.cat(chunks))


def job(
    decoder: Decoder,
    request: Request,
    plan: Plan,
    group_size: int,
    replicated: bool = False,
    first: int = 0,
    collective: SimulatedAllToAll | None = None,
    relayed: bool = False,
) -> Job:
    """Run the prompts in one process, and hand every rank what it would hold."""
    ranks = plan.num_ranks
    choices = Choices(request, first, decoder.embedding.weight.device)
    decoding = EagerDecoding(decoder, single_process(), choices)
    tokens, rows = run_prompts(decoder, single_process(), decoding.cache, choices)
    offset = first % ranks
    sequences = -(-(offset + len(request.prompts)) // ranks) * ranks
    memory = SimulatedMemory(ranks)
    positions = decoding.cache.values.shape[4]
    steps = []
    tables = PlanTables.of(plan, DEVICE)
    shapes = [
        StepShape(
            rank,
            ranks,
            plan.topology.gpus_per_node,
            group_size,
            sequences,
            positions,
            replicated,
            relayed,
        )
        for rank in range(ranks)
    ]
    caches = []
    for shape in shapes:
        cache = torch.zeros(cache_shape(decoder.config, shape.rows, positions), device=DEVICE)
        row = shape.sequence_of_rows() - offset
        real = (row >= 0) & (row < len(request.prompts))
        cache[:, :, real] = decoding.cache.values[:, :, row[real]].to(DEVICE)
        caches.append(cache)
    for shape in shapes:
        returns = replicated or decoder.config.top_k > 1 or group_size < ranks
        row_bytes = 4 * decoder.config.hidden_size
        if relayed:
            buffers = relayed_buffers(shape, decoder.config.top_k, row_bytes, returns, memory.of(shape.rank))
        elif collective is None:
            buffers = one_sided_buffers(
                shape, decoder.config.top_k, row_bytes, returns, memory.of(shape.rank)
            )
        else:
            buffers = collective_buffers(shape, decoder.config.top_k, row_bytes, returns, DEVICE)
        group = range(shape.rank // group_size * group_size, (shape.rank // group_size + 1) * group_size)
        members = [shape.rank] if replicated else list(group)
        step = DecodeStep(
            of_rank(decoder, plan, shape.rank),
            shape,
            tables,
            buffers,
            [caches[member].data_ptr() for member in members],
            request.sampling,
            request.end_tokens,
            one_sided=relayed or collective is None,
        )
        number = shape.sequence_of_rows() - offset
        real = (number >= 0) & (number < len(request.prompts))
        token, position = torch.zeros(shape.rows).long(), torch.zeros(shape.rows).long()
        token[real], position[real] = tokens[number[real]], rows.position_T[number[real]]
        owned = real if replicated else real & (shape.sequence_of_rows() % ranks == shape.rank)
        step.flag_timeout_polls = 2
        step.start(first, token, position, owned, request.sampling.seed)
        steps.append(step)
    if collective is not None:
        collective.meet([step.buffers.dispatch for step in steps])
        collective.meet([step.buffers.sums if relayed else step.buffers.returns for step in steps])
    return Job(steps, [*caches, *(each for made in memory.sets for each in made)])


def plan_of(config: ModelConfig, ranks: int, shuffled: bool, nodes: int = 1) -> Plan:
    plan = default_plan(config, Topology(num_nodes=nodes, gpus_per_node=ranks // nodes))
    if not shuffled:
        return plan
    generator = np.random.default_rng(0)
    slots = np.stack([generator.permutation(line) for line in plan.physical_to_logical_map])
    return replace(plan, physical_to_logical_map=slots)

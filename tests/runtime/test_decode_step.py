"""The decode step of static shape against the eager one: ranks are simulated in one process, in step.

On a GPU the same tests run the compiled kernels. Ranks share a device, so an exchange's puts all come before
its waits.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
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
from exflow.kernels.grouped_mlp import grouped_mlp
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder, MoE, Rows
from exflow.model.sampling import GREEDY
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import count_traffic
from exflow.profiling.trace import DECODE
from exflow.runtime.decode_step import DecodeStep
from exflow.runtime.decoding import Choices, EagerDecoding, run_prompts
from exflow.runtime.deploy import contiguous_plan, load_model
from exflow.runtime.engine import Engine
from exflow.runtime.expert_parallel import PlanTables
from exflow.runtime.kv_cache import cache_shape
from exflow.runtime.request import Request
from exflow.runtime.step_buffers import weights_of
from exflow.runtime.strategies import single_process
from exflow.runtime.trace_recorder import JobRecorder

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
    plan = contiguous_plan(config, Topology(num_nodes=nodes, gpus_per_node=ranks // nodes))
    if not shuffled:
        return plan
    generator = np.random.default_rng(0)
    slots = np.stack([generator.permutation(line) for line in plan.physical_to_logical_map])
    return replace(plan, physical_to_logical_map=slots)


@pytest.mark.parametrize(
    ("ranks", "group_size", "top_k", "moe_every", "replicated"),
    [
        (1, 1, 1, 1, False),
        (2, 2, 1, 1, False),
        (4, 2, 2, 2, False),
        (4, 4, 3, 1, False),
        (4, 1, 2, 1, False),
        (2, 2, 2, 1, True),
    ],
)
@torch.inference_mode()
def test_ranks_of_a_static_step_choose_the_tokens_of_one_process(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    ranks: int,
    group_size: int,
    top_k: int,
    moe_every: int,
    replicated: bool,
) -> None:
    decoder = tiny_decoder(tiny_config(top_k, moe_every, num_hidden_layers=2))
    request = Request([[3, 1, 4], [1, 5], [9, 2, 6, 5]], max_new_tokens=3)
    expected = Engine(decoder, single_process()).generate(request).tokens
    ours = job(decoder, request, plan_of(decoder.config, ranks, True), group_size, replicated)
    ours.run(2)
    assert ours.chosen(2)[: len(expected)].tolist() == [tokens[1:] for tokens in expected]
    assert not any(step.state.progress.failed.any() for step in ours.steps)


@pytest.mark.parametrize(
    ("family", "ranks", "group_size", "replicated"),
    [
        ("mixtral", 2, 2, False),
        ("olmoe", 2, 1, False),
        ("qwen3_moe", 2, 2, True),
        ("gpt_oss", 4, 2, False),
    ],
)
@torch.inference_mode()
def test_published_models_too(
    hugging_face_model: Callable[..., Any], family: str, ranks: int, group_size: int, replicated: bool
) -> None:
    decoder = load_model(hugging_face_model(family).folder).decoder
    request = Request([[3, 1, 4, 1, 5, 9], [1, 5], [9, 2, 6, 5]], max_new_tokens=3)
    expected = Engine(decoder, single_process()).generate(request).tokens
    ours = job(decoder, request, plan_of(decoder.config, ranks, True), group_size, replicated)
    ours.run(2)
    assert ours.chosen(2)[: len(expected)].tolist() == [tokens[1:] for tokens in expected]


@pytest.mark.parametrize("relayed", [False, True])
@torch.inference_mode()
def test_a_rank_that_says_nothing_is_given_up(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    monkeypatch: pytest.MonkeyPatch,
    relayed: bool,
) -> None:
    exchange = SimulatedAllToAll() if relayed else None
    monkeypatch.setattr(torch.distributed, "all_to_all_single", exchange)
    decoder = tiny_decoder(tiny_config(num_hidden_layers=2))
    plan = plan_of(decoder.config, 4 if relayed else 2, True, nodes=2 if relayed else 1)
    request = Request([[3, 1, 4], [1, 5]], max_new_tokens=3)
    ours = job(decoder, request, plan, 2, collective=exchange, relayed=relayed)
    alone = ours.steps[0]
    for _ in alone.run():
        pass  # the other rank has died before its first exchange
    assert int(alone.state.progress.failed) > 0


@pytest.mark.parametrize(
    ("ranks", "group_size", "top_k", "replicated"),
    [(2, 2, 1, False), (4, 2, 2, False), (2, 2, 2, True)],
)
@torch.inference_mode()
def test_mail_that_a_collective_moves_says_the_same(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    group_size: int,
    top_k: int,
    replicated: bool,
) -> None:
    exchange = SimulatedAllToAll()
    monkeypatch.setattr(torch.distributed, "all_to_all_single", exchange)
    decoder = tiny_decoder(tiny_config(top_k, num_hidden_layers=2))
    request = Request([[3, 1, 4], [1, 5], [9, 2, 6, 5]], max_new_tokens=3)
    expected = Engine(decoder, single_process()).generate(request).tokens
    plan = plan_of(decoder.config, ranks, True)
    ours = job(decoder, request, plan, group_size, replicated, collective=exchange)
    ours.run(2)
    assert ours.chosen(2)[: len(expected)].tolist() == [tokens[1:] for tokens in expected]


@pytest.mark.parametrize(
    ("nodes", "per_node", "group_size", "top_k"),
    [
        (2, 2, 1, 2),
        (2, 2, 2, 3),
        (2, 2, 4, 3),
        (2, 2, 4, 1),
        pytest.param(2, 2, 1, 1, marks=[pytest.mark.all, pytest.mark.slow]),
        pytest.param(3, 2, 6, 2, marks=[pytest.mark.all, pytest.mark.slow]),
        pytest.param(2, 3, 3, 2, marks=[pytest.mark.all, pytest.mark.slow]),
    ],
)
@torch.inference_mode()
def test_tokens_that_travel_by_relays(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    monkeypatch: pytest.MonkeyPatch,
    nodes: int,
    per_node: int,
    group_size: int,
    top_k: int,
) -> None:
    """Nodes of several ranks: the tokens of one process, and the messages that placement counts."""
    exchange, ranks = SimulatedAllToAll(), nodes * per_node
    monkeypatch.setattr(torch.distributed, "all_to_all_single", exchange)
    decoder = tiny_decoder(tiny_config(top_k, num_hidden_layers=2, num_experts=12))
    request = Request([[3, 1, 4], [1, 5], [9, 2, 6, 5], [3, 5]], max_new_tokens=3)
    engine = Engine(decoder, single_process())
    recorder = JobRecorder(engine)
    logits: dict[int, Tensor] = {}  # of each sequence's latest choice

    def observe(rows: Rows, logits_TV: Tensor) -> None:
        logits.update(zip(rows.sequence_T.tolist(), logits_TV, strict=True))

    expected = engine.generate(request, observe).tokens
    trace = recorder.trace()
    plan = plan_of(decoder.config, ranks, True, nodes)
    predicted = count_traffic(trace.select(trace.phase == DECODE), plan, group_size, hierarchical=True)

    ours = job(decoder, request, plan, group_size, collective=exchange, relayed=True)
    ours.run(2)
    assert ours.chosen(2)[: len(expected)].tolist() == [tokens[1:] for tokens in expected]
    for step in ours.steps:
        assert not step.state.progress.failed.any()
        for row in (step.outputs.chosen[1] >= 0).nonzero()[:, 0]:
            theirs = logits[int(step.state.sequence[row])]
            torch.testing.assert_close(step.logits[row].cpu(), theirs, rtol=0, atol=1e-4)
    intra, inter = sum(step.outputs.dispatched.sum(0) for step in ours.steps).tolist()
    passed = sum(int(step.outputs.passed.sum()) for step in ours.steps)
    returned = sum(step.outputs.returned.sum(0) for step in ours.steps).tolist()
    assert (intra + passed, inter) == (predicted.dispatch_intra, predicted.dispatch_inter)
    assert returned == [predicted.return_intra, predicted.return_inter]
    assert passed and inter


@pytest.mark.parametrize(("top_k", "activation"), [(1, "gelu"), (2, "swiglu")])
@torch.inference_mode()
def test_grouped_products_of_rows_in_order_say_the_same(
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    monkeypatch: pytest.MonkeyPatch,
    top_k: int,
    activation: str,
) -> None:
    """The products of many rows against those of few; slot 1 has no rows, some pairs are served elsewhere."""
    monkeypatch.setattr("exflow.runtime.step_buffers.MANY_ROWS", 0)
    config = tiny_config(top_k, activation=activation, num_hidden_layers=1)
    # torch's products take bfloat16 alone on GPUs, the interpreter knows no bfloat16
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    decoder = tiny_decoder(config).to(DEVICE, dtype)
    shape = StepShape(0, 1, 1, 1, sequences=8, positions=16)
    tables = PlanTables.of(contiguous_plan(config, Topology(gpus_per_node=1)), DEVICE)
    buffers = one_sided_buffers(
        shape, top_k, dtype.itemsize * config.hidden_size, False, SimulatedMemory(1).of(0)
    )
    step = DecodeStep(decoder, shape, tables, buffers, [0], GREEDY, ())
    received, work = step.work.received, step.work
    assert work.permuted is not None
    pairs = torch.randperm(8 * top_k)[: 8 * top_k - 2].to(DEVICE, torch.int32)
    received.pairs[0, :5], received.pairs[2, : len(pairs) - 5] = pairs[:5], pairs[5:]
    received.counts[0], received.counts[2] = 5, len(pairs) - 5
    received.normed.normal_()
    received.weights.uniform_(0.5, 1.0)
    layer = decoder.blocks[0].mlp
    assert isinstance(layer, MoE)
    grouped_mlp(
        received,
        weights_of(layer.experts, config),
        up=step.tuning.up,
        down=step.tuning.down,
        inner=work.inner,
        partials=work.partials,
        launch=step.launch,
    )
    few = work.partials[0, pairs.long()].clone()
    work.partials.zero_()
    step._experts(layer)
    torch.testing.assert_close(work.partials[0, pairs.long()], few, rtol=0.02, atol=0.02 * few.std().item())


@torch.inference_mode()
def test_what_a_step_shares_is_what_it_wrote_into_its_cache(
    tiny_config: Callable[..., ModelConfig], tiny_decoder: Callable[..., Decoder]
) -> None:
    decoder = tiny_decoder(tiny_config(num_hidden_layers=2)).to(DEVICE)
    config, shape = decoder.config, StepShape(0, 1, 1, 1, sequences=3, positions=16)
    tables = PlanTables.of(contiguous_plan(config, Topology(gpus_per_node=1)), DEVICE)
    buffers = one_sided_buffers(shape, config.top_k, 4 * config.hidden_size, False, SimulatedMemory(1).of(0))
    cache = torch.zeros(cache_shape(config, 3, 16), device=DEVICE)
    step = DecodeStep(decoder, shape, tables, buffers, [cache.data_ptr()], GREEDY, (), share=lambda _: None)
    position = torch.tensor([2, 0, 5])
    step.start(0, torch.tensor([3, 1, 4]), position, torch.tensor([1, 0, 1]), 0)
    for _ in step.run():
        pass
    assert step.work.new_kv_owned.tolist() == [[1, 0, 1]] * 2
    for row in (0, 2):
        written = cache[:, :, row, :, position[row]]  # [layers, 2, kv heads, width]
        assert written.any()
        torch.testing.assert_close(step.work.new_kv[:, row].view(written.shape), written)

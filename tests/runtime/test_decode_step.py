"""The decode step of static shape against the eager one: ranks are simulated in one process, in step.

On a GPU the same tests run the compiled kernels. Ranks share a device, so an exchange's puts all come before
its waits.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from exflow.comm.buffers import (
    StepShape,
    one_sided_buffers,
)
from exflow.kernels.grouped_mlp import grouped_mlp
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder, MoE, Rows
from exflow.model.sampling import GREEDY
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.traffic import count_traffic
from exflow.profiling.trace import DECODE
from exflow.runtime.decode_step import DecodeStep
from exflow.runtime.deploy import default_plan, load_model
from exflow.runtime.engine import Engine
from exflow.runtime.expert_parallel import PlanTables
from exflow.runtime.kv_cache import cache_shape
from exflow.runtime.request import Request
from exflow.runtime.step_buffers import weights_of
from exflow.runtime.strategies import single_process
from exflow.runtime.trace_recorder import JobRecorder
from tests.runtime.simulated_ranks import DEVICE, SimulatedAllToAll, SimulatedMemory, job, plan_of

ALL = [pytest.mark.all, pytest.mark.slow]


@pytest.mark.parametrize(
    ("ranks", "group_size", "top_k", "moe_every", "replicated"),
    [
        (1, 1, 1, 1, False),
        (2, 2, 1, 1, False),
        (4, 2, 2, 2, False),
        pytest.param(4, 4, 3, 1, False, marks=ALL),
        pytest.param(4, 1, 2, 1, False, marks=ALL),
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
        pytest.param("mixtral", 2, 2, False, marks=ALL),
        pytest.param("olmoe", 2, 1, False, marks=ALL),
        ("qwen3_moe", 2, 2, True),
        pytest.param("gpt_oss", 4, 2, False, marks=ALL),
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
    [(2, 2, 1, False), pytest.param(4, 2, 2, False, marks=ALL), (2, 2, 2, True)],
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
        pytest.param(2, 2, 1, 2, marks=ALL),
        (2, 2, 2, 3),
        pytest.param(2, 2, 4, 3, marks=ALL),
        pytest.param(2, 2, 4, 1, marks=ALL),
        pytest.param(2, 2, 1, 1, marks=ALL),
        pytest.param(3, 2, 6, 2, marks=ALL),
        pytest.param(2, 3, 3, 2, marks=ALL),
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
    tables = PlanTables.of(default_plan(config, Topology(gpus_per_node=1)), DEVICE)
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
    tables = PlanTables.of(default_plan(config, Topology(gpus_per_node=1)), DEVICE)
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

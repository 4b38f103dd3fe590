"""Routing that the engines' own code writes, imported as a trace.

Sources are looked for as test_engines.py says; Megatron-LM's `megatron` folder may lie beside the others.
"""

import base64
import contextlib
import enum
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch

from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.registry import read_trace
from exflow.profiling.trace import DECODE, PREFILL

LAYERS, HIDDEN, EXPERTS, TOP_K = (1, 3), 4, 8, 2
Run = Callable[..., Any]


@pytest.fixture
def ids() -> npt.NDArray[np.int32]:
    """[9 tokens, MoE layers, top_k]: two prompts of 3 and 4 tokens, and a step that decodes both."""
    rng = np.random.default_rng(0)
    rows = [rng.permutation(EXPERTS)[:TOP_K] for _ in range(9 * len(LAYERS))]
    return np.array(rows, np.int32).reshape(9, len(LAYERS), TOP_K)


class Withable:
    """Stand-in for the object in which SGLang's recorder keeps its current layer."""

    value: Any = None

    @contextlib.contextmanager
    def with_value(self, value: Any) -> Iterator[None]:
        self.value = value
        yield
        self.value = None


@pytest.fixture
def sglang_recorder(tmp_path: Path, run_engine_file: Run, run_engine_definition: Run) -> Run:
    """SGLang's recorder in mode per_token on a rank, and its modes of a pass."""
    mode = run_engine_definition(
        "sglang/srt/model_executor/forward_batch_info.py", "ForwardMode", IntEnum=enum.IntEnum, auto=enum.auto
    )
    moe = SimpleNamespace(expert_distribution_recorder_mode="per_token", moe_a2a_backend="none")
    execution = SimpleNamespace(moe=moe, overlap=SimpleNamespace(enable_two_batch_overlap=False))
    folder = SimpleNamespace(get=lambda: tmp_path)
    module = run_engine_file(
        "sglang/srt/eplb/expert_distribution.py",
        einops={},
        sglang__srt__environ={"envs": SimpleNamespace(SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR=folder)},
        sglang__srt__layers__moe={"get_moe_a2a_backend": None},
        sglang__srt__model_executor__forward_batch_info={"ForwardBatch": None, "ForwardMode": mode},
        sglang__srt__observability__metrics_collector={
            "STAT_LOGGER_ROLE_EXPERT_DISPATCH": None,
            "ExpertDispatchCollector": None,
            "resolve_collector_class": None,
        },
        sglang__srt__runtime_context={
            "get_device": lambda: SimpleNamespace(device="cpu"),
            "get_exec": lambda: execution,
            "get_platform": lambda: SimpleNamespace(is_hip=False),
            "get_schedule": lambda: SimpleNamespace(chunked_prefill_size=8),
            "logs_expert_balancedness_to_server_log": lambda: False,
            "reports_expert_balancedness": lambda: False,
        },
        sglang__srt__utils={"Withable": Withable, "get_device": lambda: "cpu", "get_int_env_var": None},
    )

    def start(rank: int, slots: torch.Tensor) -> tuple[Any, Any]:
        metadata = SimpleNamespace(
            num_layers=HIDDEN, num_physical_experts=slots.shape[1], physical_to_logical_map=slots
        )
        recorder = module.ExpertDistributionRecorder.init_new(metadata, rank)
        recorder.start_record()
        return recorder, mode

    return start


def sglang_pass(
    recorder: Any, number: int, ids: npt.NDArray[np.int32], positions: list[int], lengths: Any, mode: Any
) -> None:
    """One forward pass of the model: every layer is entered, those with a router record."""
    tokens = torch.arange(len(positions))
    batch = SimpleNamespace(
        input_ids=tokens, positions=torch.tensor(positions), extend_seq_lens_cpu=lengths, forward_mode=mode
    )
    with recorder.with_forward_pass(number, batch):
        for layer in range(HIDDEN):
            with recorder.with_current_layer(layer):
                if layer in LAYERS:
                    recorder.on_select_experts(torch.from_numpy(ids[:, LAYERS.index(layer)]))


def sglang_dump(recorder: Any, mode: Any, ids: npt.NDArray[np.int32]) -> None:
    sglang_pass(recorder, 1, ids[:7], [0, 1, 2, 0, 1, 2, 3], [3, 4], mode.EXTEND)
    sglang_pass(recorder, 2, ids[7:], [3, 4], None, mode.DECODE)
    recorder.stop_record()
    recorder.dump_record()


def test_sglang_recorder(sglang_recorder: Run, ids: npt.NDArray[np.int32], tmp_path: Path) -> None:
    """Two tensor-parallel ranks, ids of slots of which some are replicas."""
    slots = torch.stack([torch.arange(EXPERTS + 2).roll(layer) % EXPERTS for layer in range(HIDDEN)])
    physical = np.empty_like(ids)
    for column, layer in enumerate(LAYERS):
        first = [slots[layer].tolist().index(expert) for expert in range(EXPERTS)]
        physical[:, column] = np.array(first)[ids[:, column]]
    for rank in (0, 1):
        sglang_dump(*sglang_recorder(rank, slots), physical)
    paths = sorted(tmp_path.glob("*.pt"))
    assert len(paths) == 2
    trace = read_trace(paths)
    assert trace.experts.tolist() == ids.tolist()
    assert (trace.moe_layer_ids, trace.num_hidden_layers, trace.num_experts) == (LAYERS, HIDDEN, EXPERTS)
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4]
    assert trace.phase.tolist() == [PREFILL] * 7 + [DECODE] * 2


def test_sglang_recorder_of_data_parallel_ranks(
    sglang_recorder: Run, ids: npt.NDArray[np.int32], tmp_path: Path
) -> None:
    slots = torch.arange(EXPERTS).expand(HIDDEN, -1).contiguous()
    for rank in (0, 1):
        sglang_dump(*sglang_recorder(rank, slots), (ids + rank) % EXPERTS)
    trace = read_trace(sorted(tmp_path.glob("*.pt")))
    assert trace.experts.tolist() == [*ids.tolist(), *((ids + 1) % EXPERTS).tolist()]
    assert trace.sequence[9:].tolist() == [2, 2, 2, 3, 3, 3, 3, 2, 3]


def test_sglang_requests(run_engine_file: Run, ids: npt.NDArray[np.int32], tmp_path: Path) -> None:
    """Through SGLang's capturer, which has buffers for all hidden layers, to base64 in the response."""
    module = run_engine_file(
        "sglang/srt/state_capturer/base.py",
        sglang__srt__mem_cache__memory_pool={"ReqToTokenPool": None},
        sglang__srt__mem_cache__pool_host__common={
            "ALLOC_MEMORY_FUNCS": {"cpu": lambda shape, dtype, **_: torch.empty(shape, dtype=dtype)},
            "HostTensorAllocator": lambda: None,
            "_cuda_host_unregister": None,
        },
        sglang__srt__model_executor__forward_batch_info={"ForwardBatch": None},
        sglang__srt__utils={"is_cuda": lambda: False, "is_hip": lambda: False},
    )
    capturer = module.BaseTopkCapturer(32, 16, HIDDEN, TOP_K, "cpu", "routed_experts")
    for column, layer in enumerate(LAYERS):
        capturer.capture(layer, torch.from_numpy(ids[:, column]))
    places = torch.arange(9).flip(0)
    capturer.on_forward_end(SimpleNamespace(out_cache_loc=places, out_cache_loc_virtual=None), False, None)
    pool = SimpleNamespace(req_to_token=places[None])
    routed = capturer.get_topk(req_pool_idx=0, seqlen=10, req_to_token_pool=pool, start_len=2)
    text = base64.b64encode(routed.numpy().tobytes()).decode()
    path = tmp_path / "responses.json"
    meta = {"prompt_tokens": 6, "completion_tokens": 4, "routed_experts": text}
    path.write_text(json.dumps({"text": "", "meta_info": meta}))
    trace = read_trace([path], hints=Hints(num_experts=EXPERTS, hidden_layers=HIDDEN, top_k=TOP_K))
    assert trace.experts.tolist() == ids[2:].tolist()
    assert trace.moe_layer_ids == LAYERS
    assert trace.position.tolist() == list(range(2, 9))
    assert trace.phase.tolist() == [PREFILL] * 4 + [DECODE] * 3


def test_vllm(
    run_engine_file: Run, run_engine_definition: Run, ids: npt.NDArray[np.int32], tmp_path: Path
) -> None:
    """Through vLLM's capturer and its way to write an array into a response."""
    context = SimpleNamespace(dp_metadata=None, batch_descriptor=None)
    module = run_engine_file(
        "vllm/model_executor/layers/fused_moe/routed_experts_capturer.py",
        vllm__config={"VllmConfig": None},
        vllm__distributed__parallel_state={"get_tp_group": None},
        vllm__forward_context={"ForwardContext": None, "get_forward_context": lambda: context},
        vllm__model_executor__layers__fused_moe__config={"FusedMoEConfig": None},
        vllm__platforms={"current_platform": SimpleNamespace(device_type="cpu")},
        vllm__v1__worker__ubatching={"dbo_current_ubatch_token_offset": lambda: 0},
    )
    encode = run_engine_definition(
        "vllm/utils/serial_utils.py", "numpy2base64", np=np, io=io, pybase64=base64
    )
    model = SimpleNamespace(
        get_total_num_hidden_layers=lambda: HIDDEN,
        get_num_experts=lambda: EXPERTS,
        get_num_experts_per_tok=lambda: TOP_K,
        hf_text_config=SimpleNamespace(model_type="small"),
    )
    parallel = SimpleNamespace(data_parallel_rank=0, tensor_parallel_size=1)
    capturer = module.RoutedExpertsCapturer(16, SimpleNamespace(model_config=model, parallel_config=parallel))
    for column, layer in enumerate(LAYERS):
        capturer.capture(layer, torch.from_numpy(ids[:, column]))
    array = capturer.snapshot_routing_data(9).numpy()
    choice = {"index": 0, "text": "", "routed_experts": encode(array)}
    usage = {"prompt_tokens": 6, "completion_tokens": 4}
    (tmp_path / "a.json").write_text(json.dumps({"choices": [choice], "usage": usage}))
    np.save(tmp_path / "a.npy", array)
    for name, phase in (("a.json", [PREFILL] * 6 + [DECODE] * 3), ("a.npy", [DECODE] * 9)):
        trace = read_trace([tmp_path / name], hints=Hints(num_experts=EXPERTS))
        assert trace.experts.tolist() == ids.tolist()
        assert (trace.moe_layer_ids, trace.num_hidden_layers) == (LAYERS, HIDDEN)
        assert trace.phase.tolist() == phase


def test_megatron(
    run_engine_file: Run, ids: npt.NDArray[np.int32], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hooks, for a router that returns indices and for one that returns a map of booleans."""
    module = run_engine_file("megatron/core/transformer/moe/router_trace.py")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tracer = module.RouterTracer(str(tmp_path), max_steps=10, rank=0)
    for start, stop in ((0, 7), (7, 9)):
        for column, layer in enumerate(LAYERS):
            chosen = torch.from_numpy(ids[start:stop, column])
            if layer == LAYERS[0]:
                routed = torch.zeros(len(chosen), EXPERTS, dtype=torch.bool)
                chosen = routed.scatter(1, chosen.long(), True)
            hook = tracer.make_hook(f"decoder.layers.{layer}.mlp.router")
            hook(SimpleNamespace(topk=TOP_K), (), (None, chosen))
        hook = tracer.make_hook("mtp.layers.0.mtp_model_layer.layers.1.mlp.router")
        hook(SimpleNamespace(topk=TOP_K), (), (None, chosen))
    tracer.flush()
    trace = read_trace(list(tmp_path.glob("*.jsonl")), hints=Hints(num_experts=EXPERTS, hidden_layers=HIDDEN))
    assert trace.experts[:, 0].tolist() == np.sort(ids[:, 0]).tolist()  # a map knows no order
    assert trace.experts[:, 1].tolist() == ids[:, 1].tolist()
    assert trace.moe_layer_ids == LAYERS
    assert trace.position.tolist() == [0] * 7 + [1] * 2


def test_tensorrt_llm(
    engine_file: Callable[[str], Path],
    run_engine_file: Run,
    ids: npt.NDArray[np.int32],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = "tensorrt_llm/_torch/expert_statistic.py"
    if "_raw.safetensors" not in engine_file(source).read_text(encoding="utf-8"):
        pytest.skip("this version of TensorRT-LLM writes counts alone, no raw routing")
    assert safetensors.torch.save_file  # the file uses it without importing it
    logger = SimpleNamespace(info=print)
    module = run_engine_file(source, tensorrt_llm__logger={"logger": logger})
    monkeypatch.setenv("EXPERT_STATISTIC_PATH", str(tmp_path))
    for rank in (0, 1):
        statistic = module.ExpertStatistic(rank, 10, 11)
        for iteration, (start, stop) in {9: (0, 1), 10: (0, 7), 11: (7, 9), 12: (0, 1)}.items():
            statistic._set_iter(iteration)
            for column, layer in enumerate(LAYERS):
                statistic._set_layer(layer)
                statistic._maybe_add_info(EXPERTS, torch.from_numpy(ids[start:stop, column]))
    trace = read_trace(sorted(tmp_path.glob("*_raw.safetensors")))
    assert trace.experts.tolist() == ids.tolist()
    assert (trace.moe_layer_ids, trace.num_experts) == (LAYERS, EXPERTS)

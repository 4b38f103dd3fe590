"""Other engines' recordings as traces: what was recorded comes back, and what is damaged gets one line.

The golden files were written by the engines' own code (tests/interop/test_trace_engines.py).
"""

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exflow import cli
from exflow.commands.import_trace import layer_numbers
from exflow.errors import InputError
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.passes import SeenPasses
from exflow.profiling.importers.registry import import_trace, read_trace
from exflow.profiling.importers.requests import RequestTracker
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace
from tests.profiling.engine_files import (
    EXPERTS,
    GOLDEN,
    HIDDEN,
    IDS,
    LAYERS,
    SHAPE,
    SLOTS,
    Ids,
    all_layers,
    dump,
    lines,
    megatron_lines,
    npy_text,
    record,
    routings,
    sglang_response,
    trtllm_file,
    vllm_response,
)

GOLDEN_IDS = [[[2, 4], [6, 2]], [[3, 2], [5, 4]], [[2, 1], [4, 7]]]  # of the first three tokens
HINTS = Hints(num_experts=EXPERTS, hidden_layers=HIDDEN)


def assert_holds(trace: RoutingTrace, parts: list[Ids]) -> None:
    np.testing.assert_array_equal(trace.experts, np.concatenate(parts))
    assert (trace.moe_layer_ids, trace.num_hidden_layers, trace.num_experts) == (LAYERS, HIDDEN, EXPERTS)


# Golden files.


@pytest.mark.parametrize(
    ("names", "hints", "first"),
    [
        (["expert_distribution_recorder_2_1.pt", "expert_distribution_recorder_1_0.pt"], Hints(), 0),
        (["sglang.json"], SHAPE, 2),
        (["vllm.json"], HINTS, 0),
        (["routed_experts.npy"], HINTS, 0),
        (["trtllm/rank0_raw.safetensors", "trtllm/rank1_raw.safetensors"], Hints(hidden_layers=HIDDEN), 0),
        (["router_trace_rank0.jsonl"], HINTS, 0),
    ],
)
def test_golden_files_by_their_content(names: list[str], hints: Hints, first: int) -> None:
    trace = read_trace([GOLDEN / name for name in names], hints=hints)
    expected = np.array(GOLDEN_IDS)[first:]
    if names[0].startswith("router"):
        expected = np.array(GOLDEN_IDS)
        expected[:, 0].sort(axis=1)
    assert trace.experts[: len(expected)].tolist() == expected.tolist()
    assert_holds(trace, [trace.experts])
    assert trace.num_tokens == 9 - first


def test_golden_recorder_knows_requests() -> None:
    trace = read_trace(sorted(GOLDEN.glob("*.pt")))
    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 1]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4]
    assert trace.phase.tolist() == [PREFILL] * 7 + [DECODE] * 2


# Laws: what was written comes back.

LAW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@LAW
@given(parts=routings(), data=st.data())
def test_responses_come_back(parts: list[Ids], data: st.DataObject, tmp_path: Path) -> None:
    write = data.draw(st.sampled_from([vllm_response, sglang_response]))
    prompts = [data.draw(st.integers(0, len(ids))) for ids in parts]
    values = [write(ids, prompt) for ids, prompt in zip(parts, prompts, strict=True)]
    one_line, path = data.draw(st.booleans()), tmp_path / "a.json"
    path.write_text(json.dumps(values, indent=1)) if one_line else lines(path, values)
    trace = read_trace([path], hints=Hints(EXPERTS, None, HIDDEN, parts[0].shape[2]))
    assert_holds(trace, parts)
    assert trace.sequence.tolist() == [n for n, ids in enumerate(parts) for _ in ids]
    assert trace.position.tolist() == [p for ids in parts for p in range(len(ids))]
    boundary = np.array(prompts)[trace.sequence]
    assert trace.phase.tolist() == np.where(trace.position < boundary, PREFILL, DECODE).tolist()


@LAW
@given(parts=routings())
def test_arrays_of_vllm_come_back(parts: list[Ids], tmp_path: Path) -> None:
    paths = []
    for number, ids in enumerate(parts):
        paths.append(tmp_path / f"{number}.npy")
        np.save(paths[-1], np.asarray(all_layers(ids, 0, np.uint16), order="CF"[number % 2]))
    trace = read_trace(paths, hints=HINTS)
    assert_holds(trace, parts)
    assert trace.sequence.tolist() == [n for n, ids in enumerate(parts) for _ in ids]


@LAW
@given(parts=routings())
def test_iterations_of_tensorrt_llm_come_back(parts: list[Ids], tmp_path: Path) -> None:
    path = trtllm_file(tmp_path / "rank0_raw.safetensors", {8 + n: ids for n, ids in enumerate(parts)})
    trace = read_trace([path], hints=HINTS)
    assert_holds(trace, parts)
    assert trace.sequence.tolist() == [row for ids in parts for row in range(len(ids))]
    assert trace.position.tolist() == [n for n, ids in enumerate(parts) for _ in ids]


@LAW
@given(parts=routings())
def test_steps_of_megatron_come_back(parts: list[Ids], tmp_path: Path) -> None:
    values = [line for step, ids in enumerate(parts) for line in megatron_lines(step, ids)]
    assert_holds(read_trace([lines(tmp_path / "a.jsonl", values)], hints=HINTS), parts)


@LAW
@given(parts=routings())
def test_passes_of_sglang_come_back(parts: list[Ids], tmp_path: Path) -> None:
    records = []
    for number, ids in enumerate(parts):
        prompt = {"extend_seq_lens": [len(ids)], "forward_mode": 1}
        records.append(record(2 * number, ids, SLOTS, list(range(len(ids))), **prompt))
        records.append(record(2 * number + 1, ids[:1], SLOTS, [len(ids)]))
    trace = read_trace([dump(tmp_path / "a_0.pt", records)])
    assert_holds(trace, [rows for ids in parts for rows in (ids, ids[:1])])
    assert trace.sequence.tolist() == [n for n, ids in enumerate(parts) for _ in range(len(ids) + 1)]


# Several ranks, requests, layers.


def test_ranks_with_the_same_tokens_count_once_and_others_are_joined(tmp_path: Path) -> None:
    same = [trtllm_file(tmp_path / f"rank{rank}_raw.safetensors", {1: IDS, 2: IDS[:2]}) for rank in (0, 1)]
    assert_holds(read_trace(same, hints=HINTS), [IDS, IDS[:2]])
    other = trtllm_file(tmp_path / "rank2_raw.safetensors", {1: IDS[::-1], 2: IDS[:2]})
    trace = read_trace([*same, other], hints=HINTS)
    assert_holds(trace, [IDS, IDS[:2], IDS[::-1]])
    assert trace.sequence.tolist() == [0, 1, 2, 3, 0, 1, 4, 5, 6, 7]
    lines_of = [lines(tmp_path / f"{rank}.jsonl", megatron_lines(0, IDS)) for rank in (0, 1)]
    assert_holds(read_trace(lines_of, hints=HINTS), [IDS])


def test_a_gathered_batch_that_was_cut_counts_once(tmp_path: Path) -> None:
    """SGLang's rank 1 records such a batch under data parallelism without an all-to-all back end."""
    first = dump(tmp_path / "b_0.pt", [record(1, IDS, SLOTS, [5, 6, 7, 8])])
    second = dump(tmp_path / "a_1.pt", [record(1, IDS[:2], SLOTS, [3, 9])])
    trace = read_trace([second, first])
    assert_holds(trace, [IDS])
    assert trace.position.tolist() == [5, 6, 7, 8]


def test_replicas_of_one_expert_are_one_token(tmp_path: Path) -> None:
    """Tensor-parallel ranks may take different slots of the same expert."""
    one, two = record(1, IDS, SLOTS, [0] * 4), record(1, IDS, SLOTS, [0] * 4)
    slots = two["topk_ids_of_layer"]
    assert SLOTS[1][1] == SLOTS[1][9] == 0
    slots[1][slots[1] == 1] = 9
    trace = read_trace([dump(tmp_path / "a_0.pt", [one]), dump(tmp_path / "a_1.pt", [two])])
    assert_holds(trace, [IDS])


def test_seen_passes_compare_what_both_hold() -> None:
    seen = SeenPasses(num_files=2)
    assert not seen.is_repeated(1, IDS)
    assert seen.is_repeated(1, IDS[:2])
    assert not seen.is_repeated(2, IDS)
    assert not seen.is_repeated(1, IDS[1:])
    assert not seen.is_repeated(3, IDS[:0])
    assert not seen.is_repeated(3, IDS)


def test_requests_are_followed_by_their_positions() -> None:
    tracker = RequestTracker(itertools.count(5))
    assert tracker.follow([(0, 3), (0, 3)]) == [5, 6]
    assert tracker.follow([(3, 1), (0, 2), (3, 1)]) == [5, 7, 6]
    assert tracker.follow([(4, 1), (4, 1)]) == [5, 6]
    assert tracker.follow([(9, 2), (11, 1)]) == [8, 9]  # nothing leads there; not within one pass
    assert tracker.follow([(0, 4), (4, 1)]) == [10, 11]
    assert tracker.follow([(5, 1)]) == [11]  # the one that ran last


def test_mixed_passes_padding_and_idle_ranks(tmp_path: Path) -> None:
    padded = record(2, IDS, SLOTS, [0, 1, 7, 0], extend_seq_lens=[2, 1], forward_mode=3)
    padded["topk_ids_of_layer"][:, 3] = -1
    idle = record(1, IDS[:0], SLOTS, [], forward_mode=4)
    trace = read_trace([dump(tmp_path / "a_0.pt", [idle, padded])])
    assert_holds(trace, [IDS[:3]])
    assert trace.phase.tolist() == [PREFILL, PREFILL, DECODE]
    assert trace.sequence.tolist() == [0, 0, 1]


def test_layers_are_chosen(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [vllm_response(IDS, 2)])
    trace = read_trace([path], hints=Hints(EXPERTS, (3,)))
    assert (trace.moe_layer_ids, trace.num_hidden_layers) == ((3,), HIDDEN)
    assert trace.experts.tolist() == IDS[:, 1:].tolist()
    np.savez(tmp_path / "a.npz", experts=IDS, weights=IDS / 8, experts_per_layer=[5, 8])
    trace = read_trace([tmp_path / "a.npz"], hints=Hints(moe_layers=(1,), hidden_layers=9))
    assert (trace.moe_layer_ids, trace.num_hidden_layers, trace.experts_per_layer) == ((1,), 9, (8,))
    assert trace.weights is not None and trace.weights.tolist() == (IDS[:, 1:] / 8).tolist()
    with pytest.raises(InputError, match=r"a\.npz: layer 2 of moe_layers was not recorded, these were: \["):
        read_trace([tmp_path / "a.npz"], hints=Hints(moe_layers=(1, 2)))


def test_layers_of_top_1_are_asked_for(tmp_path: Path) -> None:
    ids = all_layers(IDS[:, :, :1], 0, np.uint8)
    np.save(tmp_path / "a.npy", ids)
    with pytest.raises(
        InputError, match=r"a\.npy: layer 0 holds expert 0 for every token, which a dense lay"
    ):
        read_trace([tmp_path / "a.npy"])
    trace = read_trace([tmp_path / "a.npy"], hints=Hints(EXPERTS, LAYERS))
    assert_holds(trace, [IDS[:, :, :1]])
    np.save(tmp_path / "b.npy", ids[:, list(LAYERS)])
    assert read_trace([tmp_path / "b.npy"]).moe_layer_ids == (0, 1)


def test_what_was_not_captured_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    response = vllm_response(np.concatenate([IDS[:2] * 0, IDS]), 4)
    path = lines(tmp_path / "a.jsonl", [{"routed_experts": None}, response])
    trace = read_trace([path], hints=HINTS)
    assert_holds(trace, [IDS])
    assert trace.position.tolist() == [2, 3, 4, 5]
    assert "left out 2 tokens whose routing was not captured" in caplog.text
    assert "left out 1 responses without routing (the first: " in caplog.text


def test_every_place_of_a_response(tmp_path: Path) -> None:
    text = npy_text(all_layers(IDS, 0, np.uint8))
    counts = {"prompt_tokens": 3, "completion_tokens": 4}  # 7 tokens: the rows begin at position 2
    for value, positions in (
        ({"routed_experts": text}, [0, 1, 2, 3]),
        ({"sglext": {"routed_experts": text}, "choices": [{}], "usage": counts}, [2, 3, 4, 5]),
        ({"choices": [{"meta_info": {"routed_experts": text} | counts}, {}]}, [2, 3, 4, 5]),
        ({"choices": [{"routed_experts": text}], "usage": counts}, [2, 3, 4, 5]),
        ({"choices": [{"routed_experts": text}, {}], "usage": counts}, [0, 1, 2, 3]),
        ({"choices": [{"routed_experts": text}], "usage": counts | {"prompt_tokens": 0}}, [0, 1, 2, 3]),
    ):
        trace = read_trace([lines(tmp_path / "a.jsonl", [value])], hints=HINTS)
        assert_holds(trace, [IDS])
        assert trace.position.tolist() == positions


# Writing the trace, and the command.


def test_blocks_are_joined_in_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exflow.profiling.importers.arrays.BLOCK_BYTES", 64)
    monkeypatch.setattr("exflow.profiling.importers.registry._SHARD_TOKENS", 3)
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(EXPERTS), (50, 2, 1)), axis=2)[:, :, :2]
    np.savez_compressed(
        tmp_path / "a.npz",
        experts=ids,
        weights=ids / 8,
        seq=np.arange(50) // 7,
        pos=np.arange(50),
        num_experts=8,
    )
    done: list[tuple[int, int]] = []
    imported = import_trace(
        [tmp_path / "a.npz"], tmp_path / "t", None, Hints(), lambda *place: done.append(place)
    )
    trace = RoutingTrace.load(tmp_path / "t")
    assert trace.digest() == read_trace([tmp_path / "a.npz"]).digest()
    assert (imported.num_tokens, imported.num_sequences, imported.layout) == (50, 8, trace.layout)
    assert len(list((tmp_path / "t").glob("shard-*"))) == 17
    assert len(done) > 10 and done == sorted(done)


def test_an_error_leaves_the_trace_that_was_there(tmp_path: Path) -> None:
    good = lines(tmp_path / "a.jsonl", [vllm_response(IDS, 2)] * 3)
    bad = lines(tmp_path / "b.jsonl", [vllm_response(IDS, 2), {"routed_experts": 7}])
    output = tmp_path / "t"
    import_trace([good], output, None, HINTS, lambda done, total: None)
    before = RoutingTrace.load(output).digest()
    with pytest.raises(InputError, match=r"b\.jsonl: line 2: routed_experts: is 7; give"):
        import_trace([good, bad], output, None, HINTS, lambda done, total: None)
    assert RoutingTrace.load(output).digest() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "t"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(InputError, match="holds something other than a trace; choose another place"):
        import_trace([good], tmp_path / "other", None, HINTS, lambda done, total: None)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = lines(tmp_path / "a.jsonl", [sglang_response(IDS, 2), sglang_response(IDS[:3], 1)])
    line = f"exflow import {path} --hidden-layers 4 --top-k 2 --num-experts 8 --moe-layers 3 --json"
    monkeypatch.setattr(sys, "argv", [*line.split(), "-o", str(tmp_path / "t")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out) == {
        "trace": str(tmp_path / "t"),
        "model": "",
        "tokens": 7,
        "sequences": 2,
        "moe_layers": 1,
        "experts": 8,
        "top_k": 2,
    }
    assert RoutingTrace.load(tmp_path / "t").moe_layer_ids == (3,)


def test_layer_numbers() -> None:
    assert layer_numbers(None) is None
    assert layer_numbers("5, 0-2,9") == (0, 1, 2, 5, 9)
    for text, message in (
        ("3-1", "'3-1' is no layer or range"),
        ("a", "'a' is no"),
        ("1,1-2", "names"),
    ):
        with pytest.raises(InputError, match=f"--moe-layers {text}: {message}"):
            layer_numbers(text)

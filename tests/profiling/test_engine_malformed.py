"""Malformed files of the engines: one line that names file, place and remedy."""

import base64
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from exflow.errors import InputError
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.registry import read_trace
from tests.profiling.engine_files import (
    EXPERTS,
    IDS,
    STEP,
    Make,
    all_layers,
    ids_tensor,
    json_file,
    lines,
    megatron_lines,
    npy_header,
    npy_text,
    one,
    pt,
    raw,
    set_at,
    sglang_response,
    tensor,
    tensors_file,
    trtllm_file,
    vllm_response,
    vllm_text,
)

MALFORMED = [
    ("responses", raw(b'{"a": 1}\n{"b": '), r"line 1: holds no routed_experts; start the server with --ena"),
    (
        "responses",
        raw(b'{"routed_experts": null}\n{"b": \n'),
        r"line 2 is not valid JSON \(.*\); give the file",
    ),
    ("responses", raw(b'{"routed'), r"line 1 is not valid JSON"),
    ("responses", raw(b"[" * 100_000), r"line 1 is not valid JSON \(nested too deeply\)"),
    ("responses", raw(b'{\n"a": [1,\n2}'), r"the file is not valid JSON"),
    ("responses", raw(b'{"a": "\xff"}\n'), r"line 1 is not valid JSON"),
    ("responses", raw(b'\n{\n"a": [1,\n2}'), r"the file is not valid JSON"),
    ("responses", json_file(7), r"line 1: is 7; give the JSON object of a response"),
    ("responses", json_file([7, {"routed_experts": None}]), r"line 1\[0\]: is 7; give"),
    (
        "responses",
        json_file({"routed_experts": None}),
        r"holds routed_experts without a row \(aborted\?\); left",
    ),
    ("responses", vllm_text(7), r"line 1: routed_experts: is 7; give the base64 text"),
    ("responses", vllm_text("AAA"), r"line 1: routed_experts: is not base64 \(.*\); give the text"),
    ("responses", vllm_text("é"), r"line 1: routed_experts: is not base64"),
    ("responses", vllm_text("AAAA"), r"is SGLang's, which says no shape; give hidden_layers and top_k"),
    ("responses", vllm_text(npy_text(IDS)[:40]), r"is no \.npy file \(.*\); give the response whole"),
    ("responses", vllm_text(npy_text(IDS * 1.0)), r"is float64 \(4, 2, 2\); give integers \[tokens, hidden"),
    ("responses", vllm_text(npy_text(IDS[0])), r"is int64 \(2, 2\); give integers \[tokens, hidden"),
    ("responses", vllm_text(npy_text(np.array([None]))), r"is no \.npy file \(the array holds Python objec"),
    (
        "responses",
        vllm_text(base64.b64encode(npy_header((10**9, 27, 4))).decode()),
        r"is no \.npy file \(the header declares 108000000000 bytes of data, there are 0\)",
    ),
    ("responses", vllm_text(npy_text(IDS - 2)), r"experts: holds -2; ids start at 0"),
    (
        "responses",
        json_file(vllm_response(IDS, 1), vllm_response(IDS[:, :, :1].repeat(3, 2) + 1, 1)),
        r"has 2 layers and top 3, .* has 2 and 2; join files of one model",
    ),
    (
        "responses",
        vllm_text(npy_text(np.array([[[0, 0], [1, 2]], [[1, 2], [0, 0]]]))),
        r"layer 0 holds no routing of token 0, other layers do; record it again, or give moe_layers",
    ),
    (
        "responses",
        json_file(vllm_response(IDS, 1), {"routed_experts": npy_text(np.full((1, 4, 2), [1, 2]))}),
        r"layer 0 routes here, and not in the rows before; import models one by one",
    ),
    (
        "responses",
        json_file(vllm_response(IDS, 1), {"routed_experts": npy_text(np.full((1, 2, 2), [1, 2]))}),
        r"has 2 layers, layer 3 is not among them; give moe_layers below",
    ),
    (
        "responses",
        json_file(
            {
                "meta_info": {"prompt_tokens": 1, "completion_tokens": 1}
                | {"routed_experts": npy_text(all_layers(IDS, 0, np.uint8))}
            }
        ),
        r"has rows for 4 tokens, the response has 2; give the right hidden_layers and top_k",
    ),
    (
        "responses",
        json_file(
            {
                "meta_info": {"prompt_tokens": 10**30, "completion_tokens": 1}
                | {"routed_experts": npy_text(all_layers(IDS, 0, np.uint8))}
            }
        ),
        r"line 1: counts 10{29}1 tokens; give the response whole",
    ),
    ("npy", raw(npy_header((10**9, 27, 4))), r"cannot be read \(the header declares 108000000000 bytes of"),
    ("npy", raw(npy_header((-4, -2))), r"cannot be read \(the header declares the shape \(-4, -2\)\); give"),
    ("npy", raw(b"\x93NUMPY\x09\x00"), r"cannot be read \(.*version.*\); give an \.npy"),
    (
        "trtllm",
        raw(b"\xff" * 8 + b"{"),
        r"is truncated \(9 bytes end inside the header\); give the rank\*_raw",
    ),
    ("trtllm", raw(struct.pack("<Q", 2) + b"{]"), r"the header is not JSON"),
    ("trtllm", raw(struct.pack("<Q", 2) + b"[]"), r"the header is not a JSON object"),
    ("trtllm", tensors_file({}), r"holds no routing of any token"),
    (
        "trtllm",
        tensors_file({"a": tensor([0, 2], 0, 0)}),
        r"holds 'a', not iteration_layer; give the rank\*_",
    ),
    ("trtllm", tensors_file({"1_2": 3}), r"entry for '1_2' is no tensor of integers"),
    ("trtllm", tensors_file({"1_2": tensor([1, 2], 0, 8, "F32")}, bytes(8)), r"no tensor of integers \('F32"),
    (
        "trtllm",
        tensors_file({"1_2": tensor([10**9, 25], 0, 10**11)}),
        r"'1_2' has the shape \[1000000000, 25\] and the bytes 0 to 100000000000 of 0",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([1, 2], 0, 9)}, bytes(9)),
        r"'1_2' has the shape \[1, 2\] and the",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([1, 2], -8, 0)}, bytes(9)),
        r"'1_2' has the shape \[1, 2\] and the",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([4], 0, 16)}, bytes(16)),
        r"1_2: has the shape \[4\], ids have \[",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([1, 2], 0, 8), "1_3": tensor([2, 2], 8, 24)}, bytes(24)),
        r"iteration 1 has \[2, 2\] ids in layer 3 and \[1, 2\] in layer 2; leave layers out with",
    ),
    (
        "trtllm",
        tensors_file({"1_2": tensor([1, 2], 0, 8), "2_3": tensor([1, 2], 8, 16)}, bytes(16)),
        r"a: holds layers \[3\] after \[2\]; record it again, or give moe_layers with those that are alw",
    ),
    (
        "megatron",
        json_file(STEP[0] | {"step": "0"}),
        r"line 1: step: is '0', not a number from 0 up; give the",
    ),
    ("megatron", json_file([1]), r"line 1\[0\]: step: is None, not a number"),
    (
        "megatron",
        json_file(STEP[0] | {"top_indices": [[1, 2], [3]]}),
        r"top_indices: is \[\[1, 2\], \[3\]\]; 4",
    ),
    (
        "megatron",
        json_file(STEP[0] | {"top_indices": [[0.5, 1]] * 4}),
        r"4 rows of 2 ids are needed to match",
    ),
    ("megatron", json_file(STEP[0] | {"top_indices": "x"}), r"top_indices: is 'x'; 4 rows of 2 ids"),
    (
        "megatron",
        json_file(STEP[0] | {"top_indices": [[1 << 40, 1]] * 4}),
        r"holds 1099511627776, which is no",
    ),
    ("megatron", json_file(STEP[0] | {"num_tokens": 10**12}), r"num_tokens: is 1000000000000, not a number"),
    (
        "megatron",
        json_file(STEP[0] | {"top_indices": [], "topk": 1 << 30}),
        r"top_indices: is \[\]; 4 rows of",
    ),
    ("megatron", json_file(STEP[0] | {"top_indices": [[-2, 1]] * 4}), r"experts: holds -2; ids start at 0"),
    (
        "megatron",
        json_file(STEP[0], megatron_lines(0, IDS[:3])[1]),
        r"step 0 has ids \[\(3, 2\)\] in layer 3 and \[\(4, 2\)\] in layer 1, one call each; give",
    ),
    (
        "sglang",
        pt(logical_count=torch.zeros(2, 4, 8)),
        r"holds loads \(mode stat\), which say nothing of aff",
    ),
    ("sglang", pt(records=None), r"holds .*, no records; give the \.pt files that SGLang's recorder dumped"),
    ("sglang", pt(last_physical_to_logical_map=None), r"has no last_physical_to_logical_map; give the"),
    (
        "sglang",
        pt(last_physical_to_logical_map=[1]),
        r"last_physical_to_logical_map: is \[1\]; a tensor of in",
    ),
    ("sglang", pt(last_physical_to_logical_map=torch.full((4, 8), -1)), r"_logical_map: holds no expert ids"),
    (
        "sglang",
        pt(one(), last_physical_to_logical_map=torch.zeros(3, 8).long()),
        r"has 4 layers, last_physical_to_",
    ),
    ("sglang", pt(), r"holds no routing of any token"),
    ("sglang", pt({"a": 1}), r"records\[0\]: is \{'a': 1\}; give the"),
    (
        "sglang",
        pt({"forward_pass_id": 1, "global_physical_count": torch.zeros(1)}),
        r"records\[0\]: holds loads \(mode per_pass\), which say nothing of affinity; record with",
    ),
    ("sglang", pt(ids_tensor(lambda it: it.float())), r"topk_ids_of_layer: is tensor\(.*; a tensor of integ"),
    ("sglang", pt(ids_tensor(lambda it: it[:, :1].expand(-1, 10**9, -1))), r"a tensor of integers in 3 dim"),
    ("sglang", pt(ids_tensor(lambda it: it.to_sparse())), r"a tensor of integers in 3 dimensions is needed"),
    (
        "sglang",
        pt(ids_tensor(set_at(1, 0, 0, to=10))),
        r"holds slot 10 of 10; record with --disable-shared-e",
    ),
    (
        "sglang",
        pt(ids_tensor(lambda it: it.__setitem__((1, 2, slice(3)), torch.tensor([1, -1, 2])))),
        r"records\[0\]: topk_ids_of_layer: has -1 among the first 2 ids of a token; give",
    ),
    (
        "sglang",
        pt(ids_tensor(lambda it: it.__setitem__(3, -1)), one()),
        r"layer 3 routes here, and not in the rows",
    ),
    ("sglang", pt(one(forward_pass_id=[1])), r"forward_pass_id: is \[1\], no number; give"),
    ("sglang", pt(one(positions=[0, 1])), r"records\[0\]: positions: is \[0, 1\]; 4 integers are needed"),
    ("sglang", pt(one(positions=[0, 1, 2, -3])), r"positions: holds -3 to 2; give"),
    ("sglang", pt(one(positions=[[0], [1, 2]])), r"positions: is \[\[0\], \[1, 2\]\]; 4 integers are needed"),
    (
        "sglang",
        pt(one(forward_mode=5)),
        r"forward_mode: is 5, not extend, decode or mixed; record without spe",
    ),
    ("sglang", pt(one(forward_mode=1)), r"extend_seq_lens: is None; give"),
    ("sglang", pt(one(forward_mode=1, extend_seq_lens=[3, 2])), r"extend_seq_lens: are 5 tokens in all, the"),
    ("sglang", pt(one(forward_mode=1, extend_seq_lens=[3])), r"extend_seq_lens: leave out tokens that were"),
    ("sglang", pt(one(forward_mode=1, extend_seq_lens=[])), r"extend_seq_lens: leave out tokens that were r"),
    (
        "sglang",
        pt(one(forward_mode=1, extend_seq_lens=[4], positions=[0, 1, 3, 2])),
        r"do not ascend by 1 in",
    ),
]


@pytest.mark.parametrize(("format", "make", "message"), MALFORMED)
def test_malformed(format: str, make: Make, message: str, tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    with pytest.raises(InputError, match=message) as caught:
        read_trace([path], format)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert len(text) < 500


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (
            Hints(EXPERTS, None, 3, 2),
            r"has 128 bytes, no multiple of 24 for a token \(int32, 3 layers, top 2\)",
        ),
        (
            Hints(EXPERTS, None, 2, 1),
            r"has rows for 16 tokens, the response has 5; give the right hidden_la",
        ),
        (Hints(2, None, 4, 2), r"experts: holds 3; values must be from 0 to 1"),
        (Hints(EXPERTS, (1, 7), 4, 2), r"has 4 layers, layer 7 is not among them"),
    ],
)
def test_hints_that_do_not_fit(hints: Hints, message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [sglang_response(IDS, 2)])
    with pytest.raises(InputError, match=message):
        read_trace([path], hints=hints)
    np.save(tmp_path / "a.npy", all_layers(IDS, 0, np.uint8))
    with pytest.raises(InputError, match=r"has 4 hidden layers, hidden_layers says 9; leave it out"):
        read_trace([tmp_path / "a.npy"], hints=Hints(hidden_layers=9))


def test_meta_info_of_tensorrt_llm(tmp_path: Path) -> None:
    path = trtllm_file(tmp_path / "rank0_raw.safetensors", {1: IDS})
    for content, message in (
        ('{"num_experts": "8"}', r"meta_info\.json: num_experts: is '8'; give an integer"),
        ("{", r"meta_info\.json: the meta_info\.json is not valid JSON"),
        ('{"num_experts": 3}', r"rank0_raw\.safetensors: experts: holds 3; values must be from 0 to 2"),
    ):
        (tmp_path / "meta_info.json").write_text(content)
        with pytest.raises(InputError, match=message):
            read_trace([path])


def test_files_of_two_formats(tmp_path: Path) -> None:
    first = trtllm_file(tmp_path / "rank0_raw.safetensors", {1: IDS})
    second = lines(tmp_path / "a.jsonl", STEP)
    with pytest.raises(InputError, match=r"a\.jsonl: is megatron, .* is trtllm; give files of one recording"):
        read_trace([first, second])

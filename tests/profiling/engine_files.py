"""Builders of tiny files as the engines write them: vLLM, SGLang, TensorRT-LLM, Megatron."""

import base64
import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from safetensors.numpy import save

from exflow.profiling.importers.foreign import Hints

GOLDEN = Path(__file__).parent / "golden"
LAYERS, HIDDEN, EXPERTS = (1, 3), 4, 8
Ids = npt.NDArray[np.int64]
# Writers of the formats, for rows [tokens, MoE layers, top_k] of the hidden layers LAYERS.


def all_layers(ids: Ids, fill: int, dtype: Any) -> npt.NDArray[Any]:
    """[tokens, HIDDEN, top_k]: the dense layers filled."""
    whole = np.full((len(ids), HIDDEN, ids.shape[2]), fill, dtype)
    whole[:, list(LAYERS)] = ids
    return whole


def npy_text(array: npt.NDArray[Any]) -> str:
    with io.BytesIO() as file:
        np.save(file, array)
        return base64.b64encode(file.getvalue()).decode()


def vllm_response(ids: Ids, prompt: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt, "completion_tokens": len(ids) + 1 - prompt}
    text = npy_text(all_layers(ids, 0, np.uint8))
    return {"choices": [{"index": 0, "routed_experts": text}], "usage": usage}


def sglang_response(ids: Ids, prompt: int) -> dict[str, Any]:
    text = base64.b64encode(all_layers(ids, 0, np.int32).tobytes()).decode()
    meta = {"prompt_tokens": prompt, "completion_tokens": len(ids) + 1 - prompt, "routed_experts": text}
    return {"text": "", "meta_info": meta}


def record(number: int, ids: Ids, slots: npt.NDArray[Any], positions: list[int], **more: Any) -> Any:
    """A forward pass of SGLang's recorder; each expert is in the first of its slots."""
    physical = np.array([[row.tolist().index(expert) for expert in range(EXPERTS)] for row in slots])
    buffer = np.full((HIDDEN, len(ids), 8), -1, np.int32)
    for column, layer in enumerate(LAYERS):
        buffer[layer, :, : ids.shape[2]] = physical[layer][ids[:, column]]
    fields = {
        "forward_pass_id": number,
        "rank": 0,
        "gatherer_key": "primary",
        "input_ids": list(range(len(ids))),
        "positions": positions,
        "extend_seq_lens": None,
        "forward_mode": 2,
        "topk_ids_of_layer": torch.from_numpy(buffer),
        "misc_objects": [],
        "global_physical_count": torch.zeros(HIDDEN, slots.shape[1], dtype=torch.int32),
    }
    return fields | more


SLOTS = np.stack([np.roll(np.arange(EXPERTS + 2) % EXPERTS, layer) for layer in range(HIDDEN)])


def dump(path: Path, records: list[Any], slots: npt.NDArray[Any] = SLOTS) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": torch.from_numpy(slots)}, path)
    return path


def trtllm_file(path: Path, iterations: dict[int, Ids]) -> Path:
    tensors = {
        f"{number}_{layer}": np.ascontiguousarray(ids[:, column], np.int32)
        for number, ids in iterations.items()
        for column, layer in enumerate(LAYERS)
    }
    path.write_bytes(save(tensors))
    return path


def megatron_lines(step: int, ids: Ids, **more: Any) -> list[dict[str, Any]]:
    shape = {"num_tokens": len(ids), "topk": ids.shape[2]}
    return [
        {"step": step, "block": "decoder", "layer": layer, "rank": 0, **shape}
        | {"top_indices": ids[:, column].tolist(), **more}
        for column, layer in enumerate(LAYERS)
    ]


def lines(path: Path, values: list[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


@st.composite
def routings(draw: st.DrawFn, parts: int = 3) -> list[Ids]:
    """Up to `parts` arrays of ids, of distinct experts for each token and layer."""
    top_k, rng = draw(st.integers(2, 4)), np.random.default_rng(draw(st.integers(0, 99)))
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=parts))
    return [
        np.array([[rng.permutation(EXPERTS)[:top_k] for _ in LAYERS] for _ in range(size)]) for size in sizes
    ]


IDS = np.array([[[0, 3], [2, 1]], [[1, 0], [3, 2]], [[2, 3], [0, 1]], [[0, 1], [1, 2]]])
SHAPE = Hints(num_experts=EXPERTS, hidden_layers=HIDDEN, top_k=2)
# What is wrong with a file, and what the error says.

Make = Callable[[Path], Path]


def json_file(*values: Any) -> Make:
    return lambda path: lines(path, list(values))


def raw(content: bytes) -> Make:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


def vllm_text(text: Any) -> Make:
    return json_file({"choices": [{"routed_experts": text}]})


def pt(*records: Any, **top: Any) -> Make:
    def make(path: Path) -> Path:
        whole = {"records": list(records), "last_physical_to_logical_map": torch.from_numpy(SLOTS)} | top
        torch.save({name: value for name, value in whole.items() if value is not None}, path)
        return path

    return make


def one(**more: Any) -> Any:
    return record(1, IDS, SLOTS, [0, 1, 2, 3]) | more


def ids_tensor(change: Callable[[Any], Any]) -> Any:
    fields = one()
    changed = change(fields["topk_ids_of_layer"])
    return fields | ({} if changed is None else {"topk_ids_of_layer": changed})


def set_at(*place: int, to: int) -> Callable[[Any], None]:
    return lambda tensor: tensor.__setitem__(place, to)


def tensors_file(header: Any, data: bytes = b"") -> Make:
    text = json.dumps(header).encode()
    return raw(struct.pack("<Q", len(text)) + text + data)


def tensor(shape: list[int], begin: int, end: int, dtype: str = "I32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def npy_header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    with io.BytesIO() as file:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        return file.getvalue()


STEP = megatron_lines(0, IDS)

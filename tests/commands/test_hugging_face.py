"""exflow profile hf:FOLDER: what transformers routes, no code but ours, one line for what is wrong."""

import builtins
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from exflow.commands.profile import profile_hugging_face, windows_of_text
from exflow.errors import InputError
from tests.commands.hugging_face_folders import (
    INDEX,
    TEXT,
    WEIGHTS,
    Change,
    both,
    change_json,
    drop,
    model_type,
    profile_folder,
    refusal,
    write,
)
from tests.payload import Payload

transformers = pytest.importorskip("transformers", reason="needs transformers")


def test_a_hugging_face_model_in_a_folder(tmp_path: Path, mixtral: Path, byte_tokenizer: Tokenizer) -> None:
    trace = profile_folder(mixtral, tmp_path / "trace", length=20)
    assert (trace.num_tokens, trace.model, trace.num_experts, trace.top_k) == (200, "tiny-mixtral", 8, 2)
    assert trace.sequence.tolist() == [number for number in range(10) for _ in range(20)]
    assert trace.position.tolist() == list(range(20)) * 10
    assert (
        trace.experts.tolist() == routed(mixtral, windows_of_text(byte_tokenizer, [TEXT], 20, 200)).tolist()
    )
    assert profile_folder(mixtral, tmp_path / "whole").num_tokens == 3 * 64


def routed(folder: Path, windows_NS: Tensor) -> Tensor:
    """The experts [tokens, layers, k] by the logits of a Mixtral's routers, as transformers loads it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    heard: list[Any] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, args, output: heard.append(output[0]))
    with torch.no_grad():
        for window_S in windows_NS:
            model(input_ids=window_S[None])
    logits = torch.stack([torch.cat(heard[layer::2]) for layer in range(2)], dim=1)
    return logits.topk(2).indices


def test_a_length_that_a_hugging_face_model_has_not(tmp_path: Path, mixtral: Path) -> None:
    with pytest.raises(InputError, match="--length 65: the model has 64 positions; give 64 or less"):
        profile_folder(mixtral, tmp_path / "trace", length=65)


@pytest.mark.parametrize("positions", [0, -1])
def test_positions_that_say_no_limit(qwen_copy: Path, positions: int) -> None:
    change_json(qwen_copy / "config.json", max_position_embeddings=positions)
    assert profile_folder(qwen_copy, qwen_copy.parent / "trace", length=100).num_tokens == 200


def test_stored_truncation_and_padding_are_not_applied(qwen_copy: Path, qwen: Path) -> None:
    stored = {
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {
            "strategy": {"Fixed": 4000},
            "direction": "Left",
            "pad_to_multiple_of": None,
            "pad_id": 3,
            "pad_type_id": 0,
            "pad_token": "d",
        },
    }
    change_json(qwen_copy / "tokenizer.json", **stored)
    trace = profile_folder(qwen_copy, qwen_copy.parent / "trace", length=20)
    plain = profile_folder(qwen, qwen_copy.parent / "plain", length=20)
    assert trace.experts.tolist() == plain.experts.tolist()


def test_a_tokenizer_of_another_model(mixtral: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(mixtral)
    with pytest.raises(InputError, match="the tokenizer gives token 257, the model knows 257 tokens"):
        profile_hugging_face(model, torch.tensor([[0, 257]]), None)


def test_without_transformers(tmp_path: Path, mixtral: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        InputError, match=r"transformers is not installed .*pip install 'exflow\[transformers\]'"
    ):
        profile_folder(mixtral, tmp_path / "trace")


# ---- code that is not ours

MARK = "ran.txt"
AUTO_MAP = {
    "AutoConfig": "foreign.ForeignConfig",
    "AutoModelForCausalLM": "foreign.ForeignModel",
    "AutoModel": "foreign.ForeignModel",
    "AutoTokenizer": ["foreign.ForeignTokenizer", None],
    "AutoProcessor": "foreign.ForeignProcessor",
}


@pytest.fixture
def foreign(qwen_copy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder full of code, with somebody at the keyboard who would say yes."""
    mark = qwen_copy.parent / MARK
    code = f"from pathlib import Path\nPath({str(mark)!r}).write_text('ran')\n"
    (qwen_copy / "custom_generate").mkdir()
    for name in ("foreign.py", "modeling_foreign.py", "__init__.py", "custom_generate/generate.py"):
        (qwen_copy / name).write_text(code)
    for name in ("processor_config.json", "preprocessor_config.json", "generation_config.json"):
        (qwen_copy / name).write_text(json.dumps({"auto_map": AUTO_MAP, "custom_generate": "."}))
    (qwen_copy / "chat_template.jinja").write_text("{{ ''.__class__ }}")
    (qwen_copy / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    change_json(qwen_copy / "config.json", auto_map=AUTO_MAP)
    change_json(qwen_copy / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="ForeignTokenizer")

    def asked(*prompt: str) -> str:
        mark.write_text("asked")
        return "y"

    monkeypatch.setattr(builtins, "input", asked)
    return qwen_copy


def test_code_beside_the_weights_is_not_run(foreign: Path, qwen: Path) -> None:
    """The family is known: transformers' own class is used, and gives what it gives without the code."""
    trace = profile_folder(foreign, foreign.parent / "trace", length=20)
    assert not (foreign.parent / MARK).exists()
    plain = profile_folder(qwen, foreign.parent / "plain", length=20)
    assert trace.experts.tolist() == plain.experts.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (model_type("kimi_k2"), "model/config.json: model_type 'kimi_k2' is not known to transformers"),
        (model_type(""), "model/config.json: model_type '' is not known to transformers"),
        (model_type("clip"), "model/config.json: model_type 'clip' is no causal language model"),
        (drop(WEIGHTS), f"model: holds neither {WEIGHTS} nor {INDEX}, and pickled weights"),
        (both(drop("tokenizer.json"), write("tokenizer.model", "")), "model/tokenizer.model: the tokenizer"),
        (both(drop("tokenizer.json"), write("tiktoken.model", "")), "model/tiktoken.model: the tokenizer"),
        (both(drop("tokenizer.json"), write("vocab.json", "{}")), "model/vocab.json: the tokenizer"),
    ],
)
def test_what_needs_code_beside_the_weights_is_refused(foreign: Path, change: Change, message: str) -> None:
    change(foreign)
    assert refusal(foreign).startswith(message)
    assert not (foreign.parent / MARK).exists()


@pytest.mark.parametrize("part", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_kernels_that_a_folder_names_are_not_fetched(qwen_copy: Path, part: str) -> None:
    change_json(qwen_copy / "config.json", **{part: "somebody/kernel"})
    assert profile_folder(qwen_copy, qwen_copy.parent / "trace", length=20).num_tokens == 200

"""exflow profile hf:FOLDER: what transformers routes, no code but ours, one line for what is wrong."""

import builtins
import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from exflow.commands.profile import profile_hugging_face, profile_text, windows_of_text
from exflow.errors import InputError
from exflow.profiling.trace import RoutingTrace

transformers = pytest.importorskip("transformers", reason="needs transformers")

TEXT = "".join(chr(ord("a") + number % 26) for number in range(1000))
TINY = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

Change = Callable[[Path], Any]


def save(folder: Path, config: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Tokenizer) -> Path:
    """The folder of a tiny Hugging Face model with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("hugging-face") / "tiny-mixtral"
    save(folder, transformers.MixtralConfig(num_local_experts=8, num_experts_per_tok=2, **TINY))
    transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def qwen(mixtral: Path) -> Path:
    """As mixtral, of a family with a head_dim and with experts that are stored one by one."""
    folder = copied(mixtral, mixtral.with_name("tiny-qwen"), "*.safetensors")
    save(folder, transformers.Qwen3MoeConfig(**TINY, **MOE))
    return folder


@pytest.fixture
def folder(tmp_path: Path, qwen: Path) -> Path:
    """A copy to spoil."""
    return copied(qwen, tmp_path / "model", "nothing")


def copied(folder: Path, target: Path, without: str) -> Path:
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(without))
    return target


def profile_folder(folder: Path, output: Path, length: int | None = None) -> RoutingTrace:
    (output.parent / "text.txt").write_text(TEXT)
    return profile_text(
        f"hf:{folder}",
        [str(output.parent / "text.txt")],
        output,
        max_tokens=200,
        length=length,
        weights=True,
        device="cpu",
        advance=lambda done, total: None,
    )


def refusal(folder: Path) -> str:
    """The line that refuses a folder, without the folder's own path."""
    with pytest.raises(InputError) as error:
        profile_folder(folder, folder.parent / "trace", length=20)
    assert len(str(error.value)) < 600
    return str(error.value).replace(str(folder), "model")


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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
def test_positions_that_say_no_limit(folder: Path, positions: int) -> None:
    change_json(folder / "config.json", max_position_embeddings=positions)
    assert profile_folder(folder, folder.parent / "trace", length=100).num_tokens == 200


def test_stored_truncation_and_padding_are_not_applied(folder: Path, qwen: Path) -> None:
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
    change_json(folder / "tokenizer.json", **stored)
    trace = profile_folder(folder, folder.parent / "trace", length=20)
    plain = profile_folder(qwen, folder.parent / "plain", length=20)
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


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.write_text, (self.mark, "ran")


@pytest.fixture
def foreign(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder full of code, with somebody at the keyboard who would say yes."""
    mark = folder.parent / MARK
    code = f"from pathlib import Path\nPath({str(mark)!r}).write_text('ran')\n"
    (folder / "custom_generate").mkdir()
    for name in ("foreign.py", "modeling_foreign.py", "__init__.py", "custom_generate/generate.py"):
        (folder / name).write_text(code)
    for name in ("processor_config.json", "preprocessor_config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps({"auto_map": AUTO_MAP, "custom_generate": "."}))
    (folder / "chat_template.jinja").write_text("{{ ''.__class__ }}")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(mark)))
    change_json(folder / "config.json", auto_map=AUTO_MAP)
    change_json(folder / "tokenizer_config.json", auto_map=AUTO_MAP, tokenizer_class="ForeignTokenizer")

    def asked(*prompt: str) -> str:
        mark.write_text("asked")
        return "y"

    monkeypatch.setattr(builtins, "input", asked)
    return folder


def test_code_beside_the_weights_is_not_run(foreign: Path, qwen: Path) -> None:
    """The family is known: transformers' own class is used, and gives what it gives without the code."""
    trace = profile_folder(foreign, foreign.parent / "trace", length=20)
    assert not (foreign.parent / MARK).exists()
    plain = profile_folder(qwen, foreign.parent / "plain", length=20)
    assert trace.experts.tolist() == plain.experts.tolist()


def drop(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def model_type(name: Any) -> Change:
    return lambda folder: change_json(folder / "config.json", model_type=name)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def write(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(
        content.encode() if isinstance(content, str) else content
    )


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
def test_kernels_that_a_folder_names_are_not_fetched(folder: Path, part: str) -> None:
    change_json(folder / "config.json", **{part: "somebody/kernel"})
    assert profile_folder(folder, folder.parent / "trace", length=20).num_tokens == 200


# ---- what is wrong with a file is said of that file, in one line

REFUSED_BY_TRANSFORMERS: dict[str, list[Any]] = {
    "head_dim": [None, "8", -8],
    "tie_word_embeddings": [None, "yes", 1],
    "dtype": ["float99", "bf16", 5, "float8_e4m3fn"],
    "hidden_size": [None, "32", 32.0, -32, 10**30],
    "num_hidden_layers": [None, "2", 2.0],
    "num_local_experts": [None, "8"],
    "num_experts_per_tok": [None, "2", 9],
    "num_attention_heads": [None, 0],
    "hidden_act": [None, "swish9", 5],
    "rms_norm_eps": [None, "1e-6"],
    "vocab_size": [None, "257"],
    "max_position_embeddings": [None, "64"],
    "pad_token_id": ["0", 9999],
    "eos_token_id": ["end", {}],
    "use_cache": [None, "yes"],
    "norm_topk_prob": [None],
    "decoder_sparse_step": [0, None],
    "layer_types": [5, ["full_attention"], ["warp", "warp"]],
    "rope_scaling": [
        "yarn",
        [1],
        {"rope_type": "yarn"},
        {"type": "linear"},
        {"rope_type": "linear", "factor": None},
        {"rope_type": "nope", "factor": 2.0},
    ],
    "rope_parameters": [5, {"rope_type": "yarn", "rope_theta": 1e4}, {"rope_type": "nope"}],
    "quantization_config": [5],
    "auto_map": [None],
    "id2label": [5],
    "text_config": [5, {"hidden_size": 8}],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in REFUSED_BY_TRANSFORMERS.items() for value in values]
)
def test_values_of_config_json(
    folder: Path, key: str, value: Any, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    change_json(folder / "config.json", **{key: value})
    message = refusal(folder)
    assert message.startswith("model/config.json: ")
    assert message.endswith("; copy the file again, or mend it")
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("config.json"),
            "model: holds no config.json, so no Hugging Face model; give a folder that save_",
        ),
        (write("config.json", ""), "model/config.json: the model configuration is not valid JSON"),
        (write("config.json", "{"), "model/config.json: the model configuration is not valid JSON"),
        (write("config.json", "[" * 99999), "model/config.json: the model configuration is not valid JSON"),
        (write("config.json", b"\x80\xff"), "model/config.json: the model configuration is not valid JSON"),
        (write("config.json", "{}".encode("utf-16")), "model/config.json: the model configuration is not va"),
        (write("config.json", "[]"), "model/config.json: says no model_type"),
        (write("config.json", "null"), "model/config.json: says no model_type"),
        (model_type(None), "model/config.json: says no model_type"),
        (model_type(["mixtral"]), "model/config.json: says no model_type"),
        (model_type("llama"), "model: LlamaForCausalLM has no MoE layers that are known: looked for"),
        (drop("tokenizer.json"), "model: holds no tokenizer; copy the model's tokenizer files there"),
        (write("tokenizer.json", ""), "model/tokenizer.json: not a tokenizer"),
        (write("tokenizer.json", "[]"), "model/tokenizer.json: not a tokenizer"),
        (write("tokenizer.json", b"\x80\xff"), "model/tokenizer.json: not a tokenizer"),
        (write("tokenizer.json", '{"version": "9.0"}'), "model/tokenizer.json: not a tokenizer"),
        (
            both(drop("tokenizer.json"), write("vocab.json", "{}"), write("tokenizer_config.json", '{"a": ')),
            "model/tokenizer_config.json: the tokenizer's configuration is not valid JSON",
        ),
        (
            both(drop("tokenizer.json"), write("vocab.json", "{}"), write("tokenizer_config.json", "[]")),
            "model/tokenizer_config.json: is no tokenizer's configuration",
        ),
        (write(WEIGHTS, ""), f"model/{WEIGHTS}: the weights cannot be read, truncated?"),
        (write(WEIGHTS, "garbage" * 99), f"model/{WEIGHTS}: the weights cannot be read, truncated?"),
        (both(drop(WEIGHTS), write(INDEX, "{")), f"model/{INDEX}: "),
        (
            both(drop(WEIGHTS), write(INDEX, "[]")),
            f"model/{INDEX}: the key 'weight_map' does not name a file",
        ),
        (
            both(drop(WEIGHTS), write(INDEX, '{"weight_map": {"a": "../x.safetensors"}}')),
            f"model/{INDEX}: the key 'weight_map' does not name a file",
        ),
        (
            both(drop(WEIGHTS), write(INDEX, '{"weight_map": {"a": "gone.safetensors"}}')),
            "model/gone.safetensors: no such weights",
        ),
    ],
)
def test_files_that_are_missing_or_broken(
    folder: Path, change: Change, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    assert refusal(folder).startswith(message)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["model", "pre_tokenizer", "normalizer", "post_processor", "decoder"])
def test_a_tokenizer_json_newer_than_the_library(folder: Path, part: str) -> None:
    change_json(folder / "tokenizer.json", **{part: {"type": "Newer"}})
    assert refusal(folder).startswith("model/tokenizer.json: not a tokenizer (")


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordLevel", "vocab": {"zz": 0}, "unk_token": "[UNK]"},
        {"type": "Unigram", "vocab": [["zz", -1.0]], "unk_id": None},
    ],
)
def test_a_tokenizer_that_cannot_encode_the_text(folder: Path, model: dict[str, Any]) -> None:
    change_json(folder / "tokenizer.json", model=model)
    assert refusal(folder).startswith("model/tokenizer.json: the tokenizer cannot encode the text (")


@pytest.mark.parametrize("content", ["{", "[]", "", '{"temperature": "hot", "eos_token_id": "x"}', b"\xff"])
def test_what_is_not_needed_is_not_read(folder: Path, content: str | bytes) -> None:
    for name in ("generation_config.json", "special_tokens_map.json"):
        write(name, content)(folder)
    assert profile_folder(folder, folder.parent / "trace", length=20).num_tokens == 200


def change_weights(change: Callable[[str, Tensor], Tensor | None]) -> Change:
    def apply(folder: Path) -> None:
        changed = {name: change(name, value) for name, value in load_file(folder / WEIGHTS).items()}
        kept = {name: value for name, value in changed.items() if value is not None}
        save_file(kept, folder / WEIGHTS, {"format": "pt"})

    return apply


def without(part: str) -> Change:
    return change_weights(lambda name, value: None if part in name else value)


def shortened(part: str) -> Change:
    return change_weights(lambda name, value: value[:-1].contiguous() if part in name else value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("gate.weight"),
            "model: the weights 'model.layers.0.mlp.gate.weight' are missing (2 in all)",
        ),
        (without("embed_tokens"), "model: the weights 'model.embed_tokens.weight' are missing (1 in all)"),
        (without("lm_head"), "model: the weights 'lm_head.weight' are missing (1 in all)"),
        (without("experts.3."), "model: the weights 'model.layers.0.mlp.experts.down_proj' have shape [7, "),
        (
            shortened("q_norm"),
            "model: the weights 'model.layers.0.self_attn.q_norm.weight' have shape [7], conf",
        ),
        (
            shortened("embed"),
            "model: the weights 'model.embed_tokens.weight' have shape [256, 32], config.json ",
        ),
        (
            shortened("gate.weight"),
            "model: the weights 'model.layers.0.mlp.gate.weight' have shape [7, 32], c",
        ),
        (shortened("experts.3.up_proj"), "model: the weights cannot be loaded ("),
        (
            lambda folder: change_json(folder / "config.json", vocab_size=300),
            "model: the weights 'lm_head.weig",
        ),
        (
            lambda folder: change_json(folder / "config.json", num_hidden_layers=3),
            "model: the weights 'model.l",
        ),
    ],
)
def test_weights_that_do_not_fit(
    folder: Path, change: Change, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    assert refusal(folder).startswith(message)
    assert capfd.readouterr() == ("", "")


def test_weights_cut_short(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    assert refusal(folder).startswith(f"model/{WEIGHTS}: the weights cannot be read, truncated?")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert refusal(tmp_path / "nowhere").startswith("model: holds no config.json, so no Hugging Face model")

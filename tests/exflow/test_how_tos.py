"""Every `exflow` command of docs/how-to is run, page by page, in a folder with what the page begins with."""

import base64
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "how-to").glob("*.md"))
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def commands(page: Path) -> list[str]:
    """The lines of code that begin with exflow, those that go on after a backslash joined."""
    text = page.read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if re.match(r" {4,}exflow ", line)]


def routing(layers: int, experts: int, top_k: int, tokens: int = 60) -> np.ndarray:
    """[tokens, layers, top_k], different experts for a token."""
    draw = np.random.default_rng(0).random((tokens, layers, experts))
    return draw.argsort(axis=2)[:, :, :top_k].astype(np.int32)


def sglang(folder: Path) -> None:
    for_dense = np.zeros((240, 1, 6), np.int32)
    rows = np.concatenate([for_dense, routing(26, 64, 6, tokens=240)], axis=1)
    with (folder / "responses.jsonl").open("w") as file:
        for request in np.split(rows, 16):
            ids = base64.b64encode(request.tobytes()).decode()
            meta = {"prompt_tokens": 10, "completion_tokens": 6, "routed_experts": ids}
            file.write(json.dumps({"text": "", "meta_info": meta}) + "\n")


def tensorrt_llm(folder: Path) -> None:
    (folder / "stats").mkdir()
    (folder / "stats" / "meta_info.json").write_text('{"num_experts": 8, "num_experts_per_token": 2}')
    for rank, rows in enumerate(np.split(routing(3, 8, 2), 2)):
        tensors = {f"100_{layer}": np.ascontiguousarray(rows[:, layer]) for layer in range(3)}
        save_file(tensors, folder / "stats" / f"rank{rank}_raw.safetensors")


def vllm(folder: Path) -> None:
    import io

    with (folder / "responses.jsonl").open("w") as file:
        for request in np.split(routing(4, 8, 2).astype(np.uint8), 4):
            buffer = io.BytesIO()
            np.save(buffer, request)
            choice = {"index": 0, "text": "", "routed_experts": base64.b64encode(buffer.getvalue()).decode()}
            usage = {"prompt_tokens": 10, "completion_tokens": 6}
            file.write(json.dumps({"choices": [choice], "usage": usage}) + "\n")


def hugging_face(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
    )
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "model")
    words = {chr(97 + i): i for i in range(26)} | {"[UNK]": 26}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(folder / "model")
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)


def laptop(folder: Path) -> None:
    (folder / "models").symlink_to(ROOT / "models")
    (folder / "book.txt").write_text((ROOT / "README.md").read_text())
    np.savez(folder / "routing.npz", experts=routing(4, 16, 2), seq=np.arange(60) // 10)


BEGINNINGS: dict[str, Callable[[Path], None]] = {
    "sglang": sglang,
    "tensorrt-llm": tensorrt_llm,
    "vllm": vllm,
    "hugging-face": hugging_face,
    "laptop": laptop,
}


def test_every_page_has_a_beginning() -> None:
    assert {page.stem for page in PAGES} == set(BEGINNINGS)
    assert all(len(commands(page)) >= 4 for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_its_commands_work(page: Path, tmp_path: Path) -> None:
    BEGINNINGS[page.stem](tmp_path)
    for command in commands(page):
        line = [sys.executable, "-m", "exflow.cli", *shlex.split(command)[1:]]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, f"{command}\n{done.stderr}"

"""Commands of README and docs are run: block by block, in a folder with what the page begins with.

A block of `sh` or `python` that cannot be run here has the reason above it, `<!-- not run: REASON -->`.
"""

import base64
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from safetensors.numpy import save_file

from exflow import cli
from exflow.job import outcome
from exflow.placement.formats.exporters.registry import export_plan
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "profiling" / "golden"
ELSEWHERE = ("README.md", "CONTRIBUTING.md", "models/gpt-moe-demo/README.md", "configs/shapes/README.md")
PAGES = [*ELSEWHERE, *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md")))]
TYPED = re.compile(r"(exflow|python|make|torchrun) ")
EXCUSE = re.compile(r"\s*<!-- not run: (.+) -->")
FENCE = re.compile(r"( *)```(\w*)$")


@dataclass(frozen=True)
class Block:
    """Code of a page; `excuse` is why it is not run, if it is not."""

    page: str
    line: int
    language: str
    code: str
    excuse: str | None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> list[str]:
        """Lines to type: those that go on joined, without comments and what is piped on."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def blocks(page: str) -> Iterator[Block]:
    """Yield the blocks of `sh` and `python`, and indented lines that look like commands."""
    lines = (ROOT / page).read_text().splitlines()
    at = 0
    while at < len(lines):
        before = next((line for line in reversed(lines[:at]) if line.strip()), "")
        excuse = EXCUSE.match(before)
        why = excuse[1] if excuse else None
        if fence := FENCE.match(lines[at]):
            end = next(i for i in range(at + 1, len(lines)) if lines[i] == f"{fence[1]}```")
            if fence[2] in ("sh", "python"):
                code = "\n".join(line[len(fence[1]) :] for line in lines[at + 1 : end])
                yield Block(page, at + 1, fence[2], code, why)
            at = end
        elif lines[at].startswith("    ") and TYPED.match(lines[at].strip()):
            yield Block(page, at + 1, "sh", lines[at].strip(), why)
        at += 1


BLOCKS = [block for page in PAGES for block in blocks(page)]
NOT_RUN = [block for block in BLOCKS if block.excuse]
RUN = {
    block.page: [each for each in BLOCKS if each.page == block.page] for block in BLOCKS if not block.excuse
}


@pytest.mark.parametrize("block", NOT_RUN, ids=lambda block: block.where)
def test_not_run(block: Block) -> None:
    """The list of what is not run. Options of ours are known all the same."""
    for command in block.commands() if block.language == "sh" else []:
        if command.startswith("exflow "):
            parse(command)
    pytest.skip(f"{block.where} is not run: {block.excuse}")


def parse(command: str) -> None:
    """Fails on an unknown verb or option, and on a value of the wrong type."""
    typed = shlex.split(command, comments=True)[1:]
    verb: Any = typer.main.get_command(cli.app)
    while inner := getattr(verb, "commands", None):
        verb = inner[typed.pop(0)]
    with verb.make_context("exflow", typed):
        pass


# What pages begin with.


def routing(layers: int, experts: int, top_k: int, tokens: int = 60) -> np.ndarray:
    """[tokens, layers, top_k], different experts for a token."""
    draw = np.random.default_rng(0).random((tokens, layers, experts))
    return draw.argsort(axis=2)[:, :, :top_k].astype(np.int32)


def sglang(folder: Path) -> None:
    """DeepSeek-V2-Lite's shape, whose first layer is dense."""
    rows = np.concatenate([np.zeros((240, 1, 6), np.int32), routing(26, 64, 6, tokens=240)], axis=1)
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
    with (folder / "responses.jsonl").open("w") as file:
        for request in np.split(routing(4, 8, 2).astype(np.uint8), 4):
            buffer = io.BytesIO()
            np.save(buffer, request)
            choice = {"index": 0, "text": "", "routed_experts": base64.b64encode(buffer.getvalue()).decode()}
            usage = {"prompt_tokens": 10, "completion_tokens": 6}
            file.write(json.dumps({"choices": [choice], "usage": usage}) + "\n")


def every_engine(folder: Path) -> None:
    sglang(folder)
    tensorrt_llm(folder)
    for path in (*GOLDEN.glob("*.pt"), *GOLDEN.glob("router_trace_*.jsonl")):
        shutil.copy(path, folder)
    np.savez(folder / "routing.npz", experts=routing(4, 16, 2), seq=np.arange(60) // 10)


def hugging_face(folder: Path) -> None:
    """A small Mixtral at every place where a page has one, and another trace of it."""
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
    transformers.utils.logging.disable_progress_bar()
    transformers.MixtralForCausalLM(config).save_pretrained(folder / "model")
    words = {chr(97 + i): i for i in range(26)} | {"[UNK]": 26}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.save_pretrained(folder / "model")
    (folder / "path" / "to").mkdir(parents=True)
    for name in ("FOLDER", "path/to/model"):
        (folder / name).symlink_to(folder / "model")
    text = "the quick brown fox jumps over the lazy dog " * 40
    (folder / "book.txt").write_text(text)
    (folder / "notes").mkdir()
    (folder / "notes" / "monday.txt").write_text(text)
    other = RoutingTrace.from_arrays(routing(3, 8, 2), num_experts=8, model="mixtral")
    other.save(folder / "other-trace")


def placed(folder: Path) -> None:
    """The shipped model's trace with two plans for it, and another engine's placement."""
    trace = RoutingTrace.load(ROOT / "models/gpt-moe-demo/early-traces/step-002200")
    trace.save(folder / "trace")
    for name, gpus in (("plan", 4), ("other", 4), ("moe", 8)):
        plan = place(trace, Topology(gpus_per_node=gpus), solving=Solving("sweep"))
        plan.save(folder / f"{name}.json")
    export_plan(plan, "trtllm", folder / "moe.yaml")
    (folder / "moe.yaml.meta.json").unlink()


def repository(folder: Path) -> None:
    for name in ("models", "configs", "docs"):
        (folder / name).symlink_to(ROOT / name)


def several_traces(folder: Path) -> None:
    for name in ("trace", "code", "law", "new"):
        experts, sequence = routing(4, 16, 2, tokens=600), np.arange(600) // 50
        RoutingTrace.from_arrays(experts, num_experts=16, sequence=sequence).save(folder / name)


# run by `make test-all`: other pages and the tests of place, simulate and the demo run the same verbs
LONG = ("docs/tutorial.md", "docs/how-to/sglang.md", "docs/placement.md", "docs/simulate.md")
BEGINNINGS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "README.md": (repository, hugging_face, sglang),
    "docs/tutorial.md": (repository,),
    "docs/engines.md": (placed,),
    "docs/placement.md": (repository, several_traces),
    "docs/profiling.md": (hugging_face,),
    "docs/report.md": (placed,),
    "docs/trace-import.md": (every_engine,),
    "docs/how-to/hugging-face.md": (hugging_face,),
    "docs/how-to/sglang.md": (sglang,),
    "docs/how-to/tensorrt-llm.md": (tensorrt_llm,),
    "docs/how-to/vllm.md": (vllm,),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.all] if page in LONG else []) for page in RUN]
)
def test_what_is_to_be_typed_works(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for begin in BEGINNINGS.get(page, (repository, placed)):
        begin(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outcome, "answer_signals", lambda: None)  # pytest's own stay
    names: dict[str, Any] = {}
    for block in RUN[page]:
        if block.excuse:
            continue
        if block.language == "python":
            exec(compile(block.code, block.where, "exec"), names)
            continue
        for command in block.commands():
            run(command, block.where, monkeypatch)


@pytest.mark.parametrize("page", LONG)
def test_options_of_long_pages_are_known(page: str) -> None:
    for block in RUN[page]:
        for command in block.commands() if block.language == "sh" else []:
            if command.startswith("exflow "):
                parse(command)


def run(command: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command in this process, which has loaded torch; a job of ranks in a process of its own."""
    program, *words = shlex.split(command, comments=True)
    assert program == "exflow", f"{where}: cannot be run here; say why above it, <!-- not run: REASON -->"
    typed = [
        name for word in words for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    if "--nproc" in typed:
        line = [sys.executable, "-m", "exflow.cli", *typed]
        done = subprocess.run(line, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{where}: {command}\n{done.stderr}"
        return
    monkeypatch.setattr(sys, "argv", ["exflow", *typed])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code, f"{where}: {command}"


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_the_text_are_valid(page: str) -> None:
    """`exflow VERB ... --option` between other words: there is such a verb, with such an option."""
    top: Any = typer.main.get_command(cli.app)
    for command in re.findall(r"`(exflow [^`]+)`", (ROOT / page).read_text()):
        verb, words = top, command.split()[1:]
        while (
            (inner := getattr(verb, "commands", None)) and words and re.fullmatch(r"[a-z][a-z-]*", words[0])
        ):
            assert words[0] in inner, f"{page}: {command}"
            verb = inner[words.pop(0)]
        known = {name for each in verb.params for name in (*each.opts, *each.secondary_opts)} | {"--help"}
        options = {word.split("=")[0].rstrip(",.") for word in words if word.startswith("-")}
        assert options <= known, f"{page}: {command}"

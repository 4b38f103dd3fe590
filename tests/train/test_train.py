"""Training: it learns, is the same every time, and goes on after a stop as if there had been none."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from exflow.cli.training import TrainingLog
from exflow.errors import InputError, WrongResult
from exflow.model.checkpoint import load_decoder
from exflow.model.decoder import Decoder, Routing
from exflow.model.tokenizer import load_tokenizer
from exflow.train.config import OptimiserConfig, TrainConfig, load_train_config
from exflow.train.corpus import Corpus
from exflow.train.loop import (
    Progress,
    StepFigures,
    balance_loss,
    busiest_over_mean,
    held_out_bits_per_byte,
    sample_batch,
    train,
)
from exflow.train.optimizer import learning_rate

CPU = torch.device("cpu")
WORDS = ["the", "cat", "dog", "mat", "sat", "saw", "on", "a", "and", "ran"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 lines of random words: which words there are, and how long a line is, can be learnt."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("".join(" ".join(rng.choice(WORDS, 6)) + "\n" for _ in range(800)))
    return path


@pytest.fixture
def settings(text: Path) -> dict[str, Any]:
    """What the YAML file of a tiny run holds."""
    return {
        "model": {
            "vocab_size": 280,
            "max_positions": 32,
            "num_hidden_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "intermediate_size": 32,
            "num_experts": 4,
        },
        "data": {"texts": [str(text)], "held_out": 0.1},
        "training": {
            "steps": 8,
            "batch_size": 4,
            "sequence_length": 24,
            "learning_rate": 0.01,
            "warmup_steps": 2,
            "evaluate_tokens": 500,
        },
        "checkpoint_steps": [0, 4],
    }


class Log(list[Progress]):
    """Collects the reports, and can stop the run as a key press would."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        self.stop_at = stop_at

    def __call__(self, progress: Progress) -> None:
        self.append(progress)
        if progress.step == self.stop_at:
            raise KeyboardInterrupt


def run(
    settings: dict[str, Any],
    folder: Path,
    resume: bool = False,
    log: Log | None = None,
    device: torch.device = CPU,
) -> Log:
    log = Log() if log is None else log
    final = train(TrainConfig.model_validate(settings), folder, device, resume, log)
    assert final == folder / f"step-{settings['training']['steps']:06d}"
    return log


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_it_learns(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["training"] |= {"steps": 40, "batch_size": 8}
    log = run(settings, tmp_path)
    held_out = [progress.held_out_bits_per_byte for progress in log if progress.held_out_bits_per_byte]
    losses = [progress.figures.loss for progress in log if progress.figures]
    text = Path(settings["data"]["texts"][0]).read_text()
    tokens = len(load_tokenizer(tmp_path / "step-000000").encode(text).ids)
    assert held_out[0] == pytest.approx(math.log2(280) * tokens / len(text), rel=0.05)  # knows nothing yet
    assert held_out[-1] < 0.6 * held_out[0]
    assert losses[-1] < 0.6 * losses[0]


def test_the_final_checkpoint_is_a_whole_model(settings: dict[str, Any], tmp_path: Path) -> None:
    log = run(settings, tmp_path)
    folder = tmp_path / "step-000008"
    decoder, tokenizer = load_decoder(folder, CPU, torch.float32), load_tokenizer(folder)
    text = Path(settings["data"]["texts"][0]).read_text()
    held_out = text[text.rfind("\n", 0, int(len(text) * 0.9)) + 1 :]
    stream = np.array([*tokenizer.encode(held_out).ids, tokenizer.token_to_id("<|endoftext|>")], np.uint16)
    corpus = Corpus(train=stream, held_out=stream, held_out_bytes=len(held_out))
    config = TrainConfig.model_validate(settings).training
    reported = log[-1].held_out_bits_per_byte
    assert held_out_bits_per_byte(decoder, corpus, config) == pytest.approx(reported, rel=0.01)  # bf16


def test_two_runs_are_identical_and_another_seed_differs(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, tmp_path / "a")
    run(settings, tmp_path / "b")
    settings["training"]["seed"] = 1
    run(settings, tmp_path / "c")
    a, b, c = (files_of(tmp_path / name) for name in "abc")
    assert a == b
    changed = {name for name in a if a[name] != c[name]}
    assert {"step-000000/model.safetensors", "step-000008/model.safetensors"} <= changed


def test_checkpoints_at_the_chosen_steps_and_the_last(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "state",
        "step-000000",
        "step-000004",
        "step-000008",
    ]
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "latest.json",
        "optimiser-000008.safetensors",
    ]


def test_reports_say_what_was_measured_and_nothing_else(settings: dict[str, Any], tmp_path: Path) -> None:
    log = run(settings, tmp_path)
    held_out = [progress.step for progress in log if progress.held_out_bits_per_byte is not None]
    figures = [progress.step for progress in log if progress.figures is not None]
    assert held_out == [0, 4, 8]
    assert figures == [1, 2, 3, 4, 5, 6, 7, 8]
    for progress in log:
        assert (progress.figures is None) != (progress.held_out_bits_per_byte is None)
        if progress.figures is not None:
            assert 1 <= progress.figures.balance <= 4
            assert 0 < progress.figures.loss < 10 and progress.figures.tokens_per_s > 0


@pytest.mark.parametrize("stop_at", [4, 7])
def test_an_interrupted_run_goes_on_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, stop_at: int
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    run(settings, unbroken)
    with pytest.raises(KeyboardInterrupt):
        run(settings, broken, log=Log(stop_at))
    resumed_at = 0 if stop_at == 4 else 4  # step 4's figures come before its checkpoint
    assert (broken / "state" / f"optimiser-00000{resumed_at}.safetensors").is_file()
    log = run(settings, broken, resume=True)
    assert [progress.step for progress in log if progress.figures] == list(range(resumed_at + 1, 9))
    assert files_of(broken) == files_of(unbroken)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_it_learns_and_resumes_on_a_gpu(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["training"] |= {"steps": 40, "batch_size": 8}
    cuda = torch.device("cuda")
    unbroken = run(settings, tmp_path / "unbroken", device=cuda)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "broken", log=Log(stop_at=20), device=cuda)
    resumed = run(settings, tmp_path / "broken", resume=True, device=cuda)
    first, last = unbroken[0].held_out_bits_per_byte, unbroken[-1].held_out_bits_per_byte
    assert first is not None and last is not None and last < 0.6 * first
    assert resumed[-1].held_out_bits_per_byte == pytest.approx(last, rel=0.05)  # sums in another order


def test_a_finished_run_has_nothing_left_to_do(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, tmp_path)
    before = files_of(tmp_path)
    log = run(settings, tmp_path, resume=True)
    assert [progress.step for progress in log] == [8]
    assert files_of(tmp_path) == before


REMEDY = "leave out --resume to start from the beginning"


def test_resuming_what_never_began(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        run(settings, tmp_path, resume=True)
    latest = tmp_path / "state" / "latest.json"
    assert str(error.value) == f"{latest}: no such run to resume; {REMEDY}"


def test_resuming_with_other_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    run(settings, tmp_path)
    settings["checkpoint_steps"] = [2]  # may change
    run(settings, tmp_path, resume=True)
    settings["training"]["learning_rate"] = 0.02
    with pytest.raises(InputError) as error:
        run(settings, tmp_path, resume=True)
    assert str(error.value) == (
        f"{tmp_path}/state/latest.json: the run began with training.learning_rate = 0.01, now it is 0.02; "
        f"set it back, or {REMEDY}"
    )


@pytest.mark.parametrize("damage", ["latest.json", "truncated", "missing"])
def test_resuming_from_a_damaged_state(settings: dict[str, Any], tmp_path: Path, damage: str) -> None:
    run(settings, tmp_path)
    state = tmp_path / "state" / "optimiser-000008.safetensors"
    if damage == "latest.json":
        (tmp_path / "state" / "latest.json").write_text('{"step": 8}')
    elif damage == "truncated":
        state.write_bytes(state.read_bytes()[:-10])
    else:
        state.unlink()
    with pytest.raises(InputError) as error:
        run(settings, tmp_path, resume=True)
    assert str(error.value).startswith(f"{tmp_path}/state/latest.json: the state cannot be read (")
    assert str(error.value).endswith(f"; {REMEDY}") and "\n" not in str(error.value)


def test_a_run_that_diverges_ends_and_saves_nothing_of_it(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["training"]["learning_rate"] = 1e30
    with pytest.raises(WrongResult, match=r"^step [23]: the loss is (nan|inf); lower learning_rate"):
        run(settings, tmp_path / "run")
    assert [path.name for path in sorted((tmp_path / "run").glob("step-*"))] == ["step-000000"]


def test_too_little_text(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("ab\n" * 20)
    settings["data"]["texts"] = [str(path)]
    with pytest.raises(InputError) as error:
        run(settings, tmp_path / "run")
    assert str(error.value) == (
        f"{path}: 37 training and 5 held-out tokens, both must be more than sequence_length 24; "
        "give more text"
    )


def routing(experts: list[list[int]], probability: list[list[float]]) -> Routing:
    return Routing(
        torch.tensor(experts), torch.ones(len(experts), len(experts[0])), torch.tensor(probability)
    )


def test_balance_of_even_and_of_collapsed_routing() -> None:
    even = routing([[0], [1], [2], [3]], [[0.25] * 4] * 4)
    collapsed = routing([[2]] * 4, [[0.0, 0.0, 1.0, 0.0]] * 4)
    half = routing([[0, 1], [0, 1]], [[0.5, 0.5, 0.0, 0.0]] * 2)
    assert [balance_loss(each).item() for each in (even, collapsed, half)] == [1, 4, 2]
    assert busiest_over_mean([even]).item() == 1
    assert busiest_over_mean([even, collapsed, half]).item() == 4


def test_the_balance_loss_pulls_the_gate_towards_idle_experts() -> None:
    logits_TE = torch.zeros(4, 4, requires_grad=True)
    probability_TE = logits_TE.softmax(dim=-1)
    loss = balance_loss(Routing(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), probability_TE))
    (gradient_TE,) = torch.autograd.grad(loss, logits_TE)
    assert (gradient_TE[:, 0] > 0).all() and (gradient_TE[:, 1:] < 0).all()


def test_the_balance_loss_keeps_all_experts_at_work(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["training"] |= {"steps": 40, "batch_size": 8, "learning_rate": 0.001}
    busiest = {}
    for weight in (0.0, 0.1):
        settings["training"]["balance_weight"] = weight
        log = run(settings, tmp_path / str(weight))
        busiest[weight] = log[-2].figures
    assert busiest[0.0].balance == 4  # all tokens of a layer go to one expert of the four
    assert busiest[0.1].balance < 2.5


def optimizer(**changes: Any) -> OptimiserConfig:
    base = {"steps": 100, "batch_size": 3, "sequence_length": 4, "learning_rate": 1.0, "warmup_steps": 10}
    return OptimiserConfig.model_validate(base | changes)


def test_learning_rate() -> None:
    rates = [learning_rate(optimizer(), step) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(optimizer(warmup_steps=0), 0) == 1.0


def test_batches_are_windows_of_the_stream_drawn_from_seed_and_step() -> None:
    stream = np.arange(50, dtype=np.uint16)
    batches = [sample_batch(stream, optimizer(), step) for step in range(200)]
    for batch_BS in batches:
        assert batch_BS.shape == (3, 5)
        assert (batch_BS.diff(dim=1) == 1).all()
    assert torch.stack(batches).unique().tolist() == list(range(50))  # to the first and the last token
    assert torch.equal(batches[7], sample_batch(stream, optimizer(), 7))
    assert not torch.equal(batches[7], batches[8])
    assert not torch.equal(batches[7], sample_batch(stream, optimizer(seed=1), 7))


def test_bits_per_byte_of_a_model_that_knows_nothing(tiny_decoder: Callable[..., Decoder]) -> None:
    decoder = tiny_decoder()
    decoder.embedding.weight.zero_()  # all scores equal: log2(257) bits a token
    corpus = Corpus(np.zeros(0, np.uint16), np.arange(200, dtype=np.uint16), held_out_bytes=400)
    for evaluate_tokens in (1, 60, 10_000):
        config = optimizer(sequence_length=20, evaluate_tokens=evaluate_tokens)
        found = held_out_bits_per_byte(decoder, corpus, config)
        assert found == pytest.approx(math.log2(257) * 200 / 400)


def test_the_configuration_of_the_demo_is_read() -> None:
    config = load_train_config(Path(__file__).parents[2] / "configs" / "gpt-moe-demo.yaml")
    assert config.model.name == "gpt-moe-demo"
    assert config.training.steps == max(config.checkpoint_steps)


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "training",
            {"lr": 0.1},
            "unknown key 'training.lr'; remove it (known: steps, batch_size, sequence_length, learning_rate, "
            "warmup_steps, weight_decay, balance_weight, gradient_clip, seed, evaluate_tokens)",
        ),
        (
            None,
            {"texts": []},
            "unknown key 'texts'; remove it (known: model, data, training, checkpoint_steps)",
        ),
        ("training", {"steps": 0}, "training.steps = 0: Input should be greater than 0"),
        ("data", {"held_out": 0.9}, "data.held_out = 0.9: Input should be less than 0.5"),
        ("model", {"top_k": 5}, "model: top_k 5 is more than num_experts 4"),
        ("model", {"vocab_size": 256}, "model.vocab_size 256 is not from 257 to 65536"),
        ("model", {"vocab_size": 65537}, "model.vocab_size 65537 is not from 257 to 65536"),
        (
            "training",
            {"sequence_length": 33},
            "training.sequence_length 33 is more than model.max_positions 32",
        ),
        (None, {"checkpoint_steps": [0, 9]}, "checkpoint_steps names step 9, but training.steps is 8"),
    ],
)
def test_a_wrong_setting_is_named(
    settings: dict[str, Any], tmp_path: Path, part: str | None, changes: dict[str, Any], message: str
) -> None:
    (settings[part] if part else settings).update(changes)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    with pytest.raises(InputError) as error:
        load_train_config(path)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    "content",
    [
        *(b"model: {a: [1}", b"model:\n\t- 1", b"\xff\xfe", b"a: \x00", b"a: 2001-13-45", b"[" * 20_000),
        *(b"a: &a {b: 1}\nc: *a", b"a: &a 1", b"!!python/object:os.system {}", b"a: " + b"9" * 5000),
    ],
)
def test_a_file_that_is_not_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        load_train_config(path)
    assert str(error.value).startswith(f"{path}: the configuration is not YAML (")
    assert str(error.value).endswith("); see configs/") and "\n" not in str(error.value)


def test_an_empty_and_a_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(InputError) as error:
        load_train_config(path)
    assert str(error.value) == (
        f"{path}: the configuration cannot be read (No such file or directory); see configs/"
    )
    path.touch()
    with pytest.raises(InputError) as error:
        load_train_config(path)
    assert str(error.value) == (
        f"{path}: holds None, not the keys model, data, training, checkpoint_steps; write them"
    )


REPORTS = [
    Progress(0, held_out_bits_per_byte=5.1234),
    Progress(50, StepFigures(loss=3.25, balance=1.5, tokens_per_s=12345.6)),
    Progress(50, held_out_bits_per_byte=2.5),
]


def test_checkpoints_are_noted_and_figures_are_beside_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingLog(steps=100) as log:
        for progress in REPORTS:
            log.report(progress)
        assert (log.task.completed, log.task.total) == (50, 100)
        assert log.task.fields["detail"] == "loss 3.250, busiest expert 1.50x, 12,346 tokens/s"
        assert log.held_out_bits_per_byte == 2.5
    assert capsys.readouterr().err.splitlines() == [
        "exflow: step 0: held-out text takes 5.123 bits per byte",
        "exflow: step 50: held-out text takes 2.500 bits per byte",
    ]

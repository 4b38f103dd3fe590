"""Training: it learns, is the same every time, and goes on after a stop as if there had been none."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exflow.errors import InputError, WrongResult
from exflow.model.checkpoint import Checkpoint
from exflow.train.config import TrainConfig
from exflow.train.corpus import Corpus
from exflow.train.loop import (
    Progress,
    held_out_bits_per_byte,
    train,
)

CPU = torch.device("cpu")


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
    tokens = len(Checkpoint.open(tmp_path / "step-000000").tokenizer().encode(text).ids)
    assert held_out[0] == pytest.approx(math.log2(280) * tokens / len(text), rel=0.05)  # knows nothing yet
    assert held_out[-1] < 0.6 * held_out[0]
    assert losses[-1] < 0.6 * losses[0]


def test_the_final_checkpoint_is_a_whole_model(settings: dict[str, Any], tmp_path: Path) -> None:
    log = run(settings, tmp_path)
    folder = tmp_path / "step-000008"
    decoder, tokenizer = (
        Checkpoint.open(folder).decoder(CPU, torch.float32),
        Checkpoint.open(folder).tokenizer(),
    )
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


def test_the_balance_loss_keeps_all_experts_at_work(settings: dict[str, Any], tmp_path: Path) -> None:
    settings["training"] |= {"steps": 40, "batch_size": 8, "learning_rate": 0.001}
    busiest = {}
    for weight in (0.0, 0.1):
        settings["training"]["balance_weight"] = weight
        log = run(settings, tmp_path / str(weight))
        busiest[weight] = log[-2].figures
    assert busiest[0.0].balance == 4  # all tokens of a layer go to one expert of the four
    assert busiest[0.1].balance < 2.5

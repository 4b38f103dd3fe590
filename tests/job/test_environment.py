"""Role of a process by its environment: alone, a rank, one of many, or bad input."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exflow.errors import InputError
from exflow.job import environment, launch
from exflow.job.environment import Place, crowd_in, place_in

EXFLOW = Path(sys.executable).with_name("exflow")
JOB = {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
NODE = {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
TORCHRUN = JOB | NODE | {"TORCHELASTIC_RUN_ID": "x"}
HERE = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        ({"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}, None),  # as job scripts export them
        ({"LOCAL_RANK": "3"}, None),
        ({"RANK": "", "WORLD_SIZE": ""}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "1"}, None),
        (TORCHRUN, Place(5, 8, 1, 4)),
        (JOB | NODE, Place(5, 8, 1, 4)),  # by hand
        (HERE, Place(1, 2, 1, 2)),
        (HERE | {"MASTER_ADDR": "localhost"}, Place(1, 2, 1, 2)),
        (HERE | {"MASTER_ADDR": "::1", "LOCAL_RANK": "1"}, Place(1, 2, 1, 2)),
        (
            TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
            Place(0, 1, 0, 1),
        ),
    ],
)
def test_a_place(variables: dict[str, str], place: Place | None) -> None:
    assert place_in(variables) == place


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"TORCHELASTIC_RUN_ID": "x"}, "TORCHELASTIC_RUN_ID=x without RANK, WORLD_SIZE, MASTER_ADDR, "),
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE, MASTER_ADDR, MASTER_PORT, LOCAL_RANK, "),
        ({"RANK": "1"}, "RANK=1 without WORLD_SIZE, "),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, "),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0 without MASTER_ADDR, MASTER_PORT, LOCAL_RANK, "),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "RANK=1 without MASTER_ADDR, "),
        (JOB, "RANK=5 without LOCAL_RANK, LOCAL_WORLD_SIZE; "),
        *((TORCHRUN | {name: ""}, f" without {name}; ") for name in JOB | NODE),
        *(
            (TORCHRUN | {name: value}, f"{name}={value}: is no whole number; ")
            for name in (JOB | NODE)
            if name != "MASTER_ADDR"
            for value in ("two", "-1", "1.0", " 1", "1_0", "\N{ARABIC-INDIC DIGIT ONE}")
        ),
        (TORCHRUN | {"RANK": "8"}, "RANK=8: WORLD_SIZE=8; count from 0; "),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK=4: LOCAL_WORLD_SIZE=4; count from 0; "),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "3 of 8 ranks are on this node; "),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, "16 of 8 ranks are on this node; "),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_WORLD_SIZE=4; the ranks of a node must be "),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT=0: is no port; "),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT=65536: is no port; "),
    ],
)  # fmt: skip
def test_a_job_told_by_halves(variables: dict[str, str], said: str) -> None:
    with pytest.raises(InputError) as refused:
        place_in(variables)
    message = str(refused.value)
    assert said in message
    assert "\n" not in message
    assert ";" in message  # a remedy


@pytest.mark.parametrize(
    ("variables", "starter"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, "srun"),
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "mpirun"),
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "mpiexec"),
        ({"MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_SIZE": "4"}, "mpirun (MVAPICH)"),
    ],
)
def test_a_crowd_is_told_once(variables: dict[str, str], starter: str) -> None:
    said = crowd_in(variables)
    assert said is not None
    assert said.startswith(f"{starter} started 4 processes, and each does the whole job by itself; ")
    assert "--nproc 4" in said
    assert "torchrun" in said
    rank, *_ = variables
    assert crowd_in(variables | {rank: "1"}) is None


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script, or a shell of salloc
        {"SLURM_NTASKS": "4"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks 1
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "many"},
    ],
)
def test_one_alone_is_left_in_peace(variables: dict[str, str]) -> None:
    assert crowd_in(variables) is None


def cleared(**variables: str) -> dict[str, str]:
    names = {
        *JOB,
        *NODE,
        "TORCHELASTIC_RUN_ID",
        *(each for two in environment._STARTERS.values() for each in two),
    }
    return {name: value for name, value in os.environ.items() if name not in names} | variables


def test_what_a_rank_is_told_in_a_crowd(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """srun starts ranks whose variables a script sets: a job, and no crowd."""
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    launch.check_start()
    assert [record.message.split(",")[0] for record in caplog.records] == ["srun started 2 processes"]
    caplog.clear()
    for name, value in (HERE | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    launch.check_start()
    assert not caplog.records


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables",
    [HERE | {"RANK": "2"}, pytest.param({"TORCHELASTIC_RUN_ID": "x"}, marks=pytest.mark.all)],
)
def test_only_what_can_be_a_job_refuses(variables: dict[str, str], tmp_path: Path) -> None:
    """The refusal comes before any file is read."""
    lines = {
        ("generate", "model", "--prompt", "Rain", "--nproc", "2"): 2,
        ("bench", "decode", "model"): 2,
        ("export", "--help"): 0,
    }
    for line, code in lines.items():
        done = subprocess.run(
            [EXFLOW, *line],
            env=cleared(**variables),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == code, (line, done.stderr)
        if code:
            assert done.stderr.startswith("exflow: ")
            assert done.stderr.count("\n") == 1
            assert next(iter(variables)) in done.stderr


@pytest.mark.parametrize("by_hand", [True, False])
def test_only_an_agent_ends_its_ranks(monkeypatch: pytest.MonkeyPatch, by_hand: bool) -> None:
    """A rank that a shell started goes on when that ends, and until it joins tells of signals."""
    from exflow.job import signals

    for name, value in (HERE | ({} if by_hand else {"TORCHELASTIC_RUN_ID": "x"})).items():
        monkeypatch.setenv(name, value)
    told: list[bool] = []
    monkeypatch.setattr(signals, "_end_with_parent", lambda: told.append(True))
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = {number: signal.getsignal(number) for number in signals.ANSWERED}
    try:
        signals.answer_signals()
        assert bool(told) is not by_hand
        assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) is not by_hand
    finally:
        signals.leave_signals()
        for number, handler in before.items():
            signal.signal(number, handler)

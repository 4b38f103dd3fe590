"""`exflow generate` as a job: started with --nproc, and what a rank says when the input is at fault."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from exflow import cli
from exflow.cli import run_job
from exflow.errors import InputError, WrongResult
from exflow.job import outcome
from exflow.job.environment import Place
from exflow.job.launch import LostContact
from exflow.model.checkpoint import Checkpoint
from exflow.model.config_file import load_model_config
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.deploy import default_plan, load_model
from exflow.runtime.request import Request


@pytest.mark.slow
@pytest.mark.distributed
def test_a_plan_for_two_nodes_runs_on_one(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The ranks are as many, so it is allowed, and said on stderr; stdout holds the JSON alone."""
    model, plan = tiny_checkpoint(), tmp_path / "plan.json"
    default_plan(load_model_config(model), Topology(num_nodes=2, gpus_per_node=1)).save(plan)
    generate = [sys.executable, "-m", "exflow.cli", "generate", str(model), "--json", "--ignore-end"]
    generate += ["--prompt", "Rain", "--prompt", "Wind and", "--max-new-tokens", "6", "--nproc", "2"]
    generate += ["--strategy", "coherent"]
    done = subprocess.run(
        [*generate, "--plan", str(plan), "--trace", str(tmp_path / "trace"), "--verify"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    note = "the plan is for 2 ranks (2 nodes of 1), these are 2 ranks (1 node of 2)"
    assert done.stderr == f"exflow: {plan}: {note}\n"
    result = json.loads(done.stdout)
    prompts = [
        encoding.ids for encoding in Checkpoint.open(model).tokenizer().encode_batch(["Rain", "Wind and"])
    ]
    assert result["tokens"] == load_model(model).generate(Request(prompts, 6)).tokens
    assert (result["strategy"], result["dtype"], result["ranks"]) == ("coherent", "float32", 2)
    assert result["verified"]["choices"] == 2 * 6
    assert result["verified"]["largest_difference"] < result["verified"]["tolerance"] == 1e-4
    assert result["decode"]["dispatch_intra"] > 0 == result["decode"]["dispatch_inter"]
    assert RoutingTrace.load(tmp_path / "trace").num_tokens == sum(len(ids) for ids in prompts) + 2 * 5


def end_of(monkeypatch: pytest.MonkeyPatch, error: BaseException, place: Place | None) -> int:
    """The exit code of the command if a verb raises `error`."""

    def verb() -> None:
        raise error

    monkeypatch.setattr(outcome, "answer_signals", lambda: None)  # pytest's own stay
    monkeypatch.setattr(outcome, "torchrun_place", lambda: place)
    monkeypatch.setattr(cli, "app", verb)
    monkeypatch.setattr(os, "_exit", sys.exit)  # which would end pytest
    with pytest.raises(SystemExit) as stop:
        cli.main()
    code = stop.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (None, "exflow: too long\n"),
        (Place(rank=0, num_ranks=4, local_rank=0, ranks_per_node=2), "exflow: too long\n"),
        (Place(rank=1, num_ranks=4, local_rank=1, ranks_per_node=2), ""),
        (Place(rank=2, num_ranks=4, local_rank=0, ranks_per_node=2), "exflow: too long\n"),
    ],
    ids=["no job", "first rank", "second rank", "first rank of the second node"],
)
def test_bad_input_is_told_once_a_node(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: Place | None, said: str
) -> None:
    assert end_of(monkeypatch, InputError("too long"), place) == 2
    assert capsys.readouterr().err == said


def test_that_contact_was_lost_is_told_once_a_node(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Place(rank=0, num_ranks=2, local_rank=0, ranks_per_node=2)
    assert end_of(monkeypatch, LostContact("no word from rank 1", told=True), place) == 3
    assert capsys.readouterr().err == ""
    assert end_of(monkeypatch, LostContact("no word from rank 1"), place) == 3
    assert capsys.readouterr().err == "exflow: no word from rank 1\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "out of memory; "),
        (RuntimeError("can't allocate memory: you tried to allocate 99 bytes."), "out of memory (99 bytes "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB."), "memory (2.50 GiB more "),
    ],
)
def test_a_want_of_memory_is_told_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, said: str
) -> None:
    for place, who in ((None, "exflow: "), (Place(3, 4, local_rank=3, ranks_per_node=4), "exflow: rank 3: ")):
        assert end_of(monkeypatch, error, place) == 1
        err = capsys.readouterr().err
        assert err.startswith(who)
        assert said in err
        assert err.count("\n") == 1


def test_a_wrong_result_is_told_by_the_rank_that_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end_of(monkeypatch, WrongResult("sequence 1"), Place(1, 4, local_rank=1, ranks_per_node=4)) == 1
    assert capsys.readouterr().err == "exflow: sequence 1\n"


def test_nproc_must_not_contradict_torchrun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outcome, "answer_signals", lambda: None)
    monkeypatch.setattr(
        run_job, "torchrun_place", lambda: Place(0, num_ranks=4, local_rank=0, ranks_per_node=4)
    )
    monkeypatch.setattr(sys, "argv", ["exflow", "generate", "model", "--prompt", "Rain", "--nproc", "2"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    told = "exflow: --nproc 2: the job has 4 ranks (WORLD_SIZE); leave --nproc out\n"
    assert capsys.readouterr().err == told

"""`exflow bench decode`: what it times, counts and writes, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from exflow.bench import decode as bench_decode
from exflow.bench import job as bench_setting
from exflow.bench.decode import fill_with_noise
from exflow.bench.job import WARM_UP
from exflow.bench.table import Case, Outcome, Report
from exflow.cli.run_tables import print_decode_bench
from exflow.errors import InputError
from exflow.job.signals import Stopped
from exflow.model.config import ModelConfig
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.evaluate import evaluate
from exflow.runtime.deploy import default_plan
from tests.bench.replayed import COUNTED, shuffled_plan, trace_of

STRATEGIES = ["dispatch-combine", "coherent", "replicated"]


@pytest.fixture
def run(
    inputs: Path, monkeypatch: pytest.MonkeyPatch, command_line: Callable[[str], tuple[int, str, str]]
) -> Callable[[str], tuple[str, str]]:
    """run("shape --steps 2 ...") in one process; what it printed on stdout and stderr."""
    monkeypatch.chdir(inputs)

    def command(line: str) -> tuple[str, str]:
        code, out, err = command_line(f"bench decode {line}")
        assert not code, err
        return out, err

    return command


@pytest.fixture(scope="module")
def job(inputs: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Two ranks, two batches, two placements: the JSON on stdout, the one in the file, and stderr."""
    command = [sys.executable, "-m", "exflow.cli", "bench", "decode", "model", "--plan", "plan.json"]
    command += ["--nproc", "2", "--replay", "trace", "--batch", "4", "--batch", "3", "--context", "8"]
    command += ["--device", "cpu", "--steps", str(COUNTED - 3), "-o", "result.json", "--json"]
    done = subprocess.run(command, cwd=inputs, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), json.loads((inputs / "result.json").read_text()), done.stderr


@pytest.mark.slow
@pytest.mark.distributed
class TestJob:
    def test_a_row_for_every_variant(self, job: tuple[dict[str, Any], dict[str, Any], str]) -> None:
        result, written, errors = job
        assert written == result
        assert errors == ""
        assert (result["ranks"], result["context"], result["steps"]) == (2, 8, 5)
        assert [(row["batch"], row["strategy"], row["placement"]) for row in result["rows"]] == [
            (batch, strategy, placement)
            for batch in (4, 3)
            for strategy in STRATEGIES
            for placement in ("contiguous", "plan")
        ]
        for row in result["rows"]:
            assert row["transport"] == "eager" and row["stopped"] is None
            assert 0 < row["tpot_ms"] <= row["p99_ms"]
            assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["tpot_ms"])
            first = next(each for each in result["rows"] if each["batch"] == row["batch"])
            assert row["speedup"] == pytest.approx(first["tpot_ms"] / row["tpot_ms"])
            assert row["predicted_ms"] > 0
            assert row["times_floor"] is None  # not measured on CPUs

    def test_the_bytes_are_those_of_the_replayed_routing(
        self, job: tuple[dict[str, Any], dict[str, Any], str], config: ModelConfig
    ) -> None:
        trace = trace_of(config)
        contiguous = default_plan(config, Topology(gpus_per_node=2))
        plans = {"contiguous": contiguous, "plan": shuffled_plan(config)}
        for row in job[0]["rows"]:
            figures = evaluate(plans[row["placement"]], trace.select(trace.sequence < row["batch"]))
            totals = figures["strategies"][row["strategy"].replace("-", "_")]["totals"]
            each = 2 * COUNTED  # ranks and steps
            background = totals["kv_intra"] * config.kv_width * 4 / each
            assert row["background_bytes_per_step"] == pytest.approx(background)
            critical = totals["messages"] * config.hidden_size * 4 / each
            if row["strategy"] == "replicated":  # a ring of two: one copy of each token a layer
                critical = 4 * row["batch"] * config.hidden_size * 4
            assert row["critical_bytes_per_step"] == pytest.approx(critical)
            assert row["wire_bytes_per_step"] >= critical + background

    def test_what_auto_would_take(self, job: tuple[dict[str, Any], dict[str, Any], str]) -> None:
        result = job[0]
        assert [choice["batch"] for choice in result["auto"]] == [4, 3]
        for choice in result["auto"]:
            rows = [row for row in result["rows"] if row["batch"] == choice["batch"]]
            best = min(rows, key=lambda row: row["predicted_ms"])
            assert choice["predicted_ms"] == pytest.approx(best["predicted_ms"])
            assert choice["strategy"] == best["strategy"]
            assert choice["tpot_ms"] == best["tpot_ms"]

    def test_the_table(
        self, job: tuple[dict[str, Any], dict[str, Any], str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        print_decode_bench(job[0], as_json=False)
        lines = capsys.readouterr().out.splitlines()
        assert "tiny in float32" in lines[0] and "2 rank(s)" in lines[0]
        assert lines[1].split()[:4] == ["strategy", "transport", "placement", "batch"]
        assert [line.split()[0] for line in lines[2:14]] == [each for each in STRATEGIES * 2 for _ in "12"]
        assert not any("…" in line for line in lines)
        assert [line.startswith("auto: ") for line in lines[-3:]] == [False, True, True]
        assert all("ms predicted" in line and "ms measured" in line for line in lines[-2:])


def test_a_shape_alone_in_one_process(run: Callable[[str], tuple[str, str]]) -> None:
    out, err = run("shape --steps 2 --batch 2 --device cpu")
    row = out.splitlines()[2].split()
    assert row[:4] == ["single-process", "eager", "contiguous", "2"]
    assert out.splitlines()[0].startswith("tiny in float32 (random weights) on 1 rank(s)")
    assert err == (
        "exflow: shape: holds no weights; they are drawn at random\n"
        "exflow: --context is 58: the model has 64 positions\n"
    )


def test_what_does_not_fit_is_said_and_the_rest_goes_on(
    run: Callable[[str], tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_decode, "free_bytes", lambda cluster: 1e6)
    line = "model --steps 1 --context 8 --batch 2000 --batch 2 --device cpu"
    out, _ = run(line)
    large, small = (line.split() for line in out.splitlines()[2:4])
    assert large[3:] == ["2000", *"------"] and small[3] == "2" and "-" not in small
    told = "single-process, eager, contiguous, batch 2000: does not fit: 0.0"
    assert told in out and "0.001 GB of memory a rank" in out
    rows = json.loads(run(f"{line} --json")[0])["rows"]
    assert [row["stopped"] is None for row in rows] == [False, True]
    assert [row["speedup"] for row in rows] == [None, 1.0]


def test_a_stop_keeps_what_is_done(
    inputs: Path, run: Callable[[str], tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = bench_decode.eager_result

    def stopped_at_the_second(bench: Any, decoder: Any, case: Case) -> bench_decode.Result:
        if case.batch == 3:
            raise Stopped(2)
        return timed(bench, decoder, case)

    monkeypatch.setattr(bench_decode, "eager_result", stopped_at_the_second)
    with pytest.raises(AssertionError, match="interrupted"):
        run("model --steps 1 --context 8 --batch 2 --batch 3 --device cpu -o kept.json")
    assert [row["batch"] for row in json.loads((inputs / "kept.json").read_text())["rows"]] == [2]


def test_captured_steps_are_counted_and_timed_too(
    run: Callable[[str], tuple[str, str]], inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run in Triton's interpreter, with a clock that needs no GPU."""
    decode_bench = pytest.importorskip("exflow.bench.timing")
    if torch.cuda.is_available():
        pytest.skip("kernels are not interpreted here")
    assert decode_bench.WARM_UP == WARM_UP
    seen = []

    def clock(captured: Any, steps: int) -> Any:
        captured.advance()
        seen.append(
            (captured.step.state.position.tolist(), captured.shape.sequences, captured.cache[:, :, :, :, 7])
        )
        return decode_bench.StepTimes(2000.0, 3000.0)

    monkeypatch.setattr(decode_bench, "time_steps", clock)
    monkeypatch.setattr(bench_decode, "working_transports", lambda setting, cluster: ["one-sided"])
    one_layer = inputs / "one-layer"
    one_layer.mkdir()
    shape = json.loads((inputs / "shape" / "config.json").read_text()) | {"num_hidden_layers": 1}
    (one_layer / "config.json").write_text(json.dumps(shape))
    (row,) = json.loads(run("one-layer --steps 1 --context 8 --batch 2 --device cpu --json")[0])["rows"]
    assert (row["transport"], row["tpot_ms"], row["p99_ms"]) == ("one-sided", 2.0, 3.0)
    ((position, sequences, last),) = seen
    assert (position, sequences) == ([9, 9], 2)
    expected = torch.zeros(1, 2, 2, 2, 8, 8)
    fill_with_noise(expected, torch.arange(2), 8)
    assert torch.equal(last, expected[:, :, :, :, 7])


def test_a_sequence_has_the_same_noise_wherever_it_is_held() -> None:
    one, other = torch.zeros(2, 2, 3, 2, 6, 4), torch.zeros(2, 2, 1, 2, 9, 4)
    fill_with_noise(one, torch.tensor([1, 4, 5]), 6)
    fill_with_noise(other, torch.tensor([4]), 6)
    assert torch.equal(one[:, :, 1], other[:, :, 0, :, :6])
    assert not other[:, :, 0, :, 6:].any()
    assert (one[:, :, 0] != one[:, :, 1]).all()


def test_the_first_row_of_a_batch_may_be_missing() -> None:
    cases = [Case(8, name, "eager", "contiguous") for name in STRATEGIES]
    report = Report({}, cases, None)
    report.add(cases[0], "does not fit: 2 GB")
    report.add(cases[2], Outcome(4.0, 5.0, 1.0, 0.0, 2.0, floor_ms=2.0))
    rows = report.document()["rows"]
    assert [row["strategy"] for row in rows] == ["dispatch-combine", "replicated"]
    assert [row["stopped"] for row in rows] == ["does not fit: 2 GB", None]
    assert (rows[1]["speedup"], rows[1]["times_floor"], rows[1]["tokens_per_s"]) == (None, 2.0, 2000.0)


def test_one_process_has_no_collectives() -> None:
    with pytest.raises(
        InputError, match="collective: one process exchanges nothing; give one-sided or eager"
    ):
        bench_setting._transports(["collective"], "cuda", topology=None)


def test_the_help_has_an_example(command_line: Callable[[str], tuple[int, str, str]]) -> None:
    code, out, _ = command_line("bench decode --help")
    assert code == 0
    assert "exflow bench decode configs/shapes/gpt-oss-20b" in out

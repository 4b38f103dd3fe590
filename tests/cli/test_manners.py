"""Behaviour of the command line: progress, --quiet, --verbose, colours, completion, help, exit codes."""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from rich.console import Console

from exflow import cli, console
from exflow.cli import options
from exflow.job import outcome
from exflow.placement.formats.exporters import registry as exporters
from exflow.placement.formats.importers import registry as plan_importers
from exflow.placement.make_plan import BASELINES, place
from exflow.placement.plan.topology import Topology
from exflow.placement.solve.solve import METHODS
from exflow.profiling.importers import registry as importers
from exflow.profiling.trace import RoutingTrace

EXFLOW = Path(sys.executable).with_name("exflow")
COLOUR = re.compile(r"\x1b\[[\d;]*(?:3[0-8]|4[0-8]|9\d)[\d;]*m")
TRAINING = """
model: {vocab_size: 280, max_positions: 32, num_hidden_layers: 2, hidden_size: 32, num_attention_heads: 2,
  num_kv_heads: 1, intermediate_size: 32, num_experts: 4}
data: {texts: [book.txt]}
training: {steps: 4, batch_size: 2, sequence_length: 24, learning_rate: 0.01, warmup_steps: 1,
  evaluate_tokens: 200}
checkpoint_steps: [0]
"""

IMPORT = "import routing.npz -o t"  # which notes that the file does not say how many experts there are
NOTE = "exflow: the files do not say num_experts: taken as 8, the largest id plus 1"

# Every verb that can take more than two seconds, and what its progress says.
LONG = {
    "profile model --text book.txt --tokens 640 -o t": "profiling.*640/640 tokens",
    IMPORT: "importing",
    "place trace --gpus 2 --method search --time-limit 1 -o p.json": "placing.* left",
    "balance loads.json --gpus 2 -o p.json": "balancing.*1/1 files",
    "evaluate plan.json trace": "counting",
    "report trace plan.json -o report.html": "reporting.*steps.*left",
    "generate model --prompt hello --max-new-tokens 6 --ignore-end": "generating.*5/6 tokens",
    "bench decode model --steps 1 --batch 2 --batch 3 --context 4": "timing.*2/2 cases",
    "train tiny.yaml -o run": "training.*4/4 steps",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("manners")
    shutil.copytree(tiny_checkpoint(), folder / "model")
    experts = np.random.default_rng(0).integers(0, 8, (200, 4, 1))
    trace = RoutingTrace.from_arrays(experts, num_experts=8, sequence=np.arange(200) // 20)
    trace.save(folder / "trace")
    place(trace, Topology(gpus_per_node=2)).save(folder / "plan.json")
    np.savez(folder / "routing.npz", experts=experts)
    (folder / "loads.json").write_text("[[4, 1, 1, 2], [1, 1, 1, 1]]")
    (folder / "book.txt").write_text("It was a dark and stormy night.\n" * 100)
    (folder / "tiny.yaml").write_text(TRAINING)
    return folder


class Terminal:
    """A pseudo-terminal to write to; `text` is all that was written."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        self.file = os.fdopen(theirs, "w")
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._ours, 1 << 16):
                self._seen += part
        except OSError:  # nobody has it open any more
            pass

    def text(self) -> str:
        """Return the text written so far, and close the file."""
        self.file.close()
        self._reader.join()
        os.close(self._ours)
        return self._seen.decode()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """run(line, terminal=True): exit code, stdout and stderr, which is a terminal or not."""
    monkeypatch.setattr(outcome, "answer_signals", lambda: None)  # pytest's own stay
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "work"
    shutil.copytree(inputs, folder)
    monkeypatch.chdir(folder)

    def command(line: str, terminal: bool = False) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["exflow", *line.split()])
        screen = Terminal() if terminal else None
        with monkeypatch.context() as now:
            if screen is not None:
                now.setattr(sys, "stderr", screen.file)
            now.setattr(console, "stderr", Console(stderr=True, width=100))
            with pytest.raises(SystemExit) as stop:
                cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err if screen is None else screen.text()

    return command


@pytest.mark.parametrize("line", LONG, ids=[line.split()[0] for line in LONG])
def test_a_terminal_shows_progress_and_stdout_holds_json_alone(run: Run, line: str) -> None:
    code, out, screen = run(f"{line} --json", terminal=True)
    assert code == 0
    assert isinstance(json.loads(out), dict)
    assert re.search(LONG[line], screen), screen
    assert "\x1b[2K" in screen  # and is wiped away


@pytest.mark.parametrize("line", [line for line in LONG if not line.startswith("train")])
def test_elsewhere_there_is_no_progress(run: Run, line: str) -> None:
    code, _, err = run(line)
    assert code == 0
    told = [each for each in err.splitlines() if not each.startswith("exflow: The trace has")]
    assert told == ([NOTE] if line == IMPORT else [])


@pytest.mark.parametrize("line", [f"--quiet {IMPORT}", f"{IMPORT} --quiet", f"{IMPORT} -q"])
def test_quiet_means_errors_alone(run: Run, line: str) -> None:
    assert run(line, terminal=True)[::2] == (0, "")
    code, out, err = run(line.replace("routing.npz", "absent.npz"))
    assert (code, out) == (2, "") and err.startswith("exflow: absent.npz")


@pytest.mark.parametrize("line", [f"--verbose {IMPORT}", f"{IMPORT} -v"])
def test_verbose_is_lines_where_there_is_no_terminal(run: Run, line: str) -> None:
    code, _, err = run(line)
    assert code == 0
    assert err.splitlines()[0] == NOTE
    assert re.fullmatch(r"exflow: importing: done after \d\.\d s", err.splitlines()[1])


def test_verbose_tells_of_long_work_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(console, "monotonic", lambda: now[0])
    monkeypatch.setattr(console.verbosity, "verbose", True)
    with console.Work("counting", "sheep") as work:
        for now[0] in (3, 6, 9, 12):
            work.advance(now[0], 1000)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" sheep")[0] for line in lines] == [
        "exflow: counting, 6/1,000",
        "exflow: counting, 12/1,000",
        "exflow: counting: done after 12.0 s",
    ]


def test_verbose_says_where_an_error_came_from(run: Run) -> None:
    _, _, err = run("evaluate absent.json trace --verbose")
    assert "Traceback" in err and err.splitlines()[-1].startswith("exflow: absent.json: no such plan")
    _, _, err = run("evaluate absent.json trace")
    assert err.count("\n") == 1


def test_quiet_and_verbose_exclude_each_other(run: Run) -> None:
    for line in (f"-q -v {IMPORT}", f"-q {IMPORT} -v", f"{IMPORT} -q -v"):
        code, _, err = run(line)
        assert code == 2 and "--quiet and --verbose" in err and err.count("\n") == 1


# Whole processes.


def on_terminal(*arguments: str, folder: Path, **environment: str) -> str:
    """Return what `exflow ARGUMENTS` shows where stdout and stderr are a terminal."""
    screen = Terminal()
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run(
        [EXFLOW, *arguments],
        cwd=folder,
        env=clean | {"TERM": "xterm-256color"} | environment,
        stdout=screen.file,
        stderr=screen.file,
        timeout=60,
    )
    assert done.returncode == 0
    return screen.text()


@pytest.mark.parametrize("arguments", [("place", "--help"), tuple(IMPORT.split())], ids=["help", "progress"])
def test_no_color(inputs: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    folder = tmp_path / "work"
    shutil.copytree(inputs, folder)
    assert COLOUR.search(on_terminal(*arguments, folder=folder))
    assert not COLOUR.search(on_terminal(*arguments, folder=folder, NO_COLOR="1"))


COMPLETED = {
    "exflow ev": {"evaluate"},
    "exflow export --format vllm": {"vllm", "vllm-ascend"},
    "exflow generate --strategy ''": set(options.STRATEGIES),
    "exflow bench decode --transport o": {"one-sided"},
    "exflow place trace --qu": {"--quiet"},
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_verbs_options_and_names() -> None:
    """The script that --show-completion prints, asked as bash asks it."""
    words = "\n".join(
        f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); "
        '_exflow_completion exflow; echo "${COMPREPLY[@]}"'
        for line in COMPLETED
    )
    script = f'eval "$(exflow --show-completion bash)"\n{words}'
    path = f"{EXFLOW.parent}{os.pathsep}{os.environ['PATH']}"
    shown = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=60
    )
    answers = [set(line.split()) for line in shown.stdout.splitlines()]
    assert dict(zip(COMPLETED, answers, strict=True)) == COMPLETED, shown.stderr


def test_completion_installs_itself(tmp_path: Path) -> None:
    # a shell that stays, since it is the processes above that tell which one there is
    script = '"$0" --install-completion; exit $?'
    done = subprocess.run(
        ["bash", "-c", script, str(EXFLOW)], env=os.environ | {"HOME": str(tmp_path)}, timeout=60
    )
    assert done.returncode == 0
    assert any("_exflow_completion" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_the_names_that_are_completed_are_those_there_are() -> None:
    from exflow.comm import transport
    from exflow.model import device

    assert set(options.TRACE_FORMATS) == set(importers.FORMATS)
    assert set(options.PLAN_FORMATS) == set(exporters.FORMATS) == set(plan_importers.FORMATS)
    assert options.TRANSPORTS == transport.NAMES
    assert options.METHODS == METHODS + BASELINES
    assert set(options.DTYPES) == set(device.DTYPES)


# Every verb.


def verbs() -> Iterator[tuple[str, Any]]:
    top = typer.main.get_command(cli.app)
    for name, command in top.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        yield from ((f"{name} {each}", of) for each, of in inner.items()) if inner else [(name, command)]


VERBS: dict[str, Any] = dict(verbs())


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_manners(run: Run, verb: str) -> None:
    code, shown, err = run(f"{verb} --help")
    assert (code, err) == (0, "")
    assert f"exflow {verb}" in shown.split("Example")[1]
    assert all(option in shown for option in ("--json", "--quiet", "--verbose"))
    code, out, err = run(f"{verb} --no-such-option")
    assert (code, out) == (2, "") and "No such option" in err
    if any(each.required for each in VERBS[verb].params):
        code, out, err = run(verb)
        assert (code, out) == (2, "") and "Missing" in err


@pytest.mark.parametrize("verb", VERBS)
def test_the_examples_of_the_help_are_valid(verb: str) -> None:
    lines = [line.strip() for line in VERBS[verb].epilog.splitlines()]
    examples = [line for line in lines if line.startswith("exflow ")]
    assert examples
    for line in examples:
        words = shlex.split(line)[1 + len(verb.split()) :]
        with VERBS[verb].make_context(verb, words):
            pass


def test_the_version(run: Run) -> None:
    assert run("--version")[:2] == (0, "exflow 0.1.0\n")

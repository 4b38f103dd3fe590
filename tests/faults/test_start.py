"""The start of ranks on one host: files of the current folder, names that nobody knows, ranks that hang."""

import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import exflow
from exflow.console import Verbosity
from exflow.job.launch import STARTED_BY

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

EXFLOW = Path(sys.executable).with_name("exflow")
NAMELESS = "nonesuch.invalid"
RESOLVER = f"127.{1 + os.getpid() % 250}.{os.getpid() // 250 % 250}.77"  # of this run of the tests alone


def generate(model: Path, *options: str) -> list[str]:
    tail = ["--prompt", "Rain", "--prompt", "Sun", "--max-new-tokens", "4", "--ignore-end", "--json"]
    tail += ["--strategy", "coherent"]  # which is chosen without a word on stderr
    return [str(EXFLOW), "generate", str(model), *tail, *(options or ["--nproc", "2"])]


def check_ran(job: Any, ranks: int = 2) -> None:
    code, out, err = job.end()
    assert (code, err) == (0, "")
    assert json.loads(out)["ranks"] == ranks


@pytest.fixture
def littered(tmp_path: Path) -> Path:
    """A folder with modules named as those that ranks need; each notes that a rank has run it."""
    folder = tmp_path / "littered"
    names = (
        "random",
        "numpy",
        "torch",
        "typing",
        "exflow",
        "sitecustomize",
        "socket",
        "pickle",
        "yaml/__init__",
    )
    for name in names:
        file = folder / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("import os\nif 'RANK' in os.environ:\n    open('ran', 'a').write(__name__ + '\\n')\n")
    return folder


def test_ranks_run_nothing_of_the_current_folder(littered: Path, model: Path, job: Any) -> None:
    with job(generate(model), cwd=littered) as started:
        check_ran(started)
    assert not (littered / "ran").exists(), (littered / "ran").read_text()


@pytest.mark.all
def test_an_empty_entry_of_the_python_path_is_no_folder_for_ranks(
    littered: Path, model: Path, job: Any, tmp_path: Path
) -> None:
    """Python takes it for the current one. The others are the user's word."""
    seen = tmp_path / "seen"
    seen.mkdir()
    (seen / "sitecustomize.py").write_text(
        (littered / "random.py").read_text().replace("'ran'", "'ran there'")
    )
    for name in ("random", "numpy", "torch", "typing", "exflow", "socket", "pickle"):
        (littered / f"{name}.py").unlink()  # the command itself would import them
    shutil.rmtree(littered / "yaml")
    with job(generate(model), cwd=littered, environment={"PYTHONPATH": f":{seen}:"}) as started:
        check_ran(started)
    assert not (littered / "ran").exists()
    assert (littered / "ran there").read_text() == "sitecustomize\n" * 2


def test_ranks_run_the_package_that_started_them(tmp_path: Path) -> None:
    """A copy that says another version runs itself, not the installed package."""
    home = Path(exflow.__file__).parent
    copy = tmp_path / "exflow"
    shutil.copytree(home, copy, ignore=shutil.ignore_patterns("__pycache__"))
    start = copy / "__init__.py"
    start.write_text(start.read_text().replace(exflow.__version__, "0.0.copy"))
    work = partial(eval, "print(__import__('exflow').__version__)")
    for entry, said in ((copy, b"0.0.copy\n"), (home, f"{exflow.__version__}\n".encode())):
        done = subprocess.run(
            [sys.executable, str(entry / "job" / "rank.py")],
            input=pickle.dumps((Verbosity(), work)),
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            capture_output=True,
            timeout=60,
        )
        assert done.stdout == said, done.stderr


@pytest.fixture
def resolver() -> Iterator[None]:
    """A name server that never answers."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        try:
            server.bind((RESOLVER, 53))
        except OSError as error:
            pytest.skip(f"no name server here: {error}")
        yield


def nameless(folder: Path, command: list[str]) -> list[str]:
    """The command on a host of a name that nobody knows, whose name server is `resolver`."""
    (folder / "resolv.conf").write_text(f"nameserver {RESOLVER}\n")
    (folder / "hosts").write_text("127.0.0.1 localhost\n")
    mounts = [f"mount --bind '{folder / name}' /etc/{name}" for name in ("resolv.conf", "hosts")]
    script = " && ".join([f"hostname {NAMELESS}", *mounts, 'exec "$@"'])
    into = ["unshare", "--uts", "--mount", "bash", "-c", script, "bash"]
    if subprocess.run([*into, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    return [*into, *command]


@pytest.mark.parametrize("by_hand", [False, pytest.param(True, marks=pytest.mark.all)])
def test_one_host_needs_no_name(by_hand: bool, tmp_path: Path, model: Path, job: Any, resolver: None) -> None:
    """Each lookup of it would take 20 s."""
    began = time.monotonic()
    if not by_hand:
        with job(nameless(tmp_path, generate(model))) as started:
            check_ran(started)
    else:
        ranks = [{"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"} for rank in range(2)]
        line = nameless(tmp_path, generate(model, "--patience", "60"))
        port = {"MASTER_PORT": str(free_port())}
        with (
            job(line, environment=ranks[0] | port) as first,
            job(line, environment=ranks[1] | port) as second,
        ):
            check_ran(first)
            assert second.end() == (0, "", "")
    assert time.monotonic() - began < 20


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_a_host_without_loopback(model: Path, job: Any) -> None:
    alone = ["unshare", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("no namespaces here")
    with job([*alone, *generate(model)]) as started:
        said = "exflow: 127.0.0.1: ranks cannot meet there (Network is unreachable); `ip link set lo up`\n"
        assert started.end() == (2, "", said)


def test_ranks_that_hang_before_they_come(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """All ranks hang, so no rank is left to report it."""
    from exflow.job import launch

    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launch, "LOADING_S", 1.0)
    began = time.monotonic()
    with pytest.raises(launch.RankDied, match=r"ranks 0, 1 of 2 did not start within 1\.5 s; .* --patience"):
        launch.run_ranks(print, 2, patience_s=0.5)
    assert time.monotonic() - began < 10
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        pytest.param(signal.SIGTERM, marks=pytest.mark.all),
        pytest.param(signal.SIGHUP, marks=pytest.mark.all),
    ],
)
def test_a_signal_while_ranks_start(number: signal.Signals, model: Path, job: Any, tmp_path: Path) -> None:
    hang = (
        "import os, time\nif 'RANK' in os.environ:\n    open(os.environ['RANK'], 'w')\n    time.sleep(600)\n"
    )
    (tmp_path / "sitecustomize.py").write_text(hang)
    with job(generate(model), cwd=tmp_path, environment={"PYTHONPATH": str(tmp_path)}) as started:
        while not all((tmp_path / rank).exists() for rank in "01"):
            assert started.process.poll() is None
            time.sleep(0.05)
        began = time.monotonic()
        started.process.send_signal(number)
        code, out, err = started.end()
        assert time.monotonic() - began < 5
        assert (code, out) == (128 + number, "")
        assert err == (
            "exflow: interrupted\n" if number == signal.SIGINT else f"exflow: stopped by {number.name}\n"
        )


def test_a_signal_to_a_rank_by_hand(model: Path, job: Any) -> None:
    """The rank waits inside torch for another one that does not come."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with job(generate(model, "--patience", "600"), environment=place) as rank:
        while not is_listening(int(place["MASTER_PORT"])):
            assert rank.process.poll() is None
            time.sleep(0.05)
        rank.process.send_signal(signal.SIGTERM)
        assert rank.end() == (-signal.SIGTERM, "", "")


def is_listening(port: int) -> bool:
    tables = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    return f":{port:04X} " in tables


def test_a_rank_whose_starter_is_gone_ends(model: Path, job: Any) -> None:
    """The starter died before the rank asked the kernel for a signal at its death."""
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "1"}
    place |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "x", STARTED_BY: "1"}
    with job(generate(model, "--patience", "600"), environment=place) as rank:
        assert rank.end() == (-signal.SIGKILL, "", "")


NO_FILES = ["bash", "-c", 'ulimit -f 0; exec "$@"', "bash"]  # none may grow


@pytest.mark.all
def test_generating_needs_no_temporary_folder(model: Path, tmp_path: Path, job: Any) -> None:
    with job([*NO_FILES, *generate(model)], cwd=tmp_path) as started:
        check_ran(started)


def test_the_demo_needs_a_temporary_folder_and_says_so(job: Any) -> None:
    with job([*NO_FILES, str(EXFLOW), "demo"], cwd=Path(exflow.__file__).parents[1]) as demo:
        code, out, err = demo.end()
    assert (code, out) == (2, ""), err
    assert err == "exflow: no temporary folder can be written; make room there, or name another in TMPDIR\n"

"""A pool of processes that read inputs, each confined: a reader may hang, take all memory, or be killed."""

import os
import resource
import signal
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, TimeoutError, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

from pebble import ProcessExpired, ProcessPool

from benchmarks.robustness.fuzz.inputs import Result, Target, case
from benchmarks.robustness.fuzz.reading import crash_of

CPU_SECONDS, WALL_SECONDS = 2, 20  # of one input: the second is for a reader that waits
ROOM_BYTES = 4 << 30  # of address space, beyond what the process has before it reads
BATCH = 100  # inputs that a process is given at once
BATCHES = 100  # of one process, whose memory the next one does not inherit
LOST_SECONDS = 60  # beyond what its inputs may take, a batch is given up: nobody saw its process end

Tried = tuple[int, list[tuple[int, str]]]  # how many inputs, and the crashes by number


class Pool:
    """Processes that share the inputs of one reader after another; `folder` is scratch.

    They are forked: a Target, whose reader may be a lambda, cannot be sent to them.
    """

    def __init__(self, targets: Sequence[Target], folder: Path, seed: int, cores: int = 1) -> None:
        by_name = {target.name: target for target in targets}
        self._pool = ProcessPool(cores, BATCHES, _begin, (by_name, folder, seed), get_context("fork"))
        self._cores = cores

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.stop()
        self._pool.join()

    def fuzz(self, target: Target, inputs: int, seconds: float = float("inf")) -> Result:
        """Try the inputs 0, 1, ... until `inputs` or `seconds` are over."""
        result, stop = Result(), time.monotonic() + seconds
        size = min(BATCH, -(-inputs // self._cores))
        batches = (range(first, min(first + size, inputs)) for first in range(0, inputs, size))
        running: dict[Future[Tried], range] = {}
        while True:
            more = 2 * self._cores - len(running) if time.monotonic() < stop else 0
            running |= {self._start(target, batch, stop): batch for batch in islice(batches, more)}
            if not running:
                return result
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result.add(*self._outcome(target, running.pop(future), future, stop))

    def _start(self, target: Target, numbers: range, stop: float) -> Future[Tried]:
        timeout = WALL_SECONDS * len(numbers) + LOST_SECONDS
        return self._pool.schedule(_try, (target.name, numbers, stop), timeout=timeout)

    def _outcome(self, target: Target, numbers: range, future: Future[Tried], stop: float) -> Tried:
        """The result of a batch. If it killed its process, each half is tried again, down to the input that
        does it."""
        crash = _death_by(future)
        if crash is None:
            return future.result()
        if len(numbers) == 1:
            return 1, [(numbers[0], crash)]
        middle = len(numbers) // 2
        halves = [
            self._outcome(target, half, self._start(target, half, stop), stop)
            for half in (numbers[:middle], numbers[middle:])
        ]
        tried, found = sum(count for count, _ in halves), [each for _, crashes in halves for each in crashes]
        if tried == len(numbers) and not found:
            found = [(numbers[0], f"{crash} by {len(numbers)} inputs together")]
        return tried, found


@dataclass(frozen=True)
class _Work:
    """The data that a process of the pool gets at its start."""

    targets: dict[str, Target]
    folder: Path
    seed: int


_work: _Work


def _begin(targets: dict[str, Target], folder: Path, seed: int) -> None:
    """Limit this process's memory, and let the timers kill it; libraries that panic have no say."""
    global _work
    _work = _Work(targets, folder / str(os.getpid()), seed)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _try(name: str, numbers: range, stop: float) -> Tried:
    """Read these inputs, until the clock is at `stop`."""
    target, folder = _work.targets[name], _work.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    target.write(folder)
    found: list[tuple[int, str]] = []
    for tried, number in enumerate(numbers):
        if time.monotonic() >= stop:
            return tried, found
        file, content = case(target, _work.seed, number)
        (folder / file).write_bytes(content)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
        crash = crash_of(target.read, folder)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        (folder / file).write_bytes(target.files[file])
        if crash:
            found.append((number, crash))
    return len(numbers), found


def _death_by(future: Future[Tried]) -> str | None:
    """The way in which the process ended that should have answered; None where it did answer."""
    try:
        future.result()
    except ProcessExpired as expired:
        return death(expired.exitcode)
    except TimeoutError:
        return death(-signal.SIGALRM)
    return None


def death(exit_code: int) -> str:
    if exit_code in (-signal.SIGPROF, -signal.SIGALRM):
        return f"takes more than {CPU_SECONDS} s"
    return f"killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"exit {exit_code}"

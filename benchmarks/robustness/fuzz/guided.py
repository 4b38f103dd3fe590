"""Changes that coverage guides, by atheris, where it is installed."""

import gc
import importlib.util
import os
import random
import re
import sys
from pathlib import Path
from types import FunctionType

from benchmarks.robustness.fuzz.inputs import Result, Target
from benchmarks.robustness.fuzz.mutations import mutated
from benchmarks.robustness.fuzz.pool import CPU_SECONDS, ROOM_BYTES, death
from benchmarks.robustness.fuzz.reading import crash_of


def instrument() -> bool:
    """Have atheris see which lines of ours are reached; False where it is not installed."""
    if importlib.util.find_spec("atheris") is None:
        return False
    import atheris  # type: ignore[import-untyped,import-not-found,unused-ignore]

    for each in gc.get_objects():
        if isinstance(each, FunctionType) and (each.__module__ or "").startswith("exflow."):
            atheris.instrument_func(each)
    return True


def guided(target: Target, folder: Path, crashes: Path, seed: int, inputs: int, seconds: float) -> Result:
    """Let atheris choose what to change next by what was reached; it ends with the first crash.

    Only the first of the attacked files is damaged. Its input is left in `crashes`.
    """
    place = folder / f"guided {target.name}"
    (place / "corpus").mkdir(parents=True)
    kept = crashes / target.name
    kept.mkdir(parents=True, exist_ok=True)
    (log := place / "log").touch()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
        limits = [f"-timeout={CPU_SECONDS}", f"-rss_limit_mb={ROOM_BYTES >> 20}", "-max_len=65536"]
        limits += [f"-runs={min(inputs, 2**31 - 1)}", f"-max_total_time={max(1, int(min(seconds, 2**31)))}"]
        _libfuzzer(target, place, [*limits, f"-seed={seed + 1}", f"-artifact_prefix={kept}/"])
    _, status = os.waitpid(pid, 0)
    text = log.read_text(errors="replace")
    counts = re.findall(r"^(?:#|Done )([0-9]+)", text, re.MULTILINE)
    result = Result(tried=int(counts[-1]) if counts else 0)
    if status:
        found = re.findall(r"AssertionError: (.*)|libFuzzer: (.*)", text)
        result.crashes["".join(found[0]) if found else death(os.waitstatus_to_exitcode(status))] = [
            result.tried
        ]
    if not any(kept.iterdir()):
        kept.rmdir()
    return result


def _libfuzzer(target: Target, place: Path, options: list[str]) -> None:
    """Run it in this process, which it ends."""
    import atheris

    name = target.attacked[0]
    target.write(place)
    (place / "corpus" / name).write_bytes(target.files[name])

    def one(content: bytes) -> None:
        (place / name).write_bytes(content)
        if crash := crash_of(target.read, place):
            raise AssertionError(crash)

    def change(content: bytes, size: int, number: int) -> bytes:
        return mutated(random.Random(number), content)[:size]

    atheris.Setup(["fuzz", *options, str(place / "corpus")], one, custom_mutator=change)
    atheris.Fuzz()

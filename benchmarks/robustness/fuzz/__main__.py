"""Throw damaged and hostile files at every reader, and say which of them get anything but an InputError.

    python -m benchmarks.robustness.fuzz --seconds 20                       # each reader in turn
    python -m benchmarks.robustness.fuzz --inputs 500 --only plan           # readers named plan...
    python -m benchmarks.robustness.fuzz --plain                            # without atheris
    python -m benchmarks.robustness.fuzz --inputs 200000 --cores 16 --json fuzz.json   # plain

With atheris the changes are guided by coverage; without it they are drawn blindly, and the output says so.
An input is a valid file after one to three changes: to its bytes, to the numbers in its text, or to its
structure (the tree of JSON and YAML, the header of safetensors and of .npy, the members of an archive); or a
structure drawn at random. It must be read, or refused with an InputError of one line. Anything else is a
crash: another exception, a signal, more than CPU_SECONDS, or more than ROOM_BYTES of address space. Inputs
follow from the seed, the reader's name and their number, on one core or many; the first of each kind of crash
is kept in a folder. Files are in memory where there is a /dev/shm: on a disk they take most of the time.
"""

import argparse
import gc
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.robustness.fuzz.guided import guided, instrument
from benchmarks.robustness.fuzz.inputs import Result, Target, keep
from benchmarks.robustness.fuzz.pool import Pool
from benchmarks.robustness.fuzz.targets import targets

MEMORY = Path("/dev/shm")


def main() -> int:
    given = _arguments()
    inputs = given.inputs or (1000 if given.seconds == float("inf") else sys.maxsize)
    chosen = [target for target in targets() if target.name.startswith(tuple(given.only))]
    by_coverage = not given.plain and given.cores == 1 and instrument()
    how = "atheris, guided by coverage" if by_coverage else "plain mutation, not guided by coverage"
    print(f"{how}; seed {given.seed}\n{'reader':24} {'inputs':>8} {'crashes':>8} {'per s':>8}", flush=True)
    figures: dict[str, dict[str, float]] = {}
    gc.freeze()  # processes are forked, and collecting what they share with this one would copy it
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as name,
        Pool(chosen, Path(name), given.seed, given.cores) as pool,
    ):
        for target in chosen:
            start = time.monotonic()
            if by_coverage:
                result = guided(target, Path(name), given.crashes, given.seed, inputs, given.seconds)
            else:
                result = pool.fuzz(target, inputs, given.seconds)
                keep(target, given.seed, result, given.crashes)
            seconds = time.monotonic() - start
            crashes = sum(map(len, result.crashes.values()))
            figures[target.name] = {"inputs": result.tried, "crashes": crashes, "seconds": round(seconds, 1)}
            _show(target, result, seconds)
            if given.json:
                run = {"how": how, "seed": given.seed, "cores": given.cores}
                run |= {"python": platform.python_version(), "readers": figures}
                given.json.write_text(json.dumps(run, indent=1) + "\n")
    return int(any(each["crashes"] for each in figures.values()))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each reader")
    parser.add_argument("--inputs", type=int, help="for each reader (1000, without --seconds)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="the readers whose names begin so")
    parser.add_argument("--plain", action="store_true", help="without atheris, even where it is installed")
    parser.add_argument("--cores", type=int, default=1, help="that share the inputs; more than one is plain")
    parser.add_argument("--json", type=Path, help="file for the figures, written after each reader")
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"), help="folder for what crashes")
    return parser.parse_args()


def _show(target: Target, result: Result, seconds: float) -> None:
    crashes, rate = sum(map(len, result.crashes.values())), result.tried / seconds
    print(f"{target.name:24} {result.tried:8} {crashes:8} {rate:8.0f}", flush=True)
    for crash, numbers in result.crashes.items():
        print(f"    {len(numbers)} times, first input {numbers[0]}: {crash}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

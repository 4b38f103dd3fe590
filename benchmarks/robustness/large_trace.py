"""Recording, placing and evaluating a trace that is larger than the memory they may take.

    python -m benchmarks.robustness.large_trace --mib 600 -o large-trace.json

A generated trace of that size (48 layers of 64 experts, top-8; 64 sequences at a time) is written as a
recording is, shard by shard, and then placed and evaluated by the `exflow` command. Each of the three is a
process whose private memory (RLIMIT_DATA: heap, stacks, anonymous maps; not the pages of mapped files) is
limited to less than the trace: asking for more would end it. What they took at most is sampled meanwhile.
The temporary file in which shards are joined is made in the folder given.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.routing.generated import generate
from exflow.files import write_json
from exflow.profiling.shard import Rows
from exflow.profiling.writer import TraceWriter

LAYERS, EXPERTS, TOP_K = 48, 64, 8
BLOCK_TOKENS, BLOCK_SEQUENCES = 1 << 15, 64
ROW_BYTES = LAYERS * TOP_K + 4 + 4 + 1  # ids of a byte, sequence, position, phase


def record(folder: Path, mib: int) -> None:
    """Write the trace block by block."""
    blocks = -(-(mib << 20) // (ROW_BYTES * BLOCK_TOKENS))
    shape: Any = {"layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "skew": 0.5, "affinity": 0.5}
    make = partial(generate, tokens=BLOCK_TOKENS, sequences=BLOCK_SEQUENCES, **shape)
    with TraceWriter(folder, make(seed=0).layout, has_weights=False) as writer:
        for block in range(blocks):
            trace = make(seed=0)
            rows: Rows = {"experts": trace.experts, "position": trace.position, "phase": trace.phase}
            first = np.int32(block * BLOCK_SEQUENCES)
            rows["experts"] = (trace.experts + np.uint8(block)) % EXPERTS  # another one, cheaply
            writer.append(rows | {"sequence": trace.sequence + first})


def run(command: list[str], limit_mib: int, scratch: Path) -> dict[str, Any]:
    """Run a command under a limit of private memory; return its seconds, exit code and peaks of memory."""
    limit = limit_mib << 20
    start, most = time.monotonic(), {"RssAnon": 0, "VmData": 0, "VmHWM": 0}
    process = subprocess.Popen(
        command,
        env=os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
        )
        for name in most:
            most[name] = max(most[name], int(status.get(name, "0 kB").split()[0]) >> 10)
        time.sleep(0.02)
    result = {"seconds": round(time.monotonic() - start, 1), "exit": process.returncode}
    return result | {
        "private_mib": most["RssAnon"],
        "asked_for_mib": most["VmData"],
        "with_files_mib": most["VmHWM"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mib", type=int, default=600, help="of the trace")
    parser.add_argument("--limit-mib", type=int, default=450, help="of private memory")
    parser.add_argument("--folder", type=Path, help="for the trace and temporary files; needs twice its size")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.record:
        record(given.record, given.mib)
        return 0
    with tempfile.TemporaryDirectory(prefix="large-", dir=given.folder) as name:
        scratch = Path(name)
        trace, plan = str(scratch / "trace"), str(scratch / "plan.json")
        exflow = [sys.executable, "-m", "exflow.cli"]
        commands = {
            "record": [
                sys.executable,
                "-m",
                "benchmarks.robustness.large_trace",
                "--mib",
                str(given.mib),
                "--record",
                trace,
            ],
            "place": [*exflow, "place", trace, "--gpus", "8", "--time-limit", "5", "-o", plan],
            "evaluate": [*exflow, "evaluate", plan, trace],
        }
        results = {what: run(command, given.limit_mib, scratch) for what, command in commands.items()}
        size = sum(path.stat().st_size for path in Path(trace).iterdir()) >> 20
    document = {"trace_mib": size, "limit_mib": given.limit_mib, **results}
    print(json.dumps(document, indent=1))
    if given.output:
        write_json(given.output, document)
    return int(size <= given.limit_mib or any(result["exit"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())

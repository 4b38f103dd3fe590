"""`generate` under load for a long time: thousands of sequences on CPU ranks, and whether anything was lost.

    python -m benchmarks.robustness.soak --seconds 600 -o soak.json   # 4 ranks, the shipped model
    python -m benchmarks.robustness.soak --seconds 60 --stress 4      # beside 4 busy processes

Sequences arrive at random times (a Poisson process that does not wait for answers: an open loop), each with a
prompt of random length. A request of this engine is a batch: what has arrived while the request before ran
is the next one, on engines that live as long as the run, one for each strategy in turn. Inside a request
sequences finish at different times, by end tokens or the request's own limit, and their owners run on with
what is left; none joins a request that runs. So this is batch after batch under load, and no continuous
batching.

Checked: every sequence that arrived is answered once; all ranks return the same answer; a single process
gives the same tokens to every request, replayed after the run (where it chooses another one whose score is
within ROUNDING, that is a tie which rounding decided, counted as such, and the rest of the sequence is not
compared); and a rank's own memory (anonymous pages) does not grow by more than MAX_GROWTH_MIB after the first
WARM_UP_S (not judged where fewer than ten requests begin after them). Exit code 1 if a check fails.
"""

import argparse
import ctypes
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from exflow.files import write_json
from exflow.job.cluster import all_gather_object, join_cluster
from exflow.job.launch import torchrun_place
from exflow.model.checkpoint import Checkpoint
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Rows
from exflow.model.sampling import Sampling, scores_of
from exflow.placement.plan.strategy import Strategy
from exflow.placement.plan.topology import Topology
from exflow.runtime.deploy import Deployment, default_plan, deploy, load_model
from exflow.runtime.engine import Engine
from exflow.runtime.request import Request

MODEL = Path(__file__).parents[2] / "models" / "gpt-moe-demo"
STRATEGIES: tuple[Strategy, ...] = (
    Strategy.COHERENT,
    Strategy.DISPATCH_COMBINE,
    Strategy.REPLICATED,
)
MAX_BATCH = 48
MAX_GROWTH_MIB = 16
WARM_UP_S = 60
ROUNDING = 1e-4  # of scores, which are some 20 large: 7 digits and sums in another order
END_SHARE = 0.05  # of the vocabulary: tokens that end a sequence, so that lengths differ


@dataclass(frozen=True)
class Load:
    """The requests: they follow from the seed, on every rank and in the replay alike."""

    seed: int
    rate: float  # sequences a second
    seconds: float
    vocabulary: int

    def arrivals(self) -> np.ndarray[Any, Any]:
        """[sequences] float: seconds after the start at which each sequence arrives."""
        rng = np.random.default_rng((self.seed, 0))
        gaps = rng.exponential(1 / self.rate, int(self.rate * self.seconds * 1.2) + 100)
        times = gaps.cumsum()
        return times[times < self.seconds]

    def prompt(self, sequence: int) -> list[int]:
        rng = np.random.default_rng((self.seed, 1, sequence))
        return [int(token) for token in rng.integers(0, self.vocabulary, rng.integers(1, 33))]

    def request(self, number: int, sequences: list[int]) -> Request:
        """Request `number` of the run, of these sequences."""
        rng = np.random.default_rng((self.seed, 2, number))
        ends = np.random.default_rng((self.seed, 3)).permutation(self.vocabulary)
        sampling = Sampling(temperature=1.0, seed=int(rng.integers(1 << 30)))
        return Request(
            [self.prompt(sequence) for sequence in sequences],
            int(rng.integers(8, 65)),
            sampling,
            tuple(ends[: int(END_SHARE * self.vocabulary)].tolist()),
        )


def run_rank(model: Path, load: Load, folder: Path) -> None:
    """One rank: request after request until all that arrives has been answered."""
    torch.set_num_threads(1)
    arrivals = load.arrivals()
    with join_cluster("cpu") as cluster, ExitStack() as files:
        plan = default_plan(load_model_config(model), Topology(gpus_per_node=cluster.num_ranks))
        engines = [
            deploy(Deployment(Checkpoint.open(model), strategy, plan), cluster) for strategy in STRATEGIES
        ]
        log = files.enter_context((folder / f"rank-{cluster.rank}.jsonl").open("w"))
        all_gather_object(cluster, None)
        start, admitted, number = time.monotonic(), 0, 0
        while admitted < len(arrivals):
            here = int(np.searchsorted(arrivals, time.monotonic() - start))
            until = all_gather_object(cluster, min(here, admitted + MAX_BATCH))[
                0
            ]  # by the first rank's clock
            if until == admitted:
                time.sleep(0.005)
                continue
            sequences = list(range(admitted, until))
            begun = time.monotonic() - start
            generation = engines[number % len(engines)].generate(load.request(number, sequences))
            line = {"number": number, "sequences": sequences, "begun": begun}
            line |= {"ended": time.monotonic() - start, "memory_kib": own_memory_kib()}
            line |= {"waiting": here - until, "tokens": generation.tokens}
            log.write(json.dumps(line) + "\n")
            admitted, number = until, number + 1


def own_memory_kib() -> int:
    """Anonymous pages of this process: without those of files, which may be given up at any time, and those
    that the allocator keeps though nothing is on them (how many depends on the sizes of past requests)."""
    ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])


@contextmanager
def stress(processes: int) -> Iterator[None]:
    """Run processes that do nothing but take time from others."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def lines_of(folder: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"rank-{rank}.jsonl").read_text().splitlines()]


@dataclass
class Verdict:
    """The faults of the answers, a line each; and the ties that rounding decided."""

    faults: list[str] = field(default_factory=list)
    ties: int = 0


def judge(model: Path, load: Load, by_rank: list[list[dict[str, Any]]]) -> Verdict:
    verdict, expected = Verdict(), list(range(len(load.arrivals())))
    answered = [sequence for line in by_rank[0] for sequence in line["sequences"]]
    if sorted(answered) != expected:
        lost, twice = set(expected) - set(answered), len(answered) - len(set(answered))
        verdict.faults.append(f"{len(lost)} sequences were lost, {twice} answered more than once")
    torch.set_num_threads(1)  # as a rank has
    alone = load_model(model)
    for number, lines in enumerate(zip(*by_rank, strict=True)):
        answers = [(line["number"], line["sequences"], line["tokens"]) for line in lines]
        if any(answer != answers[0] for answer in answers):
            verdict.faults.append(f"request {number}: the ranks do not agree")
        request = load.request(number, lines[0]["sequences"])
        for place, behind in differences(alone, request, lines[0]["tokens"]):
            if behind <= ROUNDING:
                verdict.ties += 1
            else:
                strategy = STRATEGIES[number % len(STRATEGIES)]
                verdict.faults.append(
                    f"request {number} ({strategy}), {place}: {behind} behind one process's"
                )
    return verdict


def differences(alone: Engine, request: Request, tokens: list[list[int]]) -> Iterator[tuple[str, float]]:
    """Yield the first token of each sequence that differs from one process's: a message, and how far its
    score is behind."""
    seen: dict[tuple[int, int], torch.Tensor] = {}
    first = alone.first_sequence

    def keep(rows: Rows, logits_TV: torch.Tensor) -> None:
        places = zip((rows.sequence_T - first).tolist(), rows.position_T.tolist(), strict=True)
        seen.update(zip(places, logits_TV, strict=True))

    right = alone.generate(request, keep).tokens
    for number, (answer, other) in enumerate(zip(tokens, right, strict=True)):
        if answer == other:
            continue
        step = next((step for step, pair in enumerate(zip(answer, other)) if pair[0] != pair[1]), None)  # noqa: B905
        if step is None:
            yield f"sequence {number} has {len(answer)} tokens, not {len(other)}", float("inf")
            continue
        position = len(request.prompts[number]) + step
        place_T = torch.tensor([number]), torch.tensor([position])
        (score_V,) = scores_of(seen[number, position - 1][None], request.sampling, *place_T)
        yield f"sequence {number}, step {step}", float(score_V.max() - score_V[answer[step]])


def growth_mib(lines: list[dict[str, Any]]) -> float | None:
    """Growth of a rank's memory: median of its last tenth of requests minus that of the first tenth after the
    warm-up."""
    memory = [line["memory_kib"] for line in lines if line["begun"] >= WARM_UP_S]
    if not (tenth := len(memory) // 10):
        return None
    return round(float(np.median(memory[-tenth:]) - np.median(memory[:tenth])) / 1024, 2)


def tenths_mib(lines: list[dict[str, Any]]) -> list[float]:
    """Median memory in each tenth of a rank's requests, which shows whether it goes on growing."""
    parts = np.array_split([line["memory_kib"] / 1024 for line in lines], 10)
    return [round(float(np.median(part)), 1) for part in parts if len(part)]


def summary(load: Load, by_rank: list[list[dict[str, Any]]]) -> dict[str, Any]:
    lines, arrivals = by_rank[0], load.arrivals()
    latency = [line["ended"] - arrivals[sequence] for line in lines for sequence in line["sequences"]]
    lengths = [len(tokens) for line in lines for tokens in line["tokens"]]
    sizes = [len(line["sequences"]) for line in lines]
    return {
        "sequences": len(latency),
        "requests": len(lines),
        "new_tokens": sum(lengths),
        "seconds": round(lines[-1]["ended"], 1),
        "sequences_of_a_request": quantiles(sizes),
        "new_tokens_of_a_sequence": quantiles(lengths),
        "seconds_from_arrival_to_answer": quantiles(latency),
        "most_waiting": max(line["waiting"] for line in lines),
        "memory_mib": [
            {"first": rank[0]["memory_kib"] // 1024, "most": max(line["memory_kib"] for line in rank) // 1024}
            | {"growth": growth_mib(rank), "by_tenth": tenths_mib(rank)}
            for rank in by_rank
        ],
    }


def quantiles(values: list[Any]) -> dict[str, float]:
    return {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (0, 50, 99, 100)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--seconds", type=float, default=60, help="in which sequences arrive")
    parser.add_argument("--rate", type=float, default=12, help="sequences a second")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--stress", type=int, default=0, help="busy processes beside the ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # what the ranks are told
    given = parser.parse_args()
    load = Load(given.seed, given.rate, given.seconds, load_model_config(given.model).vocab_size)
    if torchrun_place() is not None:
        run_rank(given.model, load, given.folder)
        return 0
    with tempfile.TemporaryDirectory(prefix="soak-") as scratch, stress(given.stress):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(given.ranks)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run([*torchrun, *sys.argv, "--folder", scratch], check=True, env=environment)
        by_rank = [lines_of(Path(scratch), rank) for rank in range(given.ranks)]
    verdict, result = judge(given.model, load, by_rank), summary(load, by_rank)
    worst = max(rank["growth"] or 0 for rank in result["memory_mib"])
    if worst > MAX_GROWTH_MIB:
        verdict.faults.append(f"a rank grew by {worst} MiB, {MAX_GROWTH_MIB} is allowed")
    document = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "hardware": f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "load_of_5_minutes": round(os.getloadavg()[1], 1),
        "torch": torch.__version__,
        "strategies": STRATEGIES,
        "ranks": given.ranks,
        "stress": given.stress,
        "allowed_growth_mib": MAX_GROWTH_MIB,
        **result,
        "ties_decided_by_rounding": verdict.ties,
        "faults": verdict.faults,
    }
    print(json.dumps(document, indent=1))
    if given.output:
        write_json(given.output, document)
    return int(bool(verdict.faults))


if __name__ == "__main__":
    sys.exit(main())

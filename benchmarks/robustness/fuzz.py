"""Throw damaged and hostile files at every reader, and say which of them get anything but an InputError.

    python -m benchmarks.robustness.fuzz --seconds 20                  # each reader in turn, and a table
    python -m benchmarks.robustness.fuzz --inputs 500 --only plan      # readers whose name begins with plan
    python -m benchmarks.robustness.fuzz --plain                   # without atheris, where that is installed
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
import base64
import copy
import errno
import gc
import importlib.util
import io
import json
import mmap
import os
import platform
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import save

from exflow.cost.machines import load_machine
from exflow.errors import InputError
from exflow.model.checkpoint import load_decoder, save_checkpoint
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Decoder
from exflow.model.families import FAMILIES
from exflow.model.tokenizer import SMALLEST_VOCABULARY, end_tokens, load_tokenizer, train_tokenizer
from exflow.placement.formats.importers.registry import read_plan
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.plan.topology_file import load_topology
from exflow.profiling.importers.foreign import Hints
from exflow.profiling.importers.loads import read_loads
from exflow.profiling.importers.registry import import_trace
from exflow.profiling.trace import RoutingTrace
from exflow.train.config import load_train_config

ROOT = Path(__file__).parents[2]
CPU_SECONDS, WALL_SECONDS = 2, 20  # of one input: the second is for a reader that waits
ROOM_BYTES = 4 << 30  # of address space, beyond what the process has before it reads
BATCH = 2000  # inputs of one child
MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Target:
    """A reader: `files` are valid, by name; those in `attacked` are damaged; `read` is given their folder."""

    name: str
    files: dict[str, bytes]
    attacked: tuple[str, ...]
    read: Callable[[Path], object]


@dataclass
class Result:
    """What came of the inputs tried: for each kind of crash the number of the first input, and how many."""

    tried: int = 0
    crashes: dict[str, list[int]] = field(default_factory=dict)


# --- changes -----------------------------------------------------------------------------------------------

DEEP, DIGITS = "@deep@", "@digits@"  # replaced in the text: the writer itself would refuse them
NASTY: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 255, 256, 65535, 65536, 2**31, 2**63, 2**64, 10**12, 10**30, 10**400),
    *(-(2**63), 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), -float("inf"), DEEP, DIGITS),
    *("", "x", "\n", "a\nb", "\x00", "\ud800", "é" * 300, "../x", "/etc/passwd", "12", "1e9", "x" * 5000),
    *([], {}, [[]], [None], {"": None}, [0] * 1000, list(range(300)), {"a": {"b": [1, "c"]}}),
)
NUMBERS = (
    b"0",
    b"-1",
    b"1",
    b"256",
    b"65536",
    b"2147483648",
    b"18446744073709551616",
    b"1" * 40,
    b"9" * 5000,
)
SNIPPETS = (
    b"!!python/object:os.system {}",
    b"&a [*a, *a]",
    b"*a",
    b"? {",
    b"\x00",
    b"\xff\xfe",
    b"2001-13-45",
)


def mutated(rng: random.Random, content: bytes) -> bytes:
    """The content after one to three changes, or something drawn at random."""
    if rng.random() < 0.03:
        return text_of(rng, drawn(rng, 4))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if b"[" * 40 in content or b'{"a":' * 40 in content:  # so deep that the changes themselves would fail
            break
        content = rng.choice((changed_structure, changed_structure, changed_bytes, changed_numbers))(
            rng, content
        )
    return content


def changed_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flipped, cut, doubled, filled or interrupted."""
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    match rng.randrange(6):
        case 0 if content:
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 1, 4))):
                flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)
        case 1:
            return content[:start]
        case 2:
            return content[:start] + content[stop:]
        case 3:
            return content[:stop] + content[start:]
        case 4:
            return content[:start] + rng.choice((b"\xff", b"\x00")) * min(stop - start, 16) + content[stop:]
    return content[:start] + rng.choice(SNIPPETS) + content[start:]


def changed_numbers(rng: random.Random, content: bytes) -> bytes:
    """A number in the text becomes another."""
    found = list(re.finditer(rb"-?\d+", content[: 1 << 16]))
    if not found:
        return changed_bytes(rng, content)
    chosen = rng.choice(found)
    return content[: chosen.start()] + rng.choice(NUMBERS) + content[chosen.end() :]


def changed_structure(rng: random.Random, content: bytes) -> bytes:
    """As what the bytes are; if they are nothing known, as bytes."""
    if content.startswith(b"PK\x03\x04"):
        return changed_archive(rng, content)
    if content.startswith(b"\x93NUMPY"):
        return changed_npy(rng, content)
    if content[8:9] == b"{":
        return changed_safetensors(rng, content)
    rows = content.splitlines()
    if len(rows) > 1 and all(row.startswith(b"{") and row.endswith(b"}") for row in rows):
        chosen = rng.randrange(len(rows))
        rows[chosen] = changed_structure(rng, rows[chosen])
        return b"\n".join(rows) + b"\n"
    value = parsed(content)
    if not isinstance(value, dict | list) or b"&" in content:  # an anchor may make a tree without end
        return changed_bytes(rng, content)
    return text_of(rng, changed_tree(rng, value))


@lru_cache(maxsize=64)  # valid files come again and again
def parsed(content: bytes) -> Any:
    """The tree of JSON or YAML, not to be changed; None of anything else."""
    try:
        return json.loads(content) if content.lstrip()[:1] in (b"{", b"[") else yaml.safe_load(content)
    except (ValueError, RecursionError, yaml.YAMLError):
        return None


def changed_archive(rng: random.Random, content: bytes) -> bytes:
    """One member changed, or under another name; the archive is whole."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info, archive.read(info)) for info in archive.infolist()]
    except Exception:  # damaged before
        return changed_bytes(rng, content)
    chosen = rng.randrange(len(members)) if members else -1
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for number, (info, data) in enumerate(members):
            change = changed_npy if data.startswith(b"\x93NUMPY") else changed_bytes
            name = "../x" if number == chosen and rng.random() < 0.05 else info.filename
            archive.writestr(name, change(rng, data) if number == chosen else data, info.compress_type)
    return packed.getvalue()


def changed_npy(rng: random.Random, content: bytes) -> bytes:
    """Another header, of the length that it declares, or other bytes."""
    length = int.from_bytes(content[8:10], "little")
    if rng.random() < 0.3 or len(content) < 10 + length:
        return changed_bytes(rng, content)
    header = changed_numbers(rng, content[10 : 10 + length])
    if rng.random() < 0.3:
        header = re.sub(rb"'descr': '[^']*'", rng.choice((b"'descr': '|O'", b"'descr': '<U9999'")), header)
    return content[:8] + (len(header) & 0xFFFF).to_bytes(2, "little") + header + content[10 + length :]


def changed_safetensors(rng: random.Random, content: bytes) -> bytes:
    """Another header of the length that it declares, or another length."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        return changed_bytes(rng, content)
    if rng.random() < 0.1 or not isinstance(header, dict):
        return struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 10**11))) + content[8:]
    text = text_of(rng, changed_tree(rng, header))
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def changed_tree(rng: random.Random, value: Any) -> Any:
    """The tree with one place replaced, taken out, doubled, swapped or buried."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return rng.choice(NASTY)
    holder, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder[rng.choice(("x", "", "../x", "\n", f"{key}x"))] = holder[key]
        case 1:
            holder.extend([holder[key]] * rng.choice((1, 2, 100)))
        case 2:
            other, place = rng.choice(places)
            holder[key] = copy.deepcopy(other[place])
        case 3:
            holder[key] = rng.choice(([holder[key]], {"x": holder[key]}, [[holder[key]]]))
        case 4 if isinstance(holder[key], str) and len(holder[key]) > 60:
            holder[key] = _changed_base64(rng, holder[key])
        case 5 if isinstance(holder[key], int | float):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 10**6)) + rng.choice((-1, 0, 1))
        case 6:
            holder[key] = drawn(rng, 2)
        case _:
            holder[key] = rng.choice(NASTY)
    return value


def _changed_base64(rng: random.Random, text: str) -> str:
    try:
        content = base64.b64decode(text, validate=True)
    except ValueError:
        return text[:-1]
    return base64.b64encode(changed_structure(rng, content)).decode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each holder and key of a tree."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def drawn(rng: random.Random, depth: int) -> Any:
    """A structure of no format."""
    size = rng.randrange(4)
    match rng.randrange(4) if depth else 0:
        case 1:
            return [drawn(rng, depth - 1) for _ in range(size)]
        case 2:
            return {str(rng.choice(NASTY)): drawn(rng, depth - 1) for _ in range(size)}
    return rng.choice(NASTY)


def text_of(rng: random.Random, value: Any) -> bytes:
    """JSON, which is YAML as well; where the tree says so with depth, and numbers, that no writer writes."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8, default=str, skipkeys=True)
    depth = rng.choice((50, 900, 20_000))
    opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
    text = text.replace(f'"{DEEP}"', opening * depth + "1" + closing * depth)
    return text.replace(f'"{DIGITS}"', "9" * 5000).encode("utf-8", "surrogatepass")


# --- running -----------------------------------------------------------------------------------------------


def case(target: Target, seed: int, number: int) -> tuple[str, bytes]:
    """The file that this input is about, and its content."""
    rng = random.Random(f"{seed} {target.name} {number}")
    name = rng.choice(target.attacked)
    return name, mutated(rng, target.files[name])


def crash_of(read: Callable[[Path], object], folder: Path) -> str | None:
    """What is wrong with how the files in `folder` are read, or None."""
    try:
        read(folder)
    except (InputError, SystemExit) as error:
        if _ran_out(error):
            return "an InputError because memory ran out"
        return "a message of several lines" if "\n" in str(error) else None
    except BaseException as error:  # PanicException of a Rust library is no Exception
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if "/exflow/" in frame.filename
        ]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
        return f"{type(error).__name__} at {where}"
    return None


def _ran_out(error: BaseException | None) -> bool:
    """Whether memory that was refused is behind the error."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        error = error.__cause__ or error.__context__
    return False


def fuzz(
    target: Target, folder: Path, seed: int, inputs: int, seconds: float, lane: int = 0, lanes: int = 1
) -> Result:
    """Try the inputs 0, 1, ... until `inputs` or `seconds` are over; `folder` is scratch.

    Of `lanes` that share the inputs this is number `lane`: each takes every so many-th batch.
    """
    result, stop = Result(), time.monotonic() + seconds
    place = folder / target.name
    place.mkdir(parents=True)
    for name, content in target.files.items():
        (place / name).write_bytes(content)
    size = min(BATCH, -(-inputs // lanes))
    for first in range(lane * size, inputs, lanes * size):
        numbers = range(first, min(first + size, inputs))
        while numbers and time.monotonic() < stop:
            done, found, status = _in_child(target, place, seed, numbers, stop)
            if status:
                found.append((done, _death(status)))
                done += 1
            for number, crash in found:
                result.crashes.setdefault(crash, []).append(number)
            result.tried += done - numbers.start
            numbers = range(done, numbers.stop)
        if time.monotonic() >= stop:
            break
    return result


def fuzz_in_lanes(target: Target, folder: Path, seed: int, inputs: int, seconds: float, lanes: int) -> Result:
    """As `fuzz`, with the inputs shared by so many processes."""
    children = [_start_lane(target, folder, seed, inputs, seconds, lane, lanes) for lane in range(lanes)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise RuntimeError(f"{target.name}: a lane of the fuzzer itself failed")
    whole = Result()
    for lane in range(lanes):
        part = Result(**json.loads((folder / f"lane-{lane}.json").read_text()))
        whole.tried += part.tried
        for crash, numbers in part.crashes.items():
            whole.crashes[crash] = sorted(whole.crashes.get(crash, []) + numbers)
    return whole


def _start_lane(
    target: Target, folder: Path, seed: int, inputs: int, seconds: float, lane: int, lanes: int
) -> int:
    """The id of the process."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    try:
        result = fuzz(target, folder / f"lane-{lane}", seed, inputs, seconds, lane, lanes)
        (folder / f"lane-{lane}.json").write_text(json.dumps(asdict(result)))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _death(status: int) -> str:
    number = os.waitstatus_to_exitcode(status)
    if number in (-signal.SIGPROF, -signal.SIGALRM):
        return f"takes more than {CPU_SECONDS} s"
    return f"killed by {signal.Signals(-number).name}" if number < 0 else f"exit {number}"


def _in_child(
    target: Target, place: Path, seed: int, numbers: range, stop: float
) -> tuple[int, list[tuple[int, str]], int]:
    """Read these inputs in a child: the next number, the crashes, and how the child ended."""
    report = place.parent / "report.jsonl"
    report.write_text("")
    shared = mmap.mmap(-1, 8)
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            _confine()
            for number in numbers:
                shared[:] = struct.pack("<q", number)
                name, content = case(target, seed, number)
                (place / name).write_bytes(content)
                signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
                signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
                crash = crash_of(target.read, place)
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
                (place / name).write_bytes(target.files[name])
                if crash:
                    with report.open("a") as file:
                        file.write(json.dumps([number, crash]) + "\n")
                shared[:] = struct.pack("<q", number + 1)
                if time.monotonic() > stop:
                    break
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    for name, content in target.files.items():  # the child may have left its input
        (place / name).write_bytes(content)
    found = [tuple(json.loads(line)) for line in report.read_text().splitlines()]
    return struct.unpack("<q", shared[:])[0], found, status


def _confine() -> None:
    """Limit this process's memory, and let the timers kill it; libraries that panic have no say."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + ROOM_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def keep(target: Target, seed: int, result: Result, folder: Path) -> None:
    """Write the first input of each kind of crash to `folder`."""
    for crash, numbers in result.crashes.items():
        name, content = case(target, seed, numbers[0])
        (folder / target.name).mkdir(parents=True, exist_ok=True)
        label = re.sub(r"[^A-Za-z0-9.]+", "-", crash)
        (folder / target.name / f"{numbers[0]}-{label}-{name}").write_bytes(content)


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
    """As `fuzz`, but atheris chooses what to change next by what was reached; it ends with the first crash.

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
        result.crashes["".join(found[0]) if found else _death(status)] = [result.tried]
    if not any(kept.iterdir()):
        kept.rmdir()
    return result


def _libfuzzer(target: Target, place: Path, options: list[str]) -> None:
    """Run it in this process, which it ends."""
    import atheris

    name = target.attacked[0]
    for other, content in target.files.items():
        (place / other).write_bytes(content)
    (place / "corpus" / name).write_bytes(target.files[name])

    def one(content: bytes) -> None:
        (place / name).write_bytes(content)
        if crash := crash_of(target.read, place):
            raise AssertionError(crash)

    def change(content: bytes, size: int, number: int) -> bytes:
        return mutated(random.Random(number), content)[:size]

    atheris.Setup(["fuzz", *options, str(place / "corpus")], one, custom_mutator=change)
    atheris.Fuzz()


# --- readers -----------------------------------------------------------------------------------------------


def targets() -> list[Target]:
    """Every reader with small valid files."""
    torch.set_num_threads(1)  # children are forked
    return [*_own_files(), *_configurations(), *_checkpoints(), *_imports(), *_placements(), *_loads()]


def _own_files() -> Iterator[Target]:
    ids = np.array([[[0, 3], [2, 1]], [[1, 0], [3, 2]], [[2, 3], [0, 1]], [[0, 1], [1, 2]]])
    trace = RoutingTrace.from_arrays(ids, num_experts=4, moe_layer_ids=[1, 3], weights=np.ones(ids.shape))
    topology = Topology(num_nodes=2, gpus_per_node=1, link_cost=((0.0, 2.0), (2.0, 0.0)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        trace.save(folder / "trace", shard_tokens=2)
        files = {path.name: path.read_bytes() for path in (folder / "trace").iterdir()}
        slots = np.array([[0, 2, 1, 3], [3, 1, 0, 2]])
        Plan.of_slots(slots, topology, trace, method="by hand").save(folder / "plan.json")
        plan = (folder / "plan.json").read_bytes()
    yield Target("trace index", files, ("index.json",), lambda at: RoutingTrace.load(at).digest())
    shards = tuple(name for name in files if name != "index.json")
    yield Target("trace shard", files, shards, lambda at: RoutingTrace.load(at).digest())
    yield _of_one("plan", "plan.json", plan, Plan.load)
    for name in ("topology-2x8", "topology-graph"):
        content = (ROOT / "configs" / f"{name}.yaml").read_bytes()
        yield _of_one(name.replace("-", " "), "topology.yaml", content, load_topology)
    link = {"latency_s": 1e-6, "bytes_per_s": 1e11}
    machine = {"inside": link, "between": link, "read_bytes_per_s": 4e12, "memory_bytes": 1.4e11}
    machine |= {"layer_s": 1e-5, "round_bytes": 64, "transport": "collective", "shared": False}
    yield _of_one("machine", "machine.yaml", json.dumps(machine, indent=1).encode(), load_machine)
    train = (ROOT / "configs" / "gpt-moe-tiny.yaml").read_bytes()
    yield _of_one("training", "train.yaml", train, load_train_config)


def _of_one(name: str, file: str, content: bytes, read: Callable[[Path], object]) -> Target:
    return Target(name, {file: content}, (file,), lambda folder: read(folder / file))


OWN = {
    "vocab_size": SMALLEST_VOCABULARY,
    "max_positions": 64,
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 8,
    "num_experts": 4,
}
THEIRS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "mlp_only_layers": [1],
    "sliding_window": 8,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "eos_token_id": [1, 2],
}


def _configurations() -> Iterator[Target]:
    own = ModelConfig.model_validate(OWN | {"rope": {"theta": 100.0}, "windows": [4, None]}).model_dump()
    for name, value in (("own", own), *((family, THEIRS | {"model_type": family}) for family in FAMILIES)):
        content = json.dumps(value).encode()
        yield Target(f"config {name}", {"config.json": content}, ("config.json",), load_model_config)


def _checkpoints() -> Iterator[Target]:
    """Weights of our own and of each family's layout, whole and in shards; what is beside them."""
    decoder = Decoder(ModelConfig.model_validate(OWN))
    state = {name: torch.zeros_like(value) for name, value in decoder.state_dict().items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        tokenizer = train_tokenizer([], SMALLEST_VOCABULARY)
        save_checkpoint(folder, decoder.config, state, tokenizer, torch.float32, 20_000)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    read = partial(load_decoder, device=torch.device("cpu"), dtype=torch.float32)
    shards = tuple(name for name in files if name.endswith(".safetensors"))
    yield Target("weights own", files, (*shards, "config.json"), read)
    yield Target("weights index", files, ("model.safetensors.index.json",), read)
    for family in FAMILIES:
        config = json.dumps(THEIRS | {"model_type": family}).encode()
        theirs = {"config.json": config, "model.safetensors": save(_zeros(family, config))}
        yield Target(f"weights {family}", theirs, tuple(theirs), read)
    yield Target("tokenizer", files, ("tokenizer.json",), load_tokenizer)
    named = files | {"config.json": config, "generation_config.json": b'{"eos_token_id": [1, 2]}'}
    beside = ("generation_config.json", "config.json")
    yield Target("end tokens", named, beside, lambda folder: end_tokens(folder, tokenizer))


def _zeros(family: str, config: bytes) -> dict[str, Any]:
    """The tensors that a family's layout wants."""
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch, "config.json").write_bytes(config)
        layout = FAMILIES[family].layout(load_model_config(Path(scratch)), frozenset())
    parts = [part for pieces in layout.values() for piece in pieces for part in piece.parts]
    return {part.name: np.zeros(part.shape, np.float32) for part in parts}


def _imports() -> Iterator[Target]:
    golden = ROOT / "tests" / "profiling" / "golden"
    ids = np.array([[[0, 3], [2, 1]], [[1, 0], [3, 2]]], np.uint8)
    packed = io.BytesIO()
    np.savez_compressed(packed, experts=ids, seq=np.array([0, 1]), pos=np.array([0, 0]), num_experts=8)
    files = {
        "sglang": ("sglang", golden / "expert_distribution_recorder_2_1.pt"),
        "npz": ("npz", None),
        "npy": ("npy", golden / "routed_experts.npy"),
        "trtllm": ("trtllm", golden / "trtllm" / "rank0_raw.safetensors"),
        "megatron": ("megatron", golden / "router_trace_rank0.jsonl"),
        "responses vllm": ("responses", golden / "vllm.json"),
        "responses sglang": ("responses", golden / "sglang.json"),
    }
    for label, (format, path) in files.items():
        known = {"data": packed.getvalue() if path is None else path.read_bytes()}
        if format == "trtllm":
            known["meta_info.json"] = (golden / "trtllm" / "meta_info.json").read_bytes()
        yield Target(f"import {label}", known, tuple(known), partial(_imported, format))


def _imported(format: str, folder: Path) -> None:
    hints = Hints(num_experts=8, hidden_layers=4, top_k=2)
    import_trace([folder / "data"], folder / "out", format, hints, lambda done, total: None)


def _placements() -> Iterator[Target]:
    golden = ROOT / "tests" / "placement" / "golden"
    sidecar = (golden / "sidecar.meta.json").read_bytes()
    for path in sorted(golden.iterdir()):
        if path.name != "sidecar.meta.json":
            known = {"data": path.read_bytes(), "data.meta.json": sidecar}
            yield Target(f"placement {path.stem}", known, ("data",), partial(_placement, path.stem))
    yield Target("placement sidecar", known, ("data.meta.json",), partial(_placement, path.stem))


def _placement(format: str, folder: Path) -> Plan:
    return read_plan(folder / "data", format)


def _loads() -> Iterator[Target]:
    table = [[1, 2, 3, 4], [4, 3, 2, 1]]
    yield _of_one("loads JSON", "loads", json.dumps({"logical_count": table}).encode(), read_loads)
    archive = io.BytesIO()
    torch.save({"logical_count": torch.tensor([table])}, archive)
    yield _of_one("loads torch", "loads", archive.getvalue(), read_loads)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each reader")
    parser.add_argument("--inputs", type=int, help="for each reader (1000, without --seconds)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="the readers whose names begin so")
    parser.add_argument("--plain", action="store_true", help="without atheris, even where it is installed")
    parser.add_argument("--cores", type=int, default=1, help="that share the inputs; more than one is plain")
    parser.add_argument("--json", type=Path, help="file for the figures, written after each reader")
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"), help="folder for what crashes")
    given = parser.parse_args()
    inputs = given.inputs or (1000 if given.seconds == float("inf") else sys.maxsize)
    chosen = [target for target in targets() if target.name.startswith(tuple(given.only))]
    by_coverage = not given.plain and given.cores == 1 and instrument()
    how = "atheris, guided by coverage" if by_coverage else "plain mutation, not guided by coverage"
    print(f"{how}; seed {given.seed}\n{'reader':24} {'inputs':>8} {'crashes':>8} {'per s':>8}", flush=True)
    figures: dict[str, dict[str, float]] = {}
    gc.freeze()  # children are forked, and collecting what they share with this process would copy it
    for target in chosen:
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fuzz-", dir=MEMORY if MEMORY.is_dir() else None) as name:
            if by_coverage:
                result = guided(target, Path(name), given.crashes, given.seed, inputs, given.seconds)
            else:
                result = fuzz_in_lanes(target, Path(name), given.seed, inputs, given.seconds, given.cores)
                keep(target, given.seed, result, given.crashes)
        seconds = time.monotonic() - start
        crashes = sum(map(len, result.crashes.values()))
        figures[target.name] = {"inputs": result.tried, "crashes": crashes, "seconds": round(seconds, 1)}
        show(target, result, seconds)
        if given.json:
            run = {"how": how, "seed": given.seed, "cores": given.cores, "python": platform.python_version()}
            given.json.write_text(json.dumps(run | {"readers": figures}, indent=1) + "\n")
    return int(any(each["crashes"] for each in figures.values()))


def show(target: Target, result: Result, seconds: float) -> None:
    crashes, rate = sum(map(len, result.crashes.values())), result.tried / seconds
    print(f"{target.name:24} {result.tried:8} {crashes:8} {rate:8.0f}", flush=True)
    for crash, numbers in result.crashes.items():
        print(f"    {len(numbers)} times, first input {numbers[0]}: {crash}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

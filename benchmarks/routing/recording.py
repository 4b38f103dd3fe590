"""Measures the cost of recording: one run with and without `exflow.record`, in turns, and the ratio.

    python -m benchmarks.routing.recording [--model FOLDER] [--device cuda] [--repeats 15] [-o FILE.json]

`--model hf:FOLDER` takes a Hugging Face model. Two loads: `profile` (whole sequences, 8,192 tokens a pass)
and `decode` (a batch, one token a pass). Each repeat times both ways back to back, in alternating order.
Reported are the ratio of the fastest runs (what remains on a machine that does other work too) and the median
of the repeats' ratios with its quartiles.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from exflow.commands import hugging_face
from exflow.model.attention import CausalAttention, rows_of_batch
from exflow.model.single_process import AllExpertsHere
from exflow.profiling.record import record
from exflow.runtime.deploy import load_model
from exflow.runtime.engine import Engine
from exflow.runtime.request import Request


def profile_load(engine: Engine) -> Callable[[], None]:
    tokens = torch.randint(engine.decoder.config.vocab_size, (32, 256), device=engine.device)
    rows = rows_of_batch(32, 256, engine.device)
    passes = 24 if engine.device.type == "cuda" else 2  # about a second

    @torch.inference_mode()
    def run() -> None:
        for _ in range(passes):
            engine.decoder(tokens.flatten(), rows, CausalAttention(32), AllExpertsHere())

    return run


def decode_load(engine: Engine) -> Callable[[], None]:
    prompts = torch.randint(engine.decoder.config.vocab_size, (32, 16)).tolist()

    def run() -> None:
        engine.generate(Request(prompts, max_new_tokens=32))

    return run


def hugging_face_profile_load(model: Any) -> Callable[[], None]:
    tokens = torch.randint(model.get_input_embeddings().num_embeddings, (32, 256), device=model.device)

    @torch.inference_mode()
    def run() -> None:
        for _ in range(24 if model.device.type == "cuda" else 2):
            model.base_model(input_ids=tokens, use_cache=False)

    return run


def hugging_face_decode_load(model: Any) -> Callable[[], None]:
    prompts = torch.randint(3, model.get_input_embeddings().num_embeddings, (32, 16), device=model.device)
    mask = torch.ones_like(prompts)

    def run() -> None:
        model.generate(
            input_ids=prompts, attention_mask=mask, max_new_tokens=32, min_new_tokens=32, do_sample=False
        )

    return run


Load = Callable[[Any], Callable[[], None]]


def load_subject(name: str, device: str) -> tuple[Any, dict[str, Load]]:
    """The model to record, and its two loads."""
    if name.startswith(hugging_face.PREFIX):
        folder = Path(name.removeprefix(hugging_face.PREFIX))
        model = hugging_face.load_model(folder, hugging_face.load_config(folder), torch.device(device))
        return model, {"profile": hugging_face_profile_load, "decode": hugging_face_decode_load}
    return load_model(name, device), {"profile": profile_load, "decode": decode_load}


def seconds(subject: Any, run: Callable[[], None], path: Path | None) -> float:
    """Time of `run`, recorded to `path` or not at all; opening and closing the trace are part of it."""
    start = time.perf_counter()
    with nullcontext() if path is None else record(subject, path):
        run()
        if subject.device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(subject: Any, run: Callable[[], None], repeats: int, folder: Path) -> dict[str, Any]:
    seconds(subject, run, None)
    seconds(subject, run, folder / "warm-up")
    plain, recorded = [], []
    for repeat in range(repeats):
        order = [None, folder / f"{id(run)}-{repeat}"]
        timed = {path is None: seconds(subject, run, path) for path in (order if repeat % 2 else order[::-1])}
        plain.append(timed[True])
        recorded.append(timed[False])
    ratios = [slow / fast for slow, fast in zip(recorded, plain, strict=True)]
    return {
        "seconds_without": min(plain),
        "ratio_of_fastest": min(recorded) / min(plain),
        "ratio_quartiles": statistics.quantiles(ratios, n=4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="models/gpt-moe-demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    subject, loads = load_subject(arguments.model, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        results = {
            name: compare(subject, load(subject), arguments.repeats, Path(folder))
            for name, load in loads.items()
        }
    for name, result in results.items():
        low, middle, high = result["ratio_quartiles"]
        print(
            f"{name:8} {result['seconds_without']:.3f} s without recording; with it x "
            f"{result['ratio_of_fastest']:.4f} (fastest runs), x {middle:.4f} (median; quartiles "
            f"{low:.4f} to {high:.4f})"
        )
    if arguments.output:
        record_of_run = {**setting(arguments.device), "results": results}
        arguments.output.write_text(json.dumps(record_of_run, indent=1) + "\n")


def setting(device: str) -> dict[str, Any]:
    """The date, hardware, versions and command that the figures depend on."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "torch": torch.__version__,
        "transformers": version("transformers") if find_spec("transformers") else None,
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
    }


if __name__ == "__main__":
    main()

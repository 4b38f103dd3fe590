"""`exflow demo`: profiles, places and generates with the shipped model, and compares variants' traffic.

This process profiles and places; four ranks then run every variant in one job (demo_rank.py).
"""

import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer

from exflow.commands.demo_rank import PROMPTS, demo_request, run_demo_rank
from exflow.commands.profile import profile, windows_of_text
from exflow.errors import InputError
from exflow.files import read_json
from exflow.job.launch import run_ranks
from exflow.model.checkpoint import Checkpoint
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.deploy import load_model
from exflow.runtime.engine import Engine
from exflow.texts import find_texts, read_text

SHIPPED = Path("models/gpt-moe-demo")
RANKS = 4
PROFILED_TOKENS = 16384


def shipped_model() -> Path:
    """The checkpoint in the repository that the demo is run from."""
    for root in (Path.cwd(), Path(__file__).resolve().parent.parent):
        if (root / SHIPPED / "config.json").is_file():
            return root / SHIPPED
    raise InputError(f"{SHIPPED}: no such checkpoint here; run it in the repository, or give --model")


def demo(model: Path, texts: list[str], report: Callable[[str], None]) -> dict[str, Any]:
    """Run the whole pipeline. Returns the result that `exflow demo --json` prints.

    texts: files or folders to profile; empty means the language reference that Python ships, on which the
    model was not trained. report: receives progress messages. Raises InputError, RankDied, or RuntimeError
    if variants disagree.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="exflow-demo-"))
    except OSError as error:
        raise InputError(
            "no temporary folder can be written; make room there, or name another in TMPDIR"
        ) from error
    try:
        report(f"profiling {PROFILED_TOKENS:,} tokens of text")
        checkpoint = Checkpoint.open(model)
        engine, tokenizer = load_model(checkpoint), checkpoint.tokenizer()
        trace = _profile(tokenizer, engine, texts)
        report(f"placing {trace.num_experts} experts x {trace.num_layers} layers on {RANKS} ranks")
        for method, name in (("contiguous", "contiguous"), ("auto", "affinity")):
            place(trace, Topology(gpus_per_node=RANKS), solving=Solving(method)).save(folder / f"{name}.json")
        report("generating in one process")
        alone = engine.generate(demo_request(checkpoint))
        report(f"generating on {RANKS} ranks, every strategy, contiguous and affinity placement")
        run_ranks(partial(run_demo_rank, model, folder), RANKS)
        result = read_json(folder / "result.json", "result", "run the demo again")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tokens = [alone.tokens, *result.pop("tokens")]
    completions = tokenizer.decode_batch(alone.tokens)
    same = all(each == tokens[0] for each in tokens)
    return {
        "same_tokens": same,
        **result,
        "summary": summary(result["variants"], trace.top_k),
        "text": [prompt + text for prompt, text in zip(PROMPTS, completions, strict=True)],
        "verdict": _verdict(same, len(tokens)),
    }


def summary(variants: list[dict[str, Any]], top_k: int) -> str:
    """Sentences about the effect of coherence alone, and of placement alone."""
    of = {(variant["strategy"], variant["placement"]): variant for variant in variants}
    home, stay = of["dispatch-combine", "contiguous"], of["coherent", "contiguous"]
    home_placed, stay_placed = of["dispatch-combine", "affinity"], of["coherent", "affinity"]
    lines = [
        f"Coherence alone: {_change(home, stay)} messages, and {stay['all_to_alls_per_step']:g} all-to-alls "
        f"a step instead of {home['all_to_alls_per_step']:g}.",
        f"Placement alone: {_change(stay, stay_placed)} messages with coherent, "
        f"{_change(home, home_placed)} with dispatch-combine.",
    ]
    if top_k == 1:
        lines.append(
            "This model is top-1 and dispatch-combine brings every token home, so affinity cannot help it."
        )
    return "\n".join(lines)


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Change of the number of messages, as `20% fewer`."""
    ratio = after["messages_per_token_layer"] / before["messages_per_token_layer"] - 1
    return f"{abs(ratio):.0%} {'more' if ratio > 0 else 'fewer'}"


def _verdict(same: bool, runs: int) -> str:
    if same:
        return f"checked: all {runs} runs, one in a single process among them, produced the same tokens"
    return "DIFFERENT TOKENS: the variants disagree. This is a bug; please report it"


def _profile(tokenizer: Tokenizer, engine: Engine, texts: list[str]) -> RoutingTrace:
    files = [read_text(file) for file in find_texts(texts)] if texts else list(topics.values())
    windows = windows_of_text(tokenizer, files, length=256, max_tokens=PROFILED_TOKENS)
    return profile(engine.decoder, windows, path=None)

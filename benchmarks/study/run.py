"""The ExFlow paper's study, again: when affinity appears, and how far it carries.

    python -m benchmarks.study.run --texts DIR --traces DIR [--only QUESTION]... [-o docs/study]

Five questions, each answered by a table, a drawing (QUESTION.svg) and its data (QUESTION.json):

    training   affinity, routing entropy and load balance of the demo model while it was trained
    transfer   a plan from one kind of text, judged on another
    tokens     the plan's quality on held-out sequences against the number of profiled tokens
    distance   what an expert says about one two, three, ... layers later
    adjacent   mutual information of adjacent layers, beside a shuffled control

DIR of --texts holds the texts named in data.py, DIR of --traces recorded routing as .npz; a model whose
folder is not given is left out, and its reason written down. --training takes other traces of a model in
training, one step-NNNNNN a checkpoint (exflow profile RUN/step-000050 --text TEXT -o DIR/step-000050). --draw
runs nothing, but writes tables and drawings again from the data.

The tables go into README.md of the output folder, between the comments that name them.
"""

import argparse
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.routing.machine import cpu_model
from benchmarks.study import adjacent as study_adjacent
from benchmarks.study import distance as study_distance
from benchmarks.study import tokens as study_tokens
from benchmarks.study import training as study_training
from benchmarks.study import transfer as study_transfer
from benchmarks.study.data import (
    DEMO,
    EARLY,
    FINAL,
    RECORDED,
    Checkpoint,
    Subject,
    checkpoints,
    demo_model,
    recorded_model,
)
from exflow.errors import InputError
from exflow.files import atomic_path, read_json, write_json
from exflow.placement.make_plan import Solving

PAGE = "README.md"
PACKAGES = ("exflow", "numpy", "numba", "scipy", "torch")


@dataclass(frozen=True, eq=False)
class Given:
    """The subjects to look at, and the reason for each that is left out."""

    models: list[Subject]
    training: list[Checkpoint]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Question:
    """A question: the function that answers it, and its rows shown as Markdown and as the content of an SVG
    file."""

    row: type
    measure: Callable[[Given], list[Any]]
    table: Callable[[list[Any]], str]
    figure: Callable[[list[Any]], str]


def say(what: str) -> None:
    print(f"study: {what}", file=sys.stderr, flush=True)


def of_each_model(measure: Callable[[Subject], list[Any]]) -> Callable[[Given], list[Any]]:
    return lambda given: [row for model in given.models for row in measure(model)]


QUESTIONS = {
    "training": Question(
        study_training.Step,
        lambda given: study_training.measure(given.training, say),
        study_training.table,
        study_training.figure,
    ),
    "transfer": Question(
        study_transfer.Transfer,
        of_each_model(lambda model: study_transfer.measure(model, Solving(), say)),
        study_transfer.table,
        study_transfer.figure,
    ),
    "tokens": Question(
        study_tokens.Profiled,
        of_each_model(lambda model: study_tokens.measure(model, Solving(), say)),
        study_tokens.table,
        study_tokens.figure,
    ),
    "distance": Question(
        study_distance.Distance,
        of_each_model(lambda model: study_distance.measure(model, say)),
        study_distance.table,
        study_distance.figure,
    ),
    "adjacent": Question(
        study_adjacent.Adjacent,
        of_each_model(lambda model: study_adjacent.measure(model, say)),
        study_adjacent.table,
        study_adjacent.figure,
    ),
}
OF_MODELS = QUESTIONS.keys() - {"training"}


def look(texts: Path | None, traces: Path | None, training: Path) -> Given:
    """Read, and profile the demo model. Raises InputError where a folder that is given lacks a file."""
    models, left_out = [], {}
    if texts is None:
        left_out[DEMO.name] = "needs texts; give --texts DIR"
    else:
        say(f"profiling {DEMO.name}")
        models.append(demo_model(texts))
    for name in RECORDED:
        if traces is None:
            left_out[name] = "needs recorded traces; give --traces DIR"
        else:
            models.append(recorded_model(name, traces))
    steps = checkpoints(training)
    if texts is not None:
        steps.append(Checkpoint(FINAL, models[0].trace))
    return Given(models, steps, left_out)


def answer(name: str, given: Given, folder: Path) -> None:
    """Measure, and write the question's data, drawing and table."""
    question, began, cpu_began = QUESTIONS[name], time.perf_counter(), time.process_time()
    rows = question.measure(given)
    if not rows:
        say(f"{name}: skipped: {'; '.join(f'{model} {why}' for model, why in given.left_out.items())}")
        return
    document = {
        "question": name,
        **setting(),
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(
            time.process_time() - cpu_began, 1
        ),  # of all threads: others may use the machine
        "left_out": given.left_out if name in OF_MODELS else {},
        "rows": [asdict(row) for row in rows],
    }
    write_json(folder / f"{name}.json", document)
    show(name, document, folder)


def show(name: str, document: dict[str, Any], folder: Path) -> None:
    """Write the drawing, and put the table into the page."""
    _write(folder / f"{name}.svg", QUESTIONS[name].figure(rows_of(name, document)))
    page = folder / PAGE
    before = page.read_text(encoding="utf-8") if page.exists() else ""
    _write(page, with_block(before, name, block(name, document)))


def rows_of(name: str, document: dict[str, Any]) -> list[Any]:
    return [QUESTIONS[name].row(**row) for row in document["rows"]]


def block(name: str, document: dict[str, Any]) -> str:
    """The table, and how it came about."""
    made = (
        f"`{document['command']}`, {document['date']}, {document['cores']} cores ({document['cpu']}), "
        f"Python {document['python']}: {document['seconds']:.0f} s, {document['cpu_seconds']:.0f} s of CPU. "
        f"Data: [{name}.json]({name}.json)."
    )
    left_out = [f"{model} is left out: {why}." for model, why in document["left_out"].items()]
    return f"{QUESTIONS[name].table(rows_of(name, document))}\n{' '.join([made, *left_out])}\n"


def with_block(page: str, name: str, content: str) -> str:
    """The page with the content between the comments that name it; at its end where it has none."""
    new = f"<!-- {name} -->\n{content}<!-- end of {name} -->"
    found = re.compile(f"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)
    return found.sub(lambda _: new, page) if found.search(page) else f"{page}{new}\n"


def setting() -> dict[str, Any]:
    """The date, hardware, versions and command that the figures depend on."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _write(path: Path, content: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=Path, metavar="DIR", help="texts for the demo model")
    parser.add_argument("--traces", type=Path, metavar="DIR", help="recorded traces (.npz)")
    parser.add_argument("--training", type=Path, metavar="DIR", default=EARLY, help="traces step-NNNNNN")
    parser.add_argument("--only", action="append", choices=QUESTIONS, help="this question; repeatable")
    parser.add_argument("--draw", action="store_true", help="again from the data in the output folder")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", default=Path("docs/study"))
    return parser.parse_args(given)


def run(chosen: argparse.Namespace) -> None:
    names = chosen.only or list(QUESTIONS)
    if chosen.draw:
        for name in names:
            path = chosen.output / f"{name}.json"
            show(name, read_json(path, "answer", "run the study without --draw"), chosen.output)
        return
    began = time.perf_counter()
    given = look(chosen.texts, chosen.traces, chosen.training)
    for name in names:
        say(f"{name} (after {time.perf_counter() - began:.0f} s)")
        answer(name, given, chosen.output)
    say(f"done after {time.perf_counter() - began:.0f} s")


def main(given: Sequence[str] | None = None) -> int:
    try:
        run(arguments(given))
    except InputError as error:
        say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

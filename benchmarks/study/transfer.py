"""Judges each domain's plan on every domain: does a plan made from one kind of text serve another?

Sequences are dealt into FOLDS parts. Each part is judged by plans that were made without it, so all of a
domain's sequences count, and none by a plan that has seen it.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.routing.recorded import numbered
from benchmarks.study.data import Subject, folds, without
from benchmarks.study.figures import Matrix, markdown, matrices, span
from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.confidence import Bounds, ratio
from exflow.placement.traffic.traffic import follow
from exflow.profiling.merge import merge, of_sequences
from exflow.profiling.trace import RoutingTrace

FOLDS = 4
MIXED, CONTIGUOUS = "mixed", "contiguous"

Numbers = npt.NDArray[np.int64]
Traces = dict[str, RoutingTrace]


@dataclass(frozen=True)
class Transfer:
    """A plan and the domain that it was judged on: messages of coherent decoding, per token and layer.

    plan_from  a domain; MIXED, equal parts of all domains and no more tokens; or CONTIGUOUS, made from none
    tokens     of the judged domain; `sequences` hold them
    to_own     messages over those of the plan from the judged domain itself
    """

    model: str
    plan_from: str
    judged_on: str
    tokens: int
    sequences: int
    messages: Bounds
    to_own: Bounds


def measure(subject: Subject, solving: Solving, tell: Callable[[str], None]) -> list[Transfer]:
    """Every pair of the subject's domains. All plans of a part are made from equally many tokens."""
    domains = {name: numbered(trace) for name, trace in subject.domains.items()}
    parts: dict[tuple[str, str], list[Numbers]] = defaultdict(list)  # messages by sequence
    for number in range(FOLDS):
        tell(f"{subject.name}: part {number + 1} of {FOLDS}")
        dealt = {name: folds(trace, FOLDS)[number] for name, trace in domains.items()}
        train = {name: without(trace, dealt[name]) for name, trace in domains.items()}
        plans = plans_from(train, subject.topology, solving)
        for name, trace in domains.items():
            for source, plan in plans.items():
                parts[source, name].append(_sent(plan, of_sequences(trace, dealt[name])))
    sent = {pair: np.concatenate(of_parts) for pair, of_parts in parts.items()}
    layers, found = subject.trace.num_layers, []
    for (source, name), messages in sent.items():
        sizes = np.bincount(domains[name].sequence)[np.concatenate(folds(domains[name], FOLDS))]
        each, own = ratio(messages, sizes * layers), ratio(messages, sent[name, name])
        found.append(Transfer(subject.name, source, name, int(sizes.sum()), len(sizes), each, own))
    return found


def plans_from(train: Traces, topology: Topology, solving: Solving) -> dict[str, Plan]:
    """A plan from each domain; one from MIXED, equally many tokens of all of them together; and the
    contiguous one."""
    tokens = min(trace.num_tokens for trace in train.values())
    alike = {name: some_tokens(trace, tokens) for name, trace in train.items()}
    mixed = merge([some_tokens(trace, tokens // len(train)) for trace in train.values()])
    plans = {name: place(trace, topology, solving=solving) for name, trace in alike.items()}
    plans[MIXED] = place(mixed, topology, solving=solving)
    plans[CONTIGUOUS] = place(mixed, topology, solving=Solving(CONTIGUOUS))
    return plans


def some_tokens(trace: RoutingTrace, count: int) -> RoutingTrace:
    """`count` rows: whole sequences in random order, and the beginning of one more."""
    turn = np.random.default_rng(0).permutation(len(np.unique(trace.sequence)))
    rows = np.argsort(turn[trace.sequence], kind="stable")[:count]
    return numbered(trace.select(np.sort(rows)))


def table(rows: list[Transfer]) -> str:
    """A matrix a model: the messages beside those of the judged domain's own plan."""
    blocks = []
    for model, of_model in _by_model(rows).items():
        cell = {(each.plan_from, each.judged_on): each for each in of_model}
        names = list(dict.fromkeys(each.judged_on for each in of_model))
        sources = list(dict.fromkeys(each.plan_from for each in of_model))
        lines = [[source, *(span(cell[source, name].to_own) for name in names)] for source in sources]
        lines.append(["*own plan, messages*", *(span(cell[name, name].messages) for name in names)])
        lines.append(["*tokens, sequences*", *(_size(cell[name, name]) for name in names)])
        blocks.append(markdown([f"{model}: plan from", *(f"on {name}" for name in names)], lines))
    return "\n".join(blocks)


def figure(rows: list[Transfer]) -> str:
    shown = []
    for model, of_model in _by_model(rows).items():
        names = list(dict.fromkeys(each.judged_on for each in of_model))
        values = {(each.plan_from, each.judged_on): each.to_own["value"] for each in of_model}
        sources = [*names, MIXED]
        matrix = np.array([[values[source, name] for name in names] for source in sources])
        shown.append(Matrix(model, sources, names, matrix))
    return matrices("Messages of a plan from one domain on another", "plan from", "judged on", "x own", shown)


def _sent(plan: Plan, trace: RoutingTrace) -> Numbers:
    """[N] messages by sequence."""
    return np.asarray(follow(trace, plan, plan.group_size).messages.sum(axis=(1, 2)))


def _by_model(rows: list[Transfer]) -> dict[str, list[Transfer]]:
    models: dict[str, list[Transfer]] = defaultdict(list)
    for each in rows:
        models[each.model].append(each)
    return models


def _size(each: Transfer) -> str:
    return f"{each.tokens:,}, {each.sequences}"

"""Jobs of 2, 4 and 8 ranks against one process: the same tokens, logits, routing, and the traffic predicted.

One job a number of ranks runs all its cases (rank_job.py); the tests look at what the ranks wrote.
"""

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from exflow.placement.plan.plan import Plan
from exflow.placement.traffic.evaluate import exchanges_per_step
from exflow.placement.traffic.traffic import count_traffic, rank_load
from exflow.profiling.trace import DECODE, PREFILL
from tests.runtime.distributed_cases import (
    CASES,
    MIXED,
    MORE_CASES,
    NEW,
    PLAIN,
    PROMPTS,
    REPLICAS,
    SAMPLED,
    Bench,
    Case,
    trace_to_replay,
)
from tests.runtime.job_files import Job, damaged_cases, read_job, stored

pytestmark = pytest.mark.distributed


def each_case(request: str = "", placement: str = "") -> pytest.MarkDecorator:
    """Parametrise a test with all cases, or with those of a kind of request or placement."""
    marked = [pytest.param(case, marks=[pytest.mark.all, pytest.mark.slow]) for case in MORE_CASES]
    chosen = [
        param
        for param, case in zip([*CASES, *marked], [*CASES, *MORE_CASES], strict=True)
        if case.request.startswith(request) and case.placement.startswith(placement)
    ]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


every_case = each_case()
RunCases = Callable[[list[Case], bool], dict[int, "Job"]]


@pytest.fixture(scope="module")
def run_cases(
    bench: Bench,
    byte_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    run_jobs: Callable[[str, dict[Path, int]], None],
) -> RunCases:
    """run_cases(cases, with_damage): a job for each number of ranks; its first case runs again at the end."""

    def run(cases: list[Case], with_damage: bool) -> dict[int, Job]:
        folders = {ranks: tmp_path_factory.mktemp("job") for ranks in sorted({case.ranks for case in cases})}
        for ranks, folder in folders.items():
            listed = [stored(case, bench) for case in cases if case.ranks == ranks]
            if with_damage and ranks == 4:
                listed += damaged_cases(bench, folder, byte_tokenizer)
            again = listed[0] | {"name": f"{listed[0]['name']}-again"}
            (folder / "cases.json").write_text(json.dumps([*listed, again]))
        run_jobs("rank_job", {folder: ranks for ranks, folder in folders.items()})
        return {ranks: read_job(folder, ranks) for ranks, folder in folders.items()}

    return run


@pytest.fixture(scope="module")
def jobs(run_cases: RunCases) -> dict[int, Job]:
    """The job of each number of ranks."""
    return run_cases(CASES, True)


@pytest.fixture(scope="module")
def more_jobs(run_cases: RunCases) -> dict[int, Job]:
    return run_cases(MORE_CASES, False)


@pytest.fixture
def job(case: Case, request: pytest.FixtureRequest) -> Job:
    """The job that has run the case."""
    found: Job = request.getfixturevalue("jobs" if case in CASES else "more_jobs")[case.ranks]
    return found


def test_the_cases_are_what_they_claim_to_be(bench: Bench) -> None:
    def lengths(model: str, name: str) -> list[int]:
        return [len(tokens) for tokens in bench.run(model, bench.requests(model, name)).generation.tokens]

    for model in ("top1", "top2"):
        ended = lengths(model, "some-end")
        assert ended[0] == ended[2] == ended[4] < NEW and ended[1] == ended[3] == NEW
        assert lengths(model, "all-end") == [3]
        assert lengths(model, "end-at-once") == [1]
        greedy, sampled = (bench.run(model, [each]).generation.tokens for each in (MIXED, SAMPLED))
        assert all(one != other for one, other in zip(greedy, sampled, strict=True))


@each_case(placement="replicas")
def test_the_replicas_are_what_they_claim_to_be(case: Case, bench: Bench) -> None:
    """Experts on several ranks in every layer, experts twice on a rank, and one in three slots."""
    plan = Plan.load(bench.plan(case))
    ranks_of = plan.hosts.sum(axis=2)
    slots_of = np.stack([np.bincount(row) for row in plan.physical_to_logical_map])
    assert (ranks_of > 1).any(axis=1).all()
    assert (ranks_of < slots_of).any()
    assert slots_of.max() > 2


@every_case
def test_a_job_generates_what_one_process_does(case: Case, bench: Bench, job: Job) -> None:
    reference = bench.reference(case)
    for rank, seen in enumerate(job.of(case)):
        assert seen["generation"]["tokens"] == reference.generation.tokens, rank
        assert seen["generation"]["steps"] == reference.generation.steps, rank

    chosen_on: dict[tuple[int, int], list[int]] = {}
    for rank, (places, logits) in enumerate(job.logits(case)):
        for (sequence, position), row in zip(places.tolist(), logits, strict=True):
            torch.testing.assert_close(
                torch.from_numpy(row), reference.logits[sequence, position], atol=1e-4, rtol=0
            )
            chosen_on.setdefault((sequence, position), []).append(rank)
    assert chosen_on.keys() == reference.logits.keys()
    choosers = case.ranks if case.strategy == "replicated" else 1
    assert {len(ranks) for ranks in chosen_on.values()} == {choosers}


@pytest.mark.parametrize("ranks", sorted({case.ranks for case in CASES}))
def test_a_job_does_the_same_again(ranks: int, jobs: dict[int, Job]) -> None:
    first = next(case for case in CASES if case.ranks == ranks).name
    for seen in jobs[ranks].seen:
        once, again = (without_times(seen[name]["generation"]) for name in (first, f"{first}-again"))
        assert once == again


@every_case
def test_the_merged_trace_is_that_of_one_process(case: Case, bench: Bench, job: Job) -> None:
    assert job.trace(case).digest() == bench.reference(case).trace.digest()


@each_case(request="replayed")
def test_a_replayed_trace_dictates_the_routing(case: Case, job: Job) -> None:
    dictated, recorded = trace_to_replay(), job.trace(case)
    rows_of = [np.flatnonzero(dictated.sequence == sequence) for sequence in (1, 3, 8)]
    rows = [
        rows_of[sequence % 3][position % len(rows_of[sequence % 3])]
        for sequence, position in zip(recorded.sequence, recorded.position, strict=True)
    ]
    assert np.array_equal(recorded.experts, dictated.experts[rows, :, : recorded.top_k])
    assert recorded.num_tokens == sum(len(prompt) + NEW - 1 for prompt in PROMPTS)


@every_case
def test_the_collectives_of_a_step(case: Case, bench: Bench, job: Job) -> None:
    """Compare with torch's calls: coherent top-1 is an all-to-all a MoE layer and a gather in either half."""
    config = bench.config_of(case.model)
    layers = len(config.moe_layer_ids)
    exchanges = exchanges_per_step(layers, config.top_k, case.group_size, case.ranks)
    step = ["all_reduce"] * layers if case.strategy == "replicated" else ["all_to_all"] * exchanges
    at_home = step if case.strategy == "replicated" else ["all_to_all"] * 2 * layers
    gathers = []
    if case.group_size > 1:
        middle = next(
            layer for layer in range(config.num_hidden_layers // 2, 9) if config.moe_layer_ids[0] < layer
        )
        before = sum(layer < middle for layer in config.moe_layer_ids)
        step.insert(before * exchanges // layers, "gather")
        gathers = ["gather"]
    for seen in job.of(case):
        prefill, *steps, rest = seen["collectives"]
        assert sorted(prefill) == sorted(at_home + gathers * config.num_hidden_layers)
        assert steps == [step + gathers] * seen["generation"]["steps"]
        assert rest == (step if case.request in ("all-end", "end-at-once") else [])
        for phase, collectives in (("prefill", prefill), ("decode", [*chain(*steps), *rest])):
            counted = seen["generation"][phase]
            assert counted["all_to_alls"] == collectives.count("all_to_all")
            assert counted["gathers"] == collectives.count("gather")
            assert counted["all_reduces"] == collectives.count("all_reduce")


@every_case
def test_the_counters_are_what_the_routing_foretells(case: Case, bench: Bench, job: Job) -> None:
    plan, trace, config = (
        Plan.load(bench.plan(case)),
        bench.reference(case).trace,
        bench.config_of(case.model),
    )
    (counted,) = {json.dumps(without_times(seen["generation"])) for seen in job.of(case)}
    for phase, name, messages_group in ((PREFILL, "prefill", 1), (DECODE, "decode", case.group_size)):
        counters, rows = json.loads(counted)[name], trace.select(trace.phase == phase)
        messages, copies = (
            count_traffic(rows, plan, messages_group),
            count_traffic(rows, plan, case.group_size),
        )
        predicted = {
            "dispatch_intra": messages.dispatch_intra,
            "dispatch_inter": messages.dispatch_inter,
            "return_intra": messages.return_intra,
            "return_inter": messages.return_inter,
            "kv_intra": copies.kv_intra,
            "kv_inter": copies.kv_inter,
            "hidden_bytes": messages.messages * config.hidden_size * 4,
            "kv_bytes": (copies.kv_intra + copies.kv_inter) * config.kv_width * 4,
        }
        if case.strategy == "replicated":
            predicted = dict.fromkeys(predicted, 0)
        assert {key: counters[key] for key in predicted} == predicted, name
        assert counters["wire_bytes"] >= counters["hidden_bytes"] + counters["kv_bytes"]


def without_times(generation: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in generation.items() if not key.endswith("_s")}


@each_case(request="second")
def test_the_keys_and_values_of_a_request_go_with_it(case: Case, job: Job) -> None:
    """Caches are freed when the next request begins at the latest, without a collection of cycles."""
    assert [seen["more_caches"] for seen in job.of(case)] == [0] * case.ranks


@every_case
def test_each_choice_is_computed_once_and_where_the_plan_says(case: Case, bench: Bench, job: Job) -> None:
    plan, trace = Plan.load(bench.plan(case)), bench.reference(case).trace
    prefill = rank_load(trace.select(trace.phase == PREFILL), plan, 1)
    decode = rank_load(trace.select(trace.phase == DECODE), plan, case.group_size)
    computed = np.array([seen["computed"] for seen in job.of(case)]).T
    assert computed.tolist() == (prefill + decode).tolist()
    assert (computed.sum(axis=1) == trace.num_tokens * trace.top_k).all()


@every_case
def test_the_rows_in_the_buffers_are_the_messages(case: Case, bench: Bench, job: Job) -> None:
    """Nothing but messages is sent, nothing to oneself, and a second exchange carries only the returns."""
    seen, config = job.of(case), bench.config_of(case.model)
    sent, late, size = (
        np.array([[chunk[what] for chunk in each["chunks"]] for each in seen], np.int64).reshape(
            case.ranks, -1, case.ranks
        )
        for what in ("numbers", "late_bytes", "bytes")
    )
    in_prefill = seen[0]["generation"]["prefill"]["all_to_alls"]
    same_node = np.arange(case.ranks)[:, None] // 2 == np.arange(case.ranks) // 2
    diagonal = np.arange(case.ranks)
    assert not size[diagonal, :, diagonal].any()
    for phase, part in (("prefill", slice(in_prefill)), ("decode", slice(in_prefill, None))):
        counters = seen[0]["generation"][phase]
        has_return = phase == "prefill" or not (case.model.startswith("top1") and case.strategy == "coherent")
        every = 2 if has_return else 1
        dispatched = sent[:, part][:, ::every]
        room = size[:, part][:, ::every] - 4 * (1 + 1 + case.ranks)  # after count, own tokens, next owners
        room[diagonal, :, diagonal] = 0
        row = 4 * config.hidden_size + 4 * config.top_k + 4 * (config.top_k + 3)
        assert not (room % row).any()
        assert (late[:, part][:, ::every] == row * np.maximum(dispatched - room // row, 0)).all()
        assert counters["late"] == (late[:, part] > 0).sum()
        returned = size[:, part][:, 1::2] // (4 * config.hidden_size + 8) if has_return else dispatched[:, :0]
        for purpose, rows in (("dispatch", dispatched), ("return", returned)):
            between = rows.sum(axis=1)
            assert counters[f"{purpose}_intra"] == between[same_node].sum(), (phase, purpose)
            assert counters[f"{purpose}_inter"] == between[~same_node].sum(), (phase, purpose)


@every_case
def test_the_bytes_on_the_wire_are_those_torch_was_given(case: Case, job: Job) -> None:
    seen = job.of(case)
    if case.strategy == "replicated":
        assert not any(sum(each["bytes_sent"]) for each in seen)
        return
    of_pass = np.array([each["bytes_sent"] for each in seen]).sum(axis=0)
    generation = seen[0]["generation"]
    assert generation["prefill"]["wire_bytes"] == of_pass[0]
    assert generation["decode"]["wire_bytes"] == of_pass[1:].sum()


@pytest.mark.parametrize(("case", "held"), [(PLAIN, 2), (REPLICAS, 3)])
def test_a_rank_reads_and_holds_its_own_experts_alone(case: Case, held: int, bench: Bench, job: Job) -> None:
    """Give each rank a checkpoint in which all experts that it does not host are NaN."""
    for seen in (each[f"{case.name}-own"] for each in job.seen):
        assert seen["generation"]["tokens"] == bench.reference(case).generation.tokens
        assert seen["experts_held"] == [held] * 4


def test_what_one_rank_finds_wrong_ends_all_of_them_alike(jobs: dict[int, Job]) -> None:
    (fault,) = {seen["one-damaged"]["fault"] for seen in jobs[4].seen}
    weights = jobs[4].folder / "one" / "model.safetensors"
    assert fault.startswith(f"{weights}: the weights 'blocks.2.mlp.experts.w_in' hold NaN")

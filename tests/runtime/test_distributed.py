"""Jobs of 2, 4 and 8 ranks against one process: the same tokens, logits, routing, and the traffic predicted.

One job a number of ranks runs all its cases (rank_job.py); the tests look at what the ranks wrote.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from exflow.commands.profile import profile
from exflow.errors import InputError, WrongResult
from exflow.job import liveness
from exflow.job.cluster import annotate_errors, join_cluster
from exflow.job.launch import LostContact, Place
from exflow.model.checkpoint import load_decoder, save_checkpoint
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Decoder, MoE, Rows
from exflow.model.random_weights import RandomWeights
from exflow.model.replay import ReplayedRouting
from exflow.model.sampling import Sampling
from exflow.placement.make_plan import place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Name
from exflow.placement.plan.topology import Topology
from exflow.placement.traffic.evaluate import exchanges_per_step
from exflow.placement.traffic.traffic import count_traffic, rank_load
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace
from exflow.runtime.deploy import Deployment, contiguous_plan, deploy, load_model
from exflow.runtime.request import Generation, Request
from exflow.runtime.trace_recorder import JobRecorder

pytestmark = pytest.mark.distributed

MODELS: dict[str, dict[str, Any]] = {
    "top1": {},
    "top2": {"top_k": 2},
    "top1-dense": {"moe_every": 2, "num_hidden_layers": 5},  # the last layer is dense
    "top2-dense": {"top_k": 2, "moe_every": 2},
    "top2-swiglu": {"top_k": 2, "head_dim": 24, "activation": "swiglu"},
}
FAMILIES = ("gpt_oss", "mixtral", "olmoe", "qwen3_moe")  # Hugging Face checkpoints, top-2
PROMPTS = [[65, 66, 67], [72, 69, 76, 76, 79, 32, 87, 79, 82, 76, 68], [42], [1, 2, 3, 4, 5, 6], [200] * 7]
NEW = 8
Made = TypeVar("Made")
MIXED = Request(PROMPTS, max_new_tokens=NEW)
SAMPLED = Request(PROMPTS, NEW, Sampling(temperature=0.8, top_p=0.9, seed=3))
MANY = Request(
    [[1 + (7 * row + at) % 250 for at in range(1 + row % 5)] for row in range(11)], max_new_tokens=6
)
LONE = Request(PROMPTS[1:2], max_new_tokens=NEW)
TRIPLE = Request([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[2], PROMPTS[0]], max_new_tokens=NEW)


@dataclass(frozen=True)
class Case:
    """One run of a job: ranks in nodes of 2, so that 4 ranks are two nodes."""

    ranks: int
    model: str
    strategy: str
    placement: str
    request: str

    @property
    def name(self) -> str:
        return f"{self.ranks}-{self.model}-{self.strategy}-{self.placement}-{self.request}"

    @property
    def group_size(self) -> int:
        return {"dispatch-combine": 1, "coherent": self.ranks, "node-coherent": 2, "replicated": 1}[
            self.strategy
        ]


def cases() -> list[Case]:
    """Every strategy with every kind of plan and request; of the models each where it makes a difference."""
    two = ("dispatch-combine", "coherent", "replicated")
    four = (*two, "node-coherent")
    grouped, apart = ("coherent", "node-coherent"), ("dispatch-combine", "replicated")
    each = [
        *product([2], ["top1"], two, ["affinity"], ["mixed", "some-end"]),
        *product([2], ["top2-dense"], two, ["random"], ["mixed"]),
        *product([2], ["top1", "top2-dense"], two, ["replicas"], ["mixed"]),
        *product([4], ["top1"], four, ["random"], ["mixed"]),
        *product([4], ["top2"], four, ["contiguous"], ["mixed"]),
        *product([4], ["top1"], grouped, ["contiguous"], ["mixed"]),
        *product([4], ["top2"], grouped, ["affinity"], ["mixed"]),
        *product([4], ["top1", "top2"], four, ["replicas"], ["mixed"]),
        *product([4], ["top1-dense"], four, ["affinity"], ["mixed"]),
        *product([4], ["top2-dense"], ["node-coherent"], ["affinity"], ["mixed"]),
        *product([4], ["top2-swiglu"], ["coherent"], ["random"], ["mixed"]),
        *product([4], ["top1"], four, ["affinity"], ["some-end", "all-end"]),
        *product([2], FAMILIES, two, ["random"], ["mixed"]),
        *product([4], FAMILIES, grouped, ["random"], ["mixed"]),
        *product([4], ["top2"], grouped, ["replicas"], ["some-end"]),
        *product([4], ["top1"], ["coherent", "replicated"], ["affinity"], ["end-at-once", "second"]),
        *product([4], ["top1"], ["dispatch-combine", "node-coherent"], ["affinity"], ["lone"]),
        *product([4], ["top1"], apart, ["affinity"], ["sampled"]),
        *product([4], ["top2"], grouped, ["affinity"], ["sampled"]),
        *product([4], ["top1"], ["coherent"], ["random"], ["replayed"]),
        *product([4], ["top2"], four, ["random"], ["replayed"]),
        *product([8], ["top2"], four, ["contiguous"], ["many"]),
        *product([8], ["top2"], ["coherent"], ["contiguous"], ["many-sampled"]),
    ]
    return [Case(*values) for values in each]


CASES = cases()
PLAIN = Case(4, "top1", "coherent", "random", "mixed")
REPLICAS = Case(4, "top2", "coherent", "replicas", "mixed")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@dataclass
class Reference:
    """What one process does."""

    generation: Generation
    trace: RoutingTrace
    logits: dict[tuple[int, int], Tensor]


@dataclass
class Bench:
    """The files of the tests, and what one process makes of them."""

    folder: Path
    checkpoint: Callable[..., Path]
    config: Callable[..., ModelConfig]
    decoder: Callable[..., Decoder]
    hugging_face: Callable[..., Any]
    made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def once(self, key: Any, make: Callable[[], Made]) -> Made:
        if key not in self.made:
            self.made[key] = make()
        made: Made = self.made[key]
        return made

    def model(self, name: str) -> Path:
        return self.once(("model", name), lambda: self._save(name))

    def _save(self, name: str) -> Path:
        if name in FAMILIES:
            return Path(self.hugging_face(name).folder)
        return self.checkpoint(self.config(**MODELS[name]))

    def config_of(self, name: str) -> ModelConfig:
        return load_model_config(self.model(name))

    def plan(self, case: Case) -> Path:
        path = self.folder / f"{case.model}-{case.ranks}-{case.placement}.json"
        self.once(path, lambda: self._place(case).save(path))
        return path

    def _place(self, case: Case) -> Plan:
        topology = Topology(num_nodes=case.ranks // 2, gpus_per_node=2)
        if case.placement == "contiguous":  # as where no plan is given: nothing is known of next owners
            return contiguous_plan(self.config_of(case.model), topology)
        trace = self.once(
            ("profiled", case.model),
            lambda: profiled(load_decoder(self.model(case.model), torch.device("cpu"), torch.float32)),
        )
        match case.placement:
            case "random":
                return random_plan(trace, topology, trace.num_experts)
            case "replicas":
                return random_plan(trace, topology, 12)
        return place(trace, topology)

    def requests(self, model: str, name: str) -> list[Request]:
        """The last one is looked at; those before it have run on the same engine."""
        match name:
            case "mixed" | "replayed":
                return [MIXED]
            case "sampled":
                return [SAMPLED]
            case "many":
                return [MANY]
            case "many-sampled":
                return [replace(MANY, sampling=Sampling(temperature=0.9, top_p=0.95, seed=5))]
            case "lone":
                return [LONE]
            case "second":
                return [Request(PROMPTS[:3], max_new_tokens=2), MIXED]
            case "some-end":  # the sequences 0, 2 and 4: of 4 ranks the homes 0 and 2 become empty
                return [replace(TRIPLE, end_tokens=(self.run(model, [TRIPLE]).generation.tokens[0][-1],))]
            case "all-end":
                return [replace(LONE, end_tokens=(self.run(model, [LONE]).generation.tokens[0][2],))]
            case "end-at-once":
                return [replace(LONE, end_tokens=(self.run(model, [LONE]).generation.tokens[0][0],))]
        raise AssertionError(name)

    def replay(self, case: Case) -> Path | None:
        """The trace that dictates the case's routing, if one does."""
        path = self.folder / "replayed.trace"
        self.once(path, lambda: trace_to_replay().save(path))
        return path if case.request == "replayed" else None

    def reference(self, case: Case) -> Reference:
        return self.run(case.model, self.requests(case.model, case.request), self.replay(case))

    def run(self, model: str, requests: list[Request], replay: Path | None = None) -> Reference:
        key = (model, str(requests), replay)
        return self.once(key, lambda: run_alone(self.model(model), requests, replay))


def trace_to_replay() -> RoutingTrace:
    """Three sequences, two of them shorter than what is generated, with one more choice than is needed."""
    rng = np.random.default_rng(4)
    sequence = np.repeat([3, 1, 8], [5, 30, 9])
    experts = rng.permuted(np.tile(np.arange(8), (len(sequence), 4, 1)), axis=2)[:, :, :3]
    return RoutingTrace.from_arrays(experts, num_experts=8, sequence=sequence)


def run_alone(model: Path, requests: list[Request], replay: Path | None) -> Reference:
    engine = load_model(model)
    if replay is not None:
        trace = RoutingTrace.load(replay)
        engine.decoder.replay = ReplayedRouting.of(trace, engine.decoder.config, torch.device("cpu"))
    for request in requests[:-1]:
        engine.generate(request)
    recorder = JobRecorder(engine)
    logits: dict[tuple[int, int], Tensor] = {}

    def observe(rows: Rows, logits_TV: Tensor) -> None:
        logits.update(zip(zip(rows.sequence_T.tolist(), rows.position_T.tolist()), logits_TV))  # noqa: B905

    generation = engine.generate(requests[-1], observe)
    return Reference(generation, recorder.trace(), logits)


def random_plan(trace: RoutingTrace, topology: Topology, num_slots: int) -> Plan:
    """In each layer every expert once, any of them in the slots that are left, all of them anywhere."""
    rng = np.random.default_rng(2)
    extra = num_slots - trace.num_experts
    slots = [
        rng.permutation([*range(trace.num_experts), *rng.integers(0, trace.num_experts, extra)])
        for _ in range(trace.num_layers)
    ]
    return Plan.of_slots(np.stack(slots), topology, trace, method="random")


def profiled(decoder: Decoder) -> RoutingTrace:
    windows_NS = torch.randint(257, (32, 64), generator=torch.Generator().manual_seed(5))
    return profile(decoder, windows_NS, path=None)


@dataclass
class Job:
    """What the ranks of a job wrote."""

    folder: Path
    seen: list[dict[str, Any]]
    arrays: list[Any]

    def of(self, case: Case) -> list[dict[str, Any]]:
        """What each rank saw of the case."""
        return [seen[case.name] for seen in self.seen]

    def trace(self, case: Case) -> RoutingTrace:
        return RoutingTrace.load(self.folder / f"{case.name}.trace")

    def logits(self, case: Case) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        return [(each[f"{case.name}/places"], each[f"{case.name}/logits"]) for each in self.arrays]


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Callable[..., Path],
    tiny_config: Callable[..., ModelConfig],
    tiny_decoder: Callable[..., Decoder],
    hugging_face_model: Callable[..., Any],
) -> Bench:
    folder = tmp_path_factory.mktemp("plans")
    return Bench(folder, tiny_checkpoint, tiny_config, tiny_decoder, hugging_face_model)


def stored(case: Case, bench: Bench) -> dict[str, Any]:
    return {
        "name": case.name,
        "models": [str(bench.model(case.model))],
        "plan": str(bench.plan(case)),
        "strategy": case.strategy,
        "ranks_per_node": 2,
        "requests": [asdict(each) for each in bench.requests(case.model, case.request)],
        "replay": None if (replay := bench.replay(case)) is None else str(replay),
    }


@pytest.fixture(scope="module")
def jobs(
    bench: Bench,
    byte_tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
    run_jobs: Callable[[str, dict[Path, int]], None],
) -> dict[int, Job]:
    """The job of each number of ranks."""
    folders = {ranks: tmp_path_factory.mktemp("job") for ranks in sorted({case.ranks for case in CASES})}
    for ranks, folder in folders.items():
        cases = [stored(case, bench) for case in CASES if case.ranks == ranks]
        if ranks == 4:
            cases += damaged_cases(bench, folder, byte_tokenizer)
        again = cases[0] | {"name": f"{cases[0]['name']}-again"}
        (folder / "cases.json").write_text(json.dumps([*cases, again]))
    run_jobs("rank_job", {folder: ranks for ranks, folder in folders.items()})
    return {ranks: read_job(folder, ranks) for ranks, folder in folders.items()}


def read_job(folder: Path, num_ranks: int) -> Job:
    seen = [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(num_ranks)]
    return Job(folder, seen, [np.load(folder / f"rank-{rank}.npz") for rank in range(num_ranks)])


def damaged_cases(bench: Bench, folder: Path, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Of 4 ranks: what a rank does not host is NaN where it reads; and one expert is NaN for all."""
    cases = []
    for case in (PLAIN, REPLICAS):
        hosts = Plan.load(bench.plan(case)).hosts
        own = [folder / f"{case.placement}-{rank}" for rank in range(4)]
        for rank in range(4):
            damage_experts(bench.model(case.model), own[rank], ~hosts[:, :, rank], tokenizer)
        cases.append(stored(case, bench) | {"name": f"{case.name}-own", "models": [*map(str, own)]})
    one = np.zeros_like(hosts[:, :, 0])
    one[2, 5] = True
    damage_experts(bench.model(PLAIN.model), folder / "one", one, tokenizer)
    cases.append(stored(PLAIN, bench) | {"name": "one-damaged", "models": [str(folder / "one")]})
    return cases


def damage_experts(model: Path, copy: Path, chosen: npt.NDArray[np.bool_], tokenizer: Tokenizer) -> None:
    """A copy of a checkpoint in which the experts chosen [L, E] are NaN."""
    decoder = load_decoder(model, torch.device("cpu"), torch.float32)
    for module in decoder.modules():
        if isinstance(module, MoE):
            module.experts.w_in[torch.from_numpy(chosen[module.index])] = torch.nan
    save_checkpoint(copy, decoder.config, decoder.state_dict(), tokenizer, torch.float32)


@pytest.fixture
def job(case: Case, jobs: dict[int, Job]) -> Job:
    """The job that has run the case."""
    return jobs[case.ranks]


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


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.placement == "replicas"], ids=lambda c: c.name
)
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


@pytest.mark.parametrize("case", [case for case in CASES if case.request == "replayed"], ids=lambda c: c.name)
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
    """As torch saw them: a coherent top-1 step is one all-to-all a MoE layer and a gather in either half."""
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


@pytest.mark.parametrize("case", [case for case in CASES if case.request == "second"], ids=lambda c: c.name)
def test_the_keys_and_values_of_a_request_go_with_it(case: Case, job: Job) -> None:
    """At the latest when the next one begins, and not only when Python collects cycles."""
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
    """In the checkpoint that each rank reads, all experts that it does not host are NaN."""
    for seen in (each[f"{case.name}-own"] for each in job.seen):
        assert seen["generation"]["tokens"] == bench.reference(case).generation.tokens
        assert seen["experts_held"] == [held] * 4


def test_what_one_rank_finds_wrong_ends_all_of_them_alike(jobs: dict[int, Job]) -> None:
    (fault,) = {seen["one-damaged"]["fault"] for seen in jobs[4].seen}
    weights = jobs[4].folder / "one" / "model.safetensors"
    assert fault.startswith(f"{weights}: the weights 'blocks.2.mlp.experts.w_in' hold NaN")


@pytest.fixture
def lone_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as torchrun would start it for a job of one rank."""
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 0}
    for name, value in (place | {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}).items():
        monkeypatch.setenv(name, str(value))
    yield
    if dist.is_initialized():  # a rank that has lost another one does not take leave
        dist.destroy_process_group()


@pytest.mark.parametrize("model", ["top1", "top2", *FAMILIES])
@pytest.mark.parametrize("strategy", ["dispatch-combine", "coherent", "replicated"])
def test_a_job_of_one_rank(bench: Bench, lone_rank: None, model: str, strategy: Name) -> None:
    plan = contiguous_plan(bench.config_of(model), Topology(gpus_per_node=1))
    with join_cluster("cpu") as cluster:
        generation = deploy(Deployment(bench.model(model), strategy, plan), cluster).generate(MIXED)
    assert generation.tokens == bench.run(model, [MIXED]).generation.tokens
    assert generation.decode.messages == generation.decode.kv_bytes == generation.decode.wire_bytes == 0


def test_a_shape_alone_is_deployed(bench: Bench, lone_rank: None) -> None:
    weights = RandomWeights(bench.config(top_k=2, head_dim=24, activation="swiglu"), seed=1)
    plan = random_plan(profiled(bench.decoder(weights.config)), Topology(gpus_per_node=1), 12)
    with join_cluster("cpu") as cluster:
        generation = deploy(Deployment(weights, "coherent", plan), cluster).generate(MIXED)
    assert generation.tokens == load_model(weights).generate(MIXED).tokens


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        ("[pair.cc:547] Connection closed by peer [127.0.0.1]:26037", "lost the connection to one"),
        ("writev: Broken pipe", "lost the connection to one"),
        ("[unbound_buffer.cc:78] Timed out waiting 9000ms for recv", "no sign of life from one"),
    ],
)
def test_a_lost_rank_is_told_from_other_errors(
    lone_rank: None, monkeypatch: pytest.MonkeyPatch, sign: str, words: str
) -> None:
    monkeypatch.setattr(liveness, "_GRACE_S", 0.0)
    lost = pytest.raises(LostContact, match=f"{words} of 1 ranks (for 9 s )?in a gather, step 1")
    with lost as caught, join_cluster("cpu", 9), annotate_errors("step 1"), annotate_errors("a gather"):
        raise RuntimeError(sign)
    assert not caught.value.told


def test_other_errors_are_no_lost_rank(lone_rank: None) -> None:
    with pytest.raises(RuntimeError, match="shapes") as caught, join_cluster("cpu"):
        raise RuntimeError("shapes cannot be multiplied")
    assert not isinstance(caught.value, LostContact)
    assert caught.value.__notes__ == ["on rank 0 of 1"]  # the traceback is all that is said


def test_a_wrong_result_stays_one(lone_rank: None) -> None:
    with pytest.raises(WrongResult, match="sequence 1"), join_cluster("cpu"):
        raise WrongResult("sequence 1")


def test_one_rank_of_each_node_tells() -> None:
    store = dist.HashStore()
    places = [Place(rank, num_ranks=4, local_rank=rank % 2, ranks_per_node=2) for rank in range(4)]
    assert [liveness.LivenessMonitor(place, 9, store).is_told() for place in places] == [
        False,
        True,
        False,
        True,
    ]


def test_nodes_of_different_sizes_are_bad_input(lone_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with (
        pytest.raises(InputError, match="3 of 5 ranks are on this node; start the same number on every node"),
        join_cluster("cpu"),
    ):
        pass

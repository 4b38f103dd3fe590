"""Cases of jobs of several ranks, their files, and what one process makes of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from exflow.commands.profile import profile
from exflow.model.checkpoint import Checkpoint
from exflow.model.config import ModelConfig
from exflow.model.config_file import load_model_config
from exflow.model.decoder import Decoder, Rows
from exflow.model.replay import ReplayedRouting
from exflow.model.sampling import Sampling
from exflow.placement.make_plan import place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import RoutingTrace
from exflow.runtime.deploy import default_plan, load_model
from exflow.runtime.request import Generation, Request
from exflow.runtime.trace_recorder import JobRecorder

MODELS: dict[str, dict[str, Any]] = {
    "top1": {},
    "top2": {"top_k": 2},
    "top1-dense": {"moe_every": 2, "num_hidden_layers": 5},  # the last layer is dense
    "top2-dense": {"top_k": 2, "moe_every": 2},
    "top2-swiglu": {"top_k": 2, "head_dim": 24, "activation": "swiglu"},
}
FAMILIES = ("gpt_oss", "mixtral", "olmoe", "qwen3_moe")  # Hugging Face checkpoints, top-2
PROMPTS = [[65, 66, 67], [72, 69, 76, 76, 79, 32, 87, 79, 82, 76, 68], [42], [1, 2, 3, 4, 5, 6], [200] * 7]
NEW = 5
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


def cases(*groups: Iterable[tuple[int, str, str, str, str]]) -> list[Case]:
    return [Case(*values) for values in chain(*groups)]


TWO = ("dispatch-combine", "coherent", "replicated")
FOUR = (*TWO, "node-coherent")
GROUPED, APART = ("coherent", "node-coherent"), ("dispatch-combine", "replicated")

# every strategy, kind of plan, model and request
CASES = cases(
    product([2], ["top1"], TWO, ["affinity"], ["mixed"]),
    product([2], ["top2-dense"], TWO, ["random", "replicas"], ["mixed"]),
    product([2], FAMILIES, ["coherent"], ["random"], ["mixed"]),
    product([2], ["gpt_oss"], APART, ["random"], ["mixed"]),
    product([4], ["top1"], GROUPED, ["random"], ["mixed"]),
    product([4], ["top2"], FOUR, ["replicas"], ["mixed"]),
    product([4], ["top1"], ["coherent"], ["contiguous"], ["mixed"]),
    product([4], ["top1-dense"], ["coherent"], ["affinity"], ["mixed"]),
    product([4], ["top2-dense"], ["node-coherent"], ["affinity"], ["mixed"]),
    product([4], ["top2-swiglu"], ["coherent"], ["random"], ["mixed"]),
    product([4], ["top1"], ["dispatch-combine", "coherent"], ["affinity"], ["some-end"]),
    product([4], ["top1"], ["node-coherent"], ["affinity"], ["all-end"]),
    product([4], ["top1"], ["coherent"], ["affinity"], ["end-at-once"]),
    product([4], ["top1"], ["replicated"], ["affinity"], ["second", "sampled"]),
    product([4], ["top1"], ["dispatch-combine"], ["affinity"], ["lone"]),
    product([4], ["top2"], ["coherent"], ["affinity"], ["sampled"]),
    product([4], ["top1"], ["coherent"], ["random"], ["replayed"]),
    product([4], ["top2"], ["node-coherent"], ["random"], ["replayed"]),
    product([8], ["top2"], ["node-coherent"], ["contiguous"], ["many"]),
)
# more combinations of the same, for `make test-all`
MORE_CASES = cases(
    product([2], ["top1"], TWO, ["affinity"], ["some-end"]),
    product([2], ["top1"], TWO, ["replicas"], ["mixed"]),
    product([4], ["top1"], APART, ["random"], ["mixed"]),
    product([2], ["mixtral", "olmoe", "qwen3_moe"], APART, ["random"], ["mixed"]),
    product([4], ["top2"], FOUR, ["contiguous"], ["mixed"]),
    product([4], ["top1"], ["node-coherent"], ["contiguous"], ["mixed"]),
    product([4], ["top2"], GROUPED, ["affinity"], ["mixed"]),
    product([4], ["top1"], FOUR, ["replicas"], ["mixed"]),
    product([4], ["top1-dense"], [*APART, "node-coherent"], ["affinity"], ["mixed"]),
    product([4], ["top1"], ["replicated", "node-coherent"], ["affinity"], ["some-end"]),
    product([4], ["top1"], TWO, ["affinity"], ["all-end"]),
    product([4], FAMILIES, GROUPED, ["random"], ["mixed"]),
    product([4], ["top2"], GROUPED, ["replicas"], ["some-end"]),
    product([4], ["top1"], ["replicated"], ["affinity"], ["end-at-once"]),
    product([4], ["top1"], ["coherent"], ["affinity"], ["second"]),
    product([4], ["top1"], ["node-coherent"], ["affinity"], ["lone"]),
    product([4], ["top1"], ["dispatch-combine"], ["affinity"], ["sampled"]),
    product([4], ["top2"], ["node-coherent"], ["affinity"], ["sampled"]),
    product([4], ["top2"], TWO, ["random"], ["replayed"]),
    product([8], ["top2"], TWO, ["contiguous"], ["many"]),
    product([8], ["top2"], ["coherent"], ["contiguous"], ["many-sampled"]),
)
PLAIN = Case(4, "top1", "coherent", "random", "mixed")
REPLICAS = Case(4, "top2", "coherent", "replicas", "mixed")


@dataclass
class Reference:
    """Result of one process."""

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
            return default_plan(self.config_of(case.model), topology)
        trace = self.once(
            ("profiled", case.model),
            lambda: profiled(
                Checkpoint.open(self.model(case.model)).decoder(torch.device("cpu"), torch.float32)
            ),
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
    """Fill each layer's slots in random order: every expert once, random replicas in the other slots."""
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

"""Traces to report on, and a reader of the pages."""

from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser

import numpy as np

from exflow.placement.make_plan import Solving, place
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.topology import Topology
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace

VOID = {"meta", "link", "input", "br", "img", "hr"}
EVIL = "<script>alert(1)</script> & \"quoted\" 'name'"
STRATEGIES = {"dispatch_combine", "node_coherent", "coherent", "replicated"}

Run = Callable[..., str]


def make_trace(experts: int = 8, layers: int = 4, top_k: int = 2, model: str = "tiny") -> RoutingTrace:
    """40 sequences of 10 tokens; experts of the same remainder modulo 4 like each other."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 4, (400, 1, 1))
    liked = rng.random((400, layers, experts)) + 0.4 * (np.arange(experts) % 4 == topic)
    return RoutingTrace.from_arrays(
        np.argsort(-liked, axis=2)[:, :, :top_k],
        num_experts=experts,
        sequence=np.arange(400) // 10,
        phase=np.where(np.arange(400) % 10 < 3, PREFILL, DECODE),
        model=model,
    )


def save(trace: RoutingTrace, topology: Topology, name: str = "plan.json") -> Plan:
    trace.save("trace")
    plan = place(trace, topology, solving=Solving(method="load-only" if trace.num_experts > 32 else "sweep"))
    plan.save(name)
    return plan


class Checked(HTMLParser):
    """Collects what a page holds; raises where a tag is not closed, or closed without being open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.links: set[str] = set()
        self.addresses: set[str] = set()
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name}: handlers belong into the script"
            if name == "id":
                self.ids[str(value)] += 1
            if name in ("href", "src", "srcset", "action", "data", "poster"):
                (self.links if str(value).startswith("#") else self.addresses).add(str(value))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

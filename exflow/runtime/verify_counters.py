"""`exflow generate --verify`: compares the messages and bytes that ranks counted with the routing."""

from exflow.errors import WrongResult
from exflow.model.decoder import Decoder
from exflow.placement.plan.plan import Plan
from exflow.placement.traffic.traffic import count_traffic
from exflow.profiling.trace import DECODE, PREFILL, RoutingTrace
from exflow.runtime.request import Generation


def check_counters(
    generation: Generation,
    trace: RoutingTrace,
    plan: Plan,
    group_size: int,
    reference: Decoder,
    hierarchical: tuple[bool, bool] = (False, False),
) -> None:
    """Compare the ranks' counters with placement's count on the routing recorded in the same run.

    group_size: ranks in a coherence group; 0 for `replicated`, which sends no messages. hierarchical:
    (prompts went by relays, decode steps went by relays). Raises WrongResult at the first counter that is not
    as expected.
    """
    phases = ((PREFILL, "prefill", 1), (DECODE, "decode", group_size))
    for (phase, name, owners), relays in zip(phases, hierarchical, strict=True):
        rows, counters = trace.select(trace.phase == phase), getattr(generation, name)
        expected = _expected_counters(rows, plan, owners, max(1, group_size), reference, relays)
        for counter, value in expected.items():
            counted, right = getattr(counters, counter), value if group_size else 0
            if counted != right:
                raise WrongResult(
                    f"verify: {name}: the ranks counted {counted} {counter}, the routing that they "
                    f"recorded comes to {right}; the counters or the exchange are at fault"
                )


def _expected_counters(
    trace: RoutingTrace, plan: Plan, owners: int, group_size: int, reference: Decoder, hierarchical: bool
) -> dict[str, int]:
    """Expected counters of a phase: `owners` ranks may own a token, `group_size` ranks keep its context."""
    config, itemsize = reference.config, reference.embedding.weight.dtype.itemsize
    sent = count_traffic(trace, plan, max(1, owners), hierarchical)
    copied = count_traffic(trace, plan, group_size)
    messages = ("dispatch_intra", "dispatch_inter", "return_intra", "return_inter")
    return {
        **{name: getattr(sent, name) for name in messages},
        **{name: getattr(copied, name) for name in ("kv_intra", "kv_inter")},
        "hidden_bytes": sent.messages * config.hidden_size * itemsize,
        "kv_bytes": (copied.kv_intra + copied.kv_inter) * config.kv_width * itemsize,
    }

"""Notes on a placement: what its user should know before the plan is used."""

from collections.abc import Iterator

from exflow.placement.plan.plan import Plan

_CHOICES = 100  # of an expert in a layer, in the mean: fewer say little about which go together
_SEQUENCES = 20  # held out: fewer are no sample of what a server gets
_UNEVEN = 1.05  # times the compute imbalance of experts in order


def notes_on(plan: Plan, redundant_experts: int) -> Iterator[str]:
    """Yield a sentence for each thing that a user of the plan should know, by its expected figures."""
    yield from _on_slots(plan, redundant_experts)
    tokens, top_k = plan.expected["tokens"], plan.expected["top_k"]
    choices = tokens * top_k / plan.num_experts
    if choices < _CHOICES:
        wanted = -(-_CHOICES * plan.num_experts // top_k)
        yield (
            f"The trace has {tokens:,} tokens, {choices:.0f} choices of each expert in a layer; "
            f"record {wanted:,} tokens or more."
        )
    sequences = plan.expected.get("held_out", {}).get("sequences", _SEQUENCES)
    if sequences < _SEQUENCES:
        yield (
            f"Only {sequences} sequences were held out; record {_SEQUENCES} or more for figures to rely on."
        )
    if "time" in plan.expected:
        yield from _on_time(plan)


def _on_slots(plan: Plan, redundant_experts: int) -> Iterator[str]:
    spare = plan.num_slots - plan.num_experts - redundant_experts
    if plan.num_ranks > plan.num_experts:
        least, rest = divmod(plan.num_slots, plan.num_experts)
        replicas = f"{least} or {least + 1}" if rest else f"{least}"
        yield (
            f"There are more GPUs ({plan.num_ranks}) than experts ({plan.num_experts}): each expert has "
            f"{replicas} replicas in the mean."
        )
    elif spare > 0:
        yield (
            f"{plan.num_ranks} GPUs share slots equally only if there are {plan.num_slots}: {spare} more "
            "than asked for, which hold replicas."
        )


def _on_time(plan: Plan) -> Iterator[str]:
    time = plan.expected["time"]
    if plan.method in ("contiguous", "load-only"):
        name = "experts in order" if plan.method == "contiguous" else "the placement by load alone"
        yield f"Nothing faster than {name} was found, so the plan is that."
    without = time.get("without_replicas_us")
    if without is not None and without < time["step_us"]:
        share = 100 * (1 - without / time["step_us"])
        yield f"Without redundant experts a step takes {share:.1f}% less time; leave them out for speed."
    usual = time["references"]["contiguous"]["compute_imbalance"]
    if time["compute_imbalance"] > _UNEVEN * usual:
        yield (
            f"The busiest GPU computes {time['compute_imbalance']:.2f} times the mean, {usual:.2f} times "
            "with experts in order. The links make up for it on this machine; place again for another."
        )

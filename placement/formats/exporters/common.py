"""Code that the exporters share: usage notes for an engine, and checks of what a format can express."""

from dataclasses import dataclass

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan


@dataclass(frozen=True)
class Usage:
    """Instructions for an engine to read the exported file, and known pitfalls.

    options  lines of a command, a configuration or a program, ready to be copied: a path in them is quoted as
             the shell, YAML or Python wants it
    traps    one sentence each, with the engine's version or issue that it is about
    """

    options: tuple[str, ...]
    traps: tuple[str, ...]


def redundant_experts(plan: Plan) -> int:
    """Slots of a layer beyond one for each expert; engines are told this number, not that of the slots."""
    return plan.num_slots - plan.num_experts


def check_equal_experts(plan: Plan, engine: str) -> None:
    """Raise InputError if the plan's layers have different numbers of experts."""
    for layer, count in enumerate(plan.experts_per_layer):
        if count != plan.num_experts:
            raise InputError(
                f"MoE layer {layer} has {count} experts, others {plan.num_experts}, {engine} wants as many "
                "in every layer; only the format trtllm does not"
            )

"""What the exporters share: how an engine is told of a file, and what a format cannot express."""

from dataclasses import dataclass

from exflow.errors import InputError
from exflow.placement.plan.plan import Plan


@dataclass(frozen=True)
class Usage:
    """How to give the exported file to its engine, and what is known to go wrong.

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

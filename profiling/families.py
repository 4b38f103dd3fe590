"""Hooks for the MoE families of Hugging Face models: where each passes a token's experts, and how to record
them.

Most families compute the choice in a router and call their experts with it; that call is what is recorded, so
group limits, correction biases and hash routing count as they were really used. T tokens, k choices of E.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Deliver = Callable[[Tensor, Tensor], None]
"""Takes the expert ids [T, k] and the gate weights [T, k] of one layer in one pass."""

_CHOICE_NAMES = ("top_k_index", "router_indices", "selected_experts")

LOOKED_FOR = (
    f"modules called with (hidden_states, {' or '.join(_CHOICE_NAMES)}, weights), and the routers of "
    "Switch Transformers and Llama 4"
)


@dataclass(frozen=True)
class Family:
    """A kind of MoE block, and how to record it.

    `listen(block, experts, deliver)` hooks a block whose child `experts` holds the experts, and returns the
    hooks. `by_weight` says that the first choice is the one of most weight; otherwise the router's order is
    kept. `top_k` is None where router or block say it.
    """

    matches: Callable[[nn.Module, nn.Module], bool]
    listen: Callable[[nn.Module, nn.Module, Deliver], list[RemovableHandle]]
    by_weight: bool = True
    top_k: int | None = None


def family_of(block: nn.Module, experts: nn.Module) -> Family | None:
    """The family of a block with these experts, or None if nothing is known of it."""
    return next((family for family in FAMILIES if family.matches(block, experts)), None)


def router_of(block: nn.Module) -> nn.Module | None:
    """The module that chooses, by the names it has in transformers."""
    children = dict(block.named_children())
    return children.get("router") or children.get("gate")


def parameters_of(module: nn.Module) -> list[str]:
    """The names of a module's call parameters."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _is_called_with_choices(block: nn.Module, experts: nn.Module) -> bool:
    names = parameters_of(experts)
    return len(names) == 3 and names[1] in _CHOICE_NAMES


def _listen_to_call(block: nn.Module, experts: nn.Module, deliver: Deliver) -> list[RemovableHandle]:
    names = parameters_of(experts)

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids_Tk, weights = given[names[1]], given[names[2]]
        deliver(ids_Tk, weights.reshape(ids_Tk.shape))

    return [experts.register_forward_pre_hook(called, with_kwargs=True)]


def _has_router(name: str) -> Callable[[nn.Module, nn.Module], bool]:
    """A test for blocks whose router is of the class `name`, without importing transformers."""
    return lambda block, experts: any(kind.__name__ == name for kind in type(router_of(block)).__mro__)


def _listen_to_switch(block: nn.Module, experts: nn.Module, deliver: Deliver) -> list[RemovableHandle]:
    """Hook a Switch block, whose experts are called with a one-hot [T, 1, E]; a token turned away for lack of
    capacity has none set.

    Such a token is recorded with the expert that it was turned away from, at weight 0.
    """
    logits: list[Tensor] = []

    def classified(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        logits[:] = [output.detach()]

    def called(module: nn.Module, args: tuple[Any, ...]) -> None:
        _, one_hot_T1E, weights = args
        accepted_T1 = one_hot_T1E.any(dim=-1)
        wanted_T1 = logits.pop().flatten(0, -2).argmax(dim=-1, keepdim=True)
        ids_T1 = torch.where(accepted_T1, one_hot_T1E.argmax(dim=-1), wanted_T1)
        deliver(ids_T1, weights.reshape(ids_T1.shape) * accepted_T1)

    router: Any = router_of(block)
    return [
        router.classifier.register_forward_hook(classified),
        experts.register_forward_pre_hook(called),
    ]


def _listen_to_llama4(block: nn.Module, experts: nn.Module, deliver: Deliver) -> list[RemovableHandle]:
    """Hook a Llama 4 block, whose router returns (scores [T, E], logits [T, E]); scores are zero except for
    the k largest logits."""

    def routed(router: Any, args: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        scores_TE, logits_TE = output
        ids_Tk = logits_TE.topk(router.top_k, dim=1).indices
        deliver(ids_Tk, scores_TE.gather(1, ids_Tk))

    router: Any = router_of(block)
    return [router.register_forward_hook(routed)]


FAMILIES = (
    Family(_has_router("SwitchTransformersTop1Router"), _listen_to_switch, top_k=1),
    Family(_has_router("Llama4Router"), _listen_to_llama4),
    # each choice of Phi-MoE has its own softmax, so weights say nothing about which came first
    Family(_has_router("PhimoeTopKRouter"), _listen_to_call, by_weight=False),
    Family(_is_called_with_choices, _listen_to_call),
)

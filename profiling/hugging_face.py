"""A Hugging Face model as a Recordable: its MoE layers are found, and listened to as it runs."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from exflow.errors import InputError
from exflow.profiling.families import LOOKED_FOR, Family, family_of, parameters_of, router_of
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.passes import Batches, PassTokens

if TYPE_CHECKING:
    from exflow.profiling.listener import RoutingListener


@dataclass(frozen=True)
class MoELayer:
    """One MoE layer of a model: `stack` is the module whose list of layers holds it, at place `index`."""

    path: str
    stack: str
    index: int
    block: nn.Module
    experts: nn.Module
    family: Family


class HuggingFaceRouting:
    """Announces the routing of a model's experts (profiling.record.Recordable).

    Raises InputError for a model without known MoE layers, with MoE layers in several stacks (an
    encoder and a decoder, of which a token visits one), compiled, or with its experts split over ranks.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = find_moe_layers(model)
        self._stack = model.get_submodule(self._layers[0].stack)
        self._layout = self._read_layout()

    def routing_layout(self) -> RoutingLayout:
        return self._layout

    def add_routing_listener(self, listener: "RoutingListener") -> Callable[[], None]:
        handles = _Listening(self._stack, self._layers, self._layout.top_k, listener).handles
        enable_compile = _without_compile(self._model)

        def remove() -> None:
            enable_compile()
            for handle in handles:
                handle.remove()

        return remove

    def _read_layout(self) -> RoutingLayout:
        layers = self._layers
        counts = tuple(_num_experts(layer) for layer in layers)
        choices = {_top_k(layer) for layer in layers}
        if len(choices) > 1:
            raise InputError(f"record: layers differ in top_k ({sorted(choices)}); a trace has one for all")
        stacked: Any = self._stack.get_submodule(_list_name(layers[0]))
        return RoutingLayout(
            model=_model_name(self._model),
            num_hidden_layers=len(stacked),
            moe_layer_ids=tuple(layer.index for layer in layers),
            num_experts=max(counts),
            top_k=choices.pop(),
            experts_per_layer=counts,
        )


def find_moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers in order; at least one, all of one stack. InputError otherwise."""
    kind = type(model).__name__
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise InputError(f"record: {kind} is compiled, which leaves hooks out; give it as it was before")
    found: list[MoELayer] = []
    unknown: list[str] = []
    for path, block in model.named_modules():
        for name, experts in block.named_children():
            where = f"{path}.{name}".lstrip(".")
            if (family := family_of(block, experts)) is not None and name == "experts":
                found.append(MoELayer(where, *_place(model, where), block, experts, family))
            elif type(experts).__name__.endswith("Experts"):
                unknown.append(f"{where} is a {type(experts).__name__}({', '.join(parameters_of(experts))})")
    if not found:
        raise InputError(
            f"record: {kind} has no MoE layers that are known: looked for {LOOKED_FOR}"
            f"{', and found that ' + unknown[0] if unknown else ''}; give a Mixture-of-Experts model"
        )
    stacks = list(dict.fromkeys(layer.stack for layer in found))
    if len(stacks) > 1:
        each = " or ".join(f"model.{stack}" for stack in stacks)
        raise InputError(
            f"record: {kind} has MoE layers in {len(stacks)} stacks, and a token visits one of them; "
            f"record each by itself: give {each}, and call the model as ever"
        )
    return found


class _Listening:
    """The hooks of one listener: a pass opens with the stack of layers, and is told at its end."""

    def __init__(
        self, stack: nn.Module, layers: list[MoELayer], top_k: int, listener: "RoutingListener"
    ) -> None:
        self._names = parameters_of(stack)
        self._layers = layers
        self._top_k = top_k
        self._listener = listener
        self._batches = Batches(type(stack).__name__)
        self._tokens: PassTokens | None = None  # of the pass under way
        self._ids: list[Tensor] = []
        self._weights: list[Tensor] = []
        self.handles: list[RemovableHandle] = [
            stack.register_forward_pre_hook(self._begin, with_kwargs=True),
            stack.register_forward_hook(self._end),
        ]
        for number, layer in enumerate(layers):
            deliver = self._deliver_to(number)
            self.handles += layer.family.listen(layer.block, layer.experts, deliver)

    @torch.no_grad()
    def _begin(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._tokens = self._batches.begin({**dict(zip(self._names, args, strict=False)), **kwargs})
        self._ids, self._weights = [], []

    def _deliver_to(self, number: int) -> Callable[[Tensor, Tensor], None]:
        def deliver(ids_Tk: Tensor, weights_Tk: Tensor) -> None:
            if self._tokens is None:
                return  # a layer called by itself, or run again for the gradient: not a pass
            self._check(number, ids_Tk)
            self._ids.append(ids_Tk.detach())
            self._weights.append(weights_Tk.detach())

        return deliver

    def _check(self, number: int, ids_Tk: Tensor) -> None:
        assert self._tokens is not None
        path, expected = self._layers[number].path, (len(self._tokens.sequence_T), self._top_k)
        if number != len(self._ids):
            raise InputError(
                f"record: {path} ran as number {len(self._ids)} of the MoE layers of a pass, and is number "
                f"{number}; a model that repeats or leaves out layers cannot be recorded"
            )
        if tuple(ids_Tk.shape) != expected:
            raise InputError(
                f"record: {path} was given choices of shape {tuple(ids_Tk.shape)} where the pass has "
                f"{expected[0]} tokens and top_k is {expected[1]}; this model cannot be recorded"
            )

    @torch.no_grad()
    def _end(self, stack: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            return  # recording began inside this pass
        if len(self._ids) < len(self._layers):
            raise InputError(
                f"record: {self._layers[len(self._ids)].path} was not called in a pass; load the model "
                "without use_kernels, and without a quantization that replaces the whole MoE block"
            )
        self._batches.end(output)
        ids, weights = self._ids, self._weights
        if self._layers[0].family.by_weight:
            ids, weights = first_choice_first(ids, weights)
        for layer, (ids_Tk, weights_Tk) in enumerate(zip(ids, weights, strict=True)):
            self._listener(layer, ids_Tk, weights_Tk, tokens.sequence_T, tokens.position_T, tokens.phase)


def first_choice_first(ids: list[Tensor], weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Order the choices of each token [T, k] in each layer by weight; routers may give them in any order.

    The layers of a device are ordered at once, so that it costs a handful of launches.
    """
    if ids[0].shape[1] == 1:
        return ids, weights
    ordered_ids: list[Tensor] = []
    ordered_weights: list[Tensor] = []
    for _, run in groupby(range(len(ids)), key=lambda layer: ids[layer].device):
        layers = list(run)
        weights_LTk = torch.stack([weights[layer] for layer in layers])
        sorted_LTk, order_LTk = weights_LTk.sort(dim=-1, descending=True, stable=True)
        ordered_ids += torch.stack([ids[layer] for layer in layers]).gather(-1, order_LTk).unbind()
        ordered_weights += sorted_LTk.unbind()
    return ordered_ids, ordered_weights


def _place(model: nn.Module, path: str) -> tuple[str, int]:
    """The path of the stack that a module is in, and the number of its layer there."""
    parts = path.split(".")
    for depth, part in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:depth]))
        if part.isdigit() and isinstance(parent, nn.ModuleList):
            return ".".join(parts[: depth - 1]), int(part)
    raise InputError(f"record: {path} is in no list of layers; give the model that has the layers")


def _list_name(layer: MoELayer) -> str:
    """The name of the list of layers in its stack."""
    return layer.path.removeprefix(f"{layer.stack}.").split(".")[0]


def _num_experts(layer: MoELayer) -> int:
    here = getattr(layer.experts, "num_experts", None)
    in_all = getattr(router_of(layer.block), "num_experts", here)
    if here is None:
        raise InputError(f"record: {layer.path} does not say its num_experts; this family is not known")
    if in_all != here:
        raise InputError(
            f"record: {layer.path} has {here} of {in_all} experts, split over ranks; load the model without "
            "expert parallelism, with device_map='auto' where it needs several GPUs"
        )
    return int(here)


def _top_k(layer: MoELayer) -> int:
    """The experts per token, by the attribute of the router or the block that almost all families have."""
    for owner in (layer.family, router_of(layer.block), layer.block):
        if isinstance(value := getattr(owner, "top_k", None), int):
            return value
    raise InputError(f"record: {layer.path} does not say its top_k; this family is not known")


def _model_name(model: nn.Module) -> str:
    """The model's name on the hub, or its folder's, or its class's."""
    name = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    return Path(name).name if Path(name).is_dir() else str(name)


def _without_compile(model: nn.Module) -> Callable[[], None]:
    """Keep generate() from compiling the model, which would leave the hooks out; returns the way back."""
    config: Any = getattr(model, "generation_config", None)
    if config is None:
        return lambda: None
    before = config.disable_compile
    config.disable_compile = True

    def restore() -> None:
        config.disable_compile = before

    return restore

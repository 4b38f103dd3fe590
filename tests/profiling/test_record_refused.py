"""Models and runs that cannot be recorded are refused, with what was looked for."""

from typing import Any

import pytest
import torch
from torch import nn

from exflow.errors import InputError
from exflow.profiling.record import record
from tests.profiling.routers import LENGTHS, SMALL, padded_batch, tiny_model

transformers = pytest.importorskip("transformers", reason="needs transformers")
torch.set_num_threads(1)  # for tensors this small more threads only wait for each other


def test_a_model_without_experts_says_what_was_looked_for() -> None:
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 1})
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    message = (
        r"record: LlamaForCausalLM has no MoE layers that are known: looked for modules called with "
        r"\(hidden_states, top_k_index .*Switch Transformers and Llama 4; give a Mixture-of-Experts model"
    )
    with pytest.raises(InputError, match=message), record(model):
        pass


class OtherExperts(nn.Module):
    def forward(self, hidden_states: torch.Tensor, routing_data: Any) -> torch.Tensor:
        return hidden_states


def test_experts_that_cannot_be_listened_to_are_named() -> None:
    model = tiny_model("OLMoE")
    for layer in model.model.layers:
        layer.mlp.experts = OtherExperts()
    message = r"model.layers.0.mlp.experts is a OtherExperts\(hidden_states, routing_data\)"
    with pytest.raises(InputError, match=message), record(model):
        pass


def test_a_block_that_bypasses_its_experts_is_found_out() -> None:
    model = tiny_model("OLMoE")
    model.model.layers[1].mlp.forward = lambda hidden: hidden
    message = "model.layers.1.mlp.experts (ran as|was not called)|model.layers.2.mlp.experts ran as number 1"
    with pytest.raises(InputError, match=message), record(model):
        model(input_ids=torch.arange(3, 8)[None])
    model = tiny_model("OLMoE")
    model.model.layers[3].mlp.forward = lambda hidden: hidden
    message = "model.layers.3.mlp.experts was not called in a pass; load the model without use_kernels"
    with pytest.raises(InputError, match=message), record(model):
        model(input_ids=torch.arange(3, 8)[None])


def test_experts_split_over_ranks_are_refused() -> None:
    model = tiny_model("Mixtral")
    model.model.layers[0].mlp.experts.num_experts = 4
    message = "model.layers.0.mlp.experts has 4 of 8 experts, split over ranks; load the model without expert"
    with pytest.raises(InputError, match=message), record(model):
        pass


class Compiled(nn.Module):
    """Stand-in for the module of torch.compile, which takes seconds to load."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._orig_mod = model


def test_a_compiled_model_is_refused() -> None:
    message = "record: Compiled is compiled, which leaves hooks out; give it as it was before"
    with pytest.raises(InputError, match=message), record(Compiled(tiny_model("Mixtral"))):
        pass


def test_masks_and_caches_that_do_not_tell_are_refused() -> None:
    model = tiny_model("OLMoE")
    ids, mask = padded_batch("right")
    with record(model) as recorder, torch.no_grad():
        with pytest.raises(
            InputError, match=r"of shape \(3, 4\) does not tell which of 5 tokens are padding"
        ):
            model(input_ids=ids, attention_mask=mask[:, :4])
        with pytest.raises(InputError, match="of type object does not tell which of 5 tokens"):
            model(input_ids=ids, attention_mask={"sliding_attention": mask, "full_attention": object()})
        with pytest.raises(InputError, match="a cache of type object does not tell sequences apart"):
            model.model(input_ids=ids, past_key_values=object())
        model(input_ids=ids, attention_mask=mask)
    assert recorder.trace.num_tokens == sum(LENGTHS)

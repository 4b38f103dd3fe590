"""transformers' models with its expert parallelism and random weights, for transformers_ep.py."""

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from exflow.job.cluster import Cluster
from exflow.model.config import ModelConfig

# With a mask transformers' sdpa copies keys and values for every query head. It needs none: all positions of
# the cache are filled. Attention that it knows no masks for gets none. For sinks there is the eager one, and
# flash kernels that have to be downloaded.
ATTENTION = {
    "mixtral": ("unmasked_sdpa", sdpa_attention_forward),
    "gpt_oss": ("unmasked_eager", eager_attention_forward),
}
EXPERTS = "grouped_mm"  # batched_mm copies the matrices for each token and choice: more bytes at all batches


@dataclass(frozen=True)
class Bench:
    """The setting of all rows. distributed, mesh: how transformers spreads a model; None for one rank."""

    cluster: Cluster
    dtype: torch.dtype
    context: int
    distributed: Any
    mesh: Any

    @classmethod
    def of(cls, cluster: Cluster, dtype: torch.dtype, context: int) -> "Bench":
        ranks = cluster.num_ranks
        # 5.17 has no ep_size; in 5.24 the flag without it means an empty tp_plan, which it then refuses
        wanted = {"tp_size": ranks, "ep_size": ranks, "enable_expert_parallel": ranks > 1}
        distributed, _, mesh = PreTrainedModel.prepare_distribute_model(DistributedConfig.from_dict(wanted))
        return cls(cluster, dtype, context, distributed, mesh)


def transformers_model(bench: Bench, shape: ModelConfig, code: str, depth: int) -> Any:
    """The first `depth` layers of a shape in the code of a family, with this rank's experts."""
    layers = {"layer_types": ["full_attention"] * depth} if code == "gpt_oss" else {}
    config = AutoConfig.for_model(
        code,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=depth,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.max_positions,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        pad_token_id=None,
        **layers,
    )
    attention, function = ATTENTION[code]
    AttentionInterface.register(attention, function)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=bench.dtype, attn_implementation=attention, experts_implementation=EXPERTS
        )
    # dense weights whole on every rank: a rule of tensor parallelism for experts yields to the ep_plan's
    model.tp_plan = {"model.layers.*.mlp.experts": "moe_tp_experts"}
    model = model.maybe_distribute_model(model, bench.distributed, bench.mesh)
    model.to_empty(device=bench.cluster.device)
    # its buffers are no weights, and were on no device
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config).to(bench.cluster.device)
    draw_weights(model, bench.cluster)
    return model.eval().requires_grad_(False)


def held(parameter: Tensor) -> Tensor:
    """The part of a parameter that lies on this rank."""
    part: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return part


@torch.no_grad()
def draw_weights(model: Any, cluster: Cluster) -> None:
    """Random weights that depend on names and experts alone, and keep the size of what passes through them.

    Biases are small: what they add to all tokens alike would make some experts everyone's choice.
    """
    generator = torch.Generator(cluster.device)

    def draw(values: Tensor, key: str) -> None:
        generator.manual_seed(zlib.crc32(key.encode()))
        share = 0.1 if "bias" in key else 1.0
        values.normal_(std=share * values.shape[-1] ** -0.5, generator=generator)

    for name, parameter in model.named_parameters():
        part = held(parameter)
        if "norm" in name:
            part.fill_(1)
        elif ".experts." in name:
            first = cluster.rank * len(part)
            for expert, values in enumerate(part, first):
                draw(values, f"{name} {expert}")
        else:
            draw(part, name)

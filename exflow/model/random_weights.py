"""Random weights for a configuration without a checkpoint, drawn on the device that needs them."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from exflow.model.checkpoint import expert_rows
from exflow.model.config import ModelConfig
from exflow.model.decoder import Decoder, initial_std, reset_vectors


@dataclass(frozen=True)
class RandomWeights:
    """Stands for a checkpoint of `config` with the weights of an untrained model, drawn from `seed`."""

    config: ModelConfig
    seed: int = 0


@torch.no_grad()
def random_decoder(
    weights: RandomWeights,
    device: torch.device,
    dtype: torch.dtype,
    experts_here: list[list[int]] | None = None,
) -> Decoder:
    """Build the decoder of `weights.config` with weights drawn on `device`, in `dtype`.

    experts_here: for each MoE layer the logical expert of each slot of this rank, all with the same number of
    slots; None means all experts. An expert's weights depend on the seed, the layer and its logical id; any
    other tensor's depend on the seed and its name. So on one kind of device weights do not depend on the
    placement or the number of ranks.
    """
    config = weights.config
    if experts_here is None:
        experts_here = [list(range(config.num_experts))] * len(config.moe_layer_ids)
    with torch.device("meta"):
        decoder = Decoder(config, len(experts_here[0])).to(dtype).eval().requires_grad_(False)
    decoder.to_empty(device=device)
    reset_vectors(decoder)

    generator = torch.Generator(device)

    def draw(values: Tensor, name: str, key: str) -> None:
        digest = hashlib.sha256(f"{weights.seed} {key}".encode()).digest()
        generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)  # seeds are int64
        values.normal_(std=initial_std(name, config), generator=generator)

    rows = expert_rows(config, experts_here)
    for name, parameter in decoder.named_parameters():
        if name in rows:
            for values, expert in zip(parameter, rows[name], strict=True):
                draw(values, name, f"{name} {expert}")
        elif parameter.dim() >= 2:
            draw(parameter, name, name)
    return decoder

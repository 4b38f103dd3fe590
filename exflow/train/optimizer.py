"""AdamW with float32 master weights, for a decoder that computes in bf16."""

import math

import torch
from torch import Tensor

from exflow.model.decoder import Decoder
from exflow.train.config import OptimiserConfig


def learning_rate(config: OptimiserConfig, step: int) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


class MasterAdamW:
    """AdamW on float32 master weights; the decoder computes in its own dtype (bf16 on GPUs)."""

    def __init__(self, decoder: Decoder, config: OptimiserConfig) -> None:
        self.config = config
        self.parameters = dict(decoder.named_parameters())
        self.master = {name: value.detach().float().clone() for name, value in self.parameters.items()}
        matrices = [value for value in self.master.values() if value.dim() >= 2]
        vectors = [value for value in self.master.values() if value.dim() < 2]
        self.adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": config.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.95),
            fused=matrices[0].is_cuda,
        )

    @torch.no_grad()
    def step(self, step: int) -> None:
        for name, parameter in self.parameters.items():
            self.master[name].grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.master.values(), self.config.gradient_clip)
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.config, step)
        self.adamw.step()
        self.publish()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master weights into the decoder."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.master[name])

    def state(self) -> dict[str, Tensor]:
        """Master weights and moments as tensors named `master/blocks.0...`, `exp_avg/blocks.0...`."""
        state = {f"master/{name}": value for name, value in self.master.items()}
        for name, value in self.master.items():
            moments = self.adamw.state.get(value, {})
            state |= {f"{moment}/{name}": tensor for moment, tensor in moments.items()}
        return state

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Load the tensors that `state` returned."""
        for key, tensor in state.items():
            kind, name = key.split("/")
            value = self.master[name]
            if kind == "master":
                value.copy_(tensor)
            else:
                self.adamw.state[value][kind] = tensor.to(value.device)
        self.publish()

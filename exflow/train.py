"""Train a small GPT-MoE from text: next-token loss plus the GShard balance loss, bf16 on GPUs.

Batches are a function of the seed and the step alone, so a resumed run sees what an unbroken one would have.

Shapes: B sequences, S tokens of one sequence, T = B * S, K choices, E experts.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor

from exflow.attention import CausalAttention, rows_of_batch
from exflow.checkpoint import save_checkpoint
from exflow.config import ModelConfig, StrictModel, validated
from exflow.corpus import Corpus, build_corpus, find_texts
from exflow.decoder import Decoder, Routing, initialise
from exflow.errors import InputError
from exflow.files import atomic_path, read_json, write_json
from exflow.moe import AllExpertsHere


class DataConfig(StrictModel):
    """texts: files, folders or "{stdlib}"; held_out: share of each file's end kept for evaluation."""

    texts: list[str] = Field(min_length=1)
    held_out: float = Field(default=0.05, gt=0, lt=0.5)


class OptimiserConfig(StrictModel):
    """AdamW with linear warm-up and a cosine to a tenth; batch_size counts sequences."""

    steps: PositiveInt
    batch_size: PositiveInt
    sequence_length: PositiveInt
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 100
    weight_decay: float = Field(default=0.1, ge=0)
    balance_weight: float = Field(default=0.01, ge=0)
    gradient_clip: PositiveFloat = 1.0
    seed: NonNegativeInt = 0
    evaluate_tokens: PositiveInt = 262144


class TrainConfig(StrictModel):
    """What `exflow train CONFIG` reads; see configs/. A checkpoint of the last step is always kept."""

    model: ModelConfig
    data: DataConfig
    training: OptimiserConfig
    checkpoint_steps: tuple[NonNegativeInt, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        vocab_size, length = self.model.vocab_size, self.training.sequence_length
        if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
            raise ValueError(
                f"model.vocab_size {vocab_size} is not from {SMALLEST_VOCABULARY} to {LARGEST_VOCABULARY}, as "
                "the tokenizer needs"
            )
        if length > self.model.max_positions:
            raise ValueError(
                f"training.sequence_length {length} is more than model.max_positions {self.model.max_positions}"
            )
        last = max(self.checkpoint_steps, default=0)
        if last > self.training.steps:
            raise ValueError(
                f"checkpoint_steps names step {last}, and training.steps ends at {self.training.steps}"
            )
        return self


@dataclass(frozen=True)
class StepFigures:
    """loss in nats a token; balance is the busiest expert's load over the mean, in the worst layer."""

    loss: float
    balance: float
    tokens_per_s: float


@dataclass(frozen=True)
class Progress:
    """What was measured after `step` steps: figures of the last step, or at a checkpoint the held-out text."""

    step: int
    figures: StepFigures | None = None
    held_out_bits_per_byte: float | None = None


def load_train_config(path: Path) -> TrainConfig:
    """Read the YAML file of a training run."""
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{path}: the configuration cannot be read ({error.strerror}); see configs/"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: the configuration is not YAML ({reason}); see configs/") from error
    return validated(TrainConfig, value, path)


def load_of_experts(routing: Routing) -> Tensor:
    """The number of (token, choice) pairs of each expert [E] int64."""
    return torch.bincount(routing.expert_TK.flatten(), minlength=routing.probability_TE.shape[1])


def balance_loss(routing: Routing) -> Tensor:
    """E * sum over experts of (share of tokens sent there) * (mean gate probability): 1 when even.

    GShard (Lepikhin et al. 2021, section 2.2), in the scaling of Switch Transformers (Fedus et al. 2022).
    """
    load_E = load_of_experts(routing)
    share_E = load_E / load_E.sum()
    return len(load_E) * (share_E * routing.probability_TE.mean(dim=0)).sum()


def busiest_over_mean(routings: list[Routing]) -> Tensor:
    """The worst layer's busiest expert, as a multiple of the mean load."""
    loads_E = [load_of_experts(routing) for routing in routings]
    return torch.stack([load_E.max() / load_E.float().mean() for load_E in loads_E]).max()


def forward_loss(decoder: Decoder, tokens_BS: Tensor) -> tuple[Tensor, list[Routing]]:
    """Mean next-token loss in nats, and each MoE layer's routing."""
    num_sequences, length = tokens_BS.shape[0], tokens_BS.shape[1] - 1
    routings: list[Routing] = []
    hidden_TD, _ = decoder(
        tokens_BS[:, :-1].flatten(),
        rows_of_batch(num_sequences, length, tokens_BS.device),
        CausalAttention(num_sequences),
        AllExpertsHere(routings),
    )
    return F.cross_entropy(decoder.logits(hidden_TD), tokens_BS[:, 1:].flatten()), routings


def sample_batch(stream: NDArray[np.uint16], config: OptimiserConfig, step: int) -> Tensor:
    """Random windows [batch, length + 1], drawn from the seed and the step."""
    draw = np.random.default_rng((config.seed, step))
    starts = draw.integers(0, len(stream) - config.sequence_length - 1, config.batch_size)
    windows = stream[starts[:, None] + np.arange(config.sequence_length + 1)]
    return torch.from_numpy(windows.astype(np.int64))


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
        """Take over what `state` returned."""
        for key, tensor in state.items():
            kind, name = key.split("/")
            value = self.master[name]
            if kind == "master":
                value.copy_(tensor)
            else:
                device = "cpu" if kind == "step" and not value.is_cuda else value.device
                self.adamw.state[value][kind] = tensor.to(device)
        self.publish()


@torch.no_grad()
def held_out_bits_per_byte(decoder: Decoder, corpus: Corpus, config: OptimiserConfig, device: torch.device) -> float:
    """Mean loss over windows spread evenly over the held-out stream, in bits per byte of its text."""
    length = min(config.sequence_length, len(corpus.held_out) - 1)
    count = max(1, min(config.evaluate_tokens, len(corpus.held_out) - 1) // length)
    starts = np.linspace(0, len(corpus.held_out) - length - 1, count).astype(np.int64)
    windows = torch.from_numpy(corpus.held_out[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    losses = [
        forward_loss(decoder, batch.to(device))[0].double() * len(batch)
        for batch in windows.split(config.batch_size)
    ]
    nats_per_token = float(torch.stack(losses).sum()) / count
    return nats_per_token / math.log(2) * len(corpus.held_out) / corpus.held_out_bytes


@dataclass(frozen=True)
class Run:
    """The folder of a training run: `step-000500/` checkpoints, and `state/` to resume from."""

    folder: Path

    def checkpoint(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def save_state(self, step: int, state: dict[str, Tensor]) -> None:
        """Write the optimiser's state; the step is named last, so a half-written state is never resumed."""
        name = f"optimiser-{step:06d}.safetensors"
        with atomic_path(self.folder / "state" / name) as temporary:
            save_file({key: value.cpu().contiguous() for key, value in state.items()}, temporary)
        write_json(self.folder / "state" / "latest.json", {"step": step, "optimiser": name})
        for old in (self.folder / "state").glob("optimiser-*.safetensors"):
            if old.name != name:
                old.unlink()

    def load_state(self) -> tuple[int, dict[str, Tensor]]:
        latest = read_json(self.folder / "state" / "latest.json", "run to resume", "leave out --resume")
        return latest["step"], load_file(self.folder / "state" / latest["optimiser"])


def train(
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    resume: bool,
    report: Callable[[Progress], None],
) -> Path:
    """Run the training; returns the folder of the final checkpoint. Raises InputError for bad input."""
    run = Run(folder)
    corpus, tokenizer = build_corpus(
        find_texts(config.data.texts), config.data.held_out, config.model.vocab_size
    )
    if min(len(corpus.train), len(corpus.held_out)) <= config.training.sequence_length + 1:
        raise InputError(
            f"{', '.join(config.data.texts)}: {len(corpus.train)} training and {len(corpus.held_out)} held-out "
            f"tokens are fewer than sequence_length {config.training.sequence_length}; give more text"
        )
    decoder = Decoder(config.model)
    initialise(decoder, torch.Generator().manual_seed(config.training.seed))
    decoder.to(device)
    optimiser = MasterAdamW(decoder, config.training)  # masters are float32, whatever the decoder becomes
    decoder.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    first = 0
    if resume:
        first, state = run.load_state()
        optimiser.load(state)
    save_at = {*config.checkpoint_steps, config.training.steps}
    meter = Meter(config.training, report)
    for step in range(first, config.training.steps + 1):
        if step in save_at and (step > first or not resume):
            bits = held_out_bits_per_byte(decoder, corpus, config.training, device)
            weights = dict(zip(decoder.state_dict(), optimiser.master, strict=True))
            save_checkpoint(run.checkpoint(step), config.model, weights, tokenizer, torch.bfloat16)
            run.save_state(step, optimiser.state())
            meter.checkpoint(step, bits)
        if step < config.training.steps:
            loss, routings = forward_loss(
                decoder, sample_batch(corpus.train, config.training, step).to(device, non_blocking=True)
            )
            balance = torch.stack([balance_loss(routing) for routing in routings]).sum()
            (loss + config.training.balance_weight * balance).backward()
            optimiser.step(step)
            meter.step(step, loss, routings)
    return run.checkpoint(config.training.steps)


class Meter:
    """Reports progress every tenth of a percent of the run, at least every 10 steps apart."""

    def __init__(self, config: OptimiserConfig, report: Callable[[Progress], None]) -> None:
        self.report = report
        self.every = max(1, min(50, config.steps // 20))
        self.tokens_per_step = config.batch_size * config.sequence_length
        self.last = (time.perf_counter(), -1)
        self.latest: Progress | None = None

    def step(self, step: int, loss: Tensor, routings: list[Routing]) -> None:
        if (step + 1) % self.every:
            return
        loss_value, balance = float(loss.detach()), float(busiest_over_mean(routings))  # waits for the device
        now = time.perf_counter()
        rate = (step - self.last[1]) * self.tokens_per_step / (now - self.last[0])
        self.last = (now, step)
        self.latest = Progress(step + 1, loss_value, balance, rate)
        self.report(self.latest)

    def checkpoint(self, step: int, bits_per_byte: float) -> None:
        latest = self.latest or Progress(step, math.nan, math.nan, math.nan)
        self.report(Progress(step, latest.loss, latest.balance, latest.tokens_per_s, bits_per_byte))
        self.last = (time.perf_counter(), step - 1)

"""Training of a small GPT-MoE on text: next-token loss plus the GShard balance loss, bf16 on GPUs.

Batches depend only on the seed and the step, so a resumed run sees the batches of an unbroken run.

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
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from exflow.errors import InputError, WrongResult
from exflow.model.attention import CausalAttention, rows_of_batch
from exflow.model.checkpoint import save_checkpoint
from exflow.model.decoder import Decoder, Routing, initialise
from exflow.model.single_process import AllExpertsHere
from exflow.texts import find_texts
from exflow.train.config import OptimiserConfig, TrainConfig
from exflow.train.corpus import Corpus, build_corpus
from exflow.train.optimizer import MasterAdamW
from exflow.train.run import Run


@dataclass(frozen=True)
class StepFigures:
    """Figures of a step. loss: nats a token. balance: busiest expert's load over the mean, worst layer."""

    loss: float
    balance: float
    tokens_per_s: float


@dataclass(frozen=True)
class Progress:
    """Measurements after `step` steps: figures of the last step, or at a checkpoint of the held-out text."""

    step: int
    figures: StepFigures | None = None
    held_out_bits_per_byte: float | None = None


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
    """Load of the busiest expert over the mean, in the worst layer."""
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
    starts = draw.integers(0, len(stream) - config.sequence_length, config.batch_size)
    windows = stream[starts[:, None] + np.arange(config.sequence_length + 1)]
    return torch.from_numpy(windows.astype(np.int64))


@torch.no_grad()
def held_out_bits_per_byte(decoder: Decoder, corpus: Corpus, config: OptimiserConfig) -> float:
    """Mean loss over windows spread evenly over the held-out stream, in bits per byte of its text."""
    length = config.sequence_length
    count = max(1, min(config.evaluate_tokens, len(corpus.held_out) - 1) // length)
    starts = np.linspace(0, len(corpus.held_out) - length - 1, count).astype(np.int64)
    windows = torch.from_numpy(corpus.held_out[starts[:, None] + np.arange(length + 1)].astype(np.int64))
    device = decoder.embedding.weight.device
    losses = [
        forward_loss(decoder, batch.to(device))[0].double() * len(batch)
        for batch in torch.split(windows, config.batch_size)
    ]
    nats_per_token = float(torch.stack(losses).sum()) / count
    return nats_per_token / math.log(2) * len(corpus.held_out) / corpus.held_out_bytes


def finite(loss: float, step: int) -> float:
    """Return the loss; raise WrongResult if it is NaN or infinite, so that the model is not saved."""
    if not math.isfinite(loss):
        raise WrongResult(f"step {step}: the loss is {loss}; lower learning_rate, or give other text")
    return loss


class Meter:
    """Reports every 50th step, and in a short run about twenty times."""

    def __init__(self, config: OptimiserConfig, report: Callable[[Progress], None], step: int) -> None:
        self.report = report
        self.every = max(1, min(50, config.steps // 20))
        self.tokens_per_step = config.batch_size * config.sequence_length
        self.start(step)

    def start(self, step: int) -> None:
        """Measure the speed from here on."""
        self.since = (time.perf_counter(), step)

    def after(self, step: int, loss: Tensor, routings: list[Routing]) -> None:
        """Report if a report is due; reading the figures waits for the device."""
        if step % self.every:
            return
        loss_value, balance = finite(float(loss.detach()), step), float(busiest_over_mean(routings))
        started, first = self.since
        rate = (step - first) * self.tokens_per_step / (time.perf_counter() - started)
        self.report(Progress(step, StepFigures(loss_value, balance, rate)))
        self.start(step)


def corpus_of(config: TrainConfig) -> tuple[Corpus, Tokenizer]:
    """The texts of a run as token streams. Raises InputError if they do not fill a sequence."""
    names, length = config.data.texts, config.training.sequence_length
    corpus, tokenizer = build_corpus(find_texts(names), config.data.held_out, config.model.vocab_size)
    if min(len(corpus.train), len(corpus.held_out)) <= length:
        raise InputError(
            f"{', '.join(names)}: {len(corpus.train)} training and {len(corpus.held_out)} held-out "
            f"tokens, both must be more than sequence_length {length}; give more text"
        )
    return corpus, tokenizer


def new_model(config: TrainConfig, device: torch.device) -> tuple[Decoder, MasterAdamW]:
    decoder = Decoder(config.model)
    initialise(decoder, torch.Generator().manual_seed(config.training.seed))
    decoder.to(device)
    optimizer = MasterAdamW(decoder, config.training)  # masters are float32, whatever the decoder becomes
    decoder.to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return decoder, optimizer


def train(
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    resume: bool,
    report: Callable[[Progress], None],
) -> Path:
    """Run the training; returns the folder of the final checkpoint. Raises InputError for bad input.

    resume: continue a stopped run from its last checkpoint.
    """
    settings, run = config.training, Run(folder)
    corpus, tokenizer = corpus_of(config)
    decoder, optimizer = new_model(config, device)
    first = 0
    if resume:
        first, state = run.load_state(config)
        optimizer.load(state)
    meter = Meter(settings, report, first)
    for step in range(first, settings.steps + 1):
        if step in {*config.checkpoint_steps, settings.steps}:
            held_out = finite(held_out_bits_per_byte(decoder, corpus, settings), step)
            save_checkpoint(run.checkpoint(step), config.model, optimizer.master, tokenizer, torch.bfloat16)
            run.save_state(step, config, optimizer.state())
            report(Progress(step, held_out_bits_per_byte=held_out))
            meter.start(step)
        if step < settings.steps:
            batch_BS = sample_batch(corpus.train, settings, step).to(device, non_blocking=True)
            loss, routings = forward_loss(decoder, batch_BS)
            balance = torch.stack([balance_loss(routing) for routing in routings]).sum()
            torch.autograd.backward(loss + settings.balance_weight * balance)
            optimizer.step(step)
            meter.after(step + 1, loss, routings)
    return run.checkpoint(settings.steps)

"""Seconds of experts on this machine's cores, measured: the part of a step's time that a plan can change."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from exflow.model.config import ModelConfig
from exflow.model.decoder import Experts

ROWS, MORE_ROWS, RUNS = 64, 512, 15


@dataclass(frozen=True)
class ExpertRates:
    """Seconds of an expert that has any row, and of each row in it; 0 where no plan changes them."""

    expert_s: float
    row_s: float


NO_DIFFERENCE = ExpertRates(0.0, 0.0)


def expert_rates(config: ModelConfig, threads: int, slots: int) -> ExpertRates:
    """Measure a rank with `slots` experts that computes alone, in float32.

    Two differences: all experts instead of one for as many rows, and more rows of all experts.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            experts = Experts(config, slots)
            for each in experts.parameters():
                each.normal_(std=0.02)
            one, every, more = (
                best_s(partial(multiply, experts, config, rows, used))
                for rows, used in ((ROWS, 1), (ROWS, slots), (MORE_ROWS, slots))
            )
    finally:
        torch.set_num_threads(before)
    expert_s = (every - one) / max(1, slots - 1)
    return ExpertRates(max(0.0, expert_s), max(0.0, (more - every) / (MORE_ROWS - ROWS)))


def multiply(experts: Experts, config: ModelConfig, rows: int, used: int) -> Tensor:
    """`rows` rows, shared equally by the first `used` experts."""
    slots = (torch.arange(rows) % used)[:, None]
    result: Tensor = experts(torch.ones(rows, config.hidden_size), slots, torch.ones(rows, 1))
    return result


def best_s(work: Callable[[], object]) -> float:
    """The least seconds of some runs."""
    least = math.inf
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return least

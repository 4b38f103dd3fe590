"""Work of each rank of `exflow demo`: every strategy with both placements, one after the other."""

from pathlib import Path

import torch

from exflow.commands.demo_bench import Variant, measure
from exflow.files import write_json
from exflow.job.cluster import join_cluster
from exflow.model.checkpoint import Checkpoint
from exflow.model.sampling import Sampling
from exflow.placement.plan.plan import Plan
from exflow.placement.plan.strategy import Strategy
from exflow.runtime.request import Request

NEW_TOKENS = 32
STRATEGIES: tuple[Strategy, ...] = (Strategy.DISPATCH_COMBINE, Strategy.COHERENT, Strategy.REPLICATED)
PROMPTS = (
    "The captain looked at the sea and",
    "My fellow citizens, this year our country",
    'def read(self, path):\n    """Return',
    "A list is a sequence of",
    "Ownership is a set of rules that",
    "Tom has 12 apples and gives",
    "Prince Andrew entered the room",
    "ROMEO:\nWhat",
)


def run_demo_rank(model: Path, folder: Path) -> None:
    """Run all variants as one rank; rank 0 writes `result.json` into `folder`."""
    with join_cluster("cpu") as cluster:
        variants = [
            Variant(strategy, placement, Plan.load(folder / f"{placement}.json"))
            for strategy in STRATEGIES
            for placement in ("contiguous", "affinity")
        ]
        checkpoint = Checkpoint.open(model)
        figures, generations = measure(checkpoint, variants, demo_request(checkpoint), cluster, torch.float32)
        if cluster.rank == 0:
            tokens = [generation.tokens for generation in generations]
            write_json(folder / "result.json", {"variants": figures, "tokens": tokens})


def demo_request(checkpoint: Checkpoint) -> Request:
    tokenizer = checkpoint.tokenizer()
    prompts = [encoding.ids for encoding in tokenizer.encode_batch(list(PROMPTS))]
    return Request(prompts, NEW_TOKENS, Sampling(temperature=0.7, top_p=0.9))

"""Dispatch and combine as DeepEP publishes them, beside the times of h200.yaml's link."""

from collections.abc import Iterator
from typing import Any

from benchmarks.simulate.common import MACHINES
from exflow.placement.time.machines import load_machine

# EP, us of a dispatch in fp8, us of a combine in bf16: 128 tokens a GPU, 7168 wide, 8 experts, RDMA alone.
# github.com/deepseek-ai/DeepEP, README of February 2025, H800s with 400 Gbit/s cards
DEEPEP = ((8, 163, 318), (16, 173, 329), (32, 182, 350), (64, 186, 353), (128, 192, 369), (256, 194, 360))
DEEPEP_BYTES = (128 * 8 * (7168 + 4 * 7168 // 128), 128 * 8 * 2 * 7168)


def published() -> Iterator[dict[str, Any]]:
    """DeepEP's published times, beside those of the link between nodes of h200.yaml, which was fitted to
    them."""
    link = load_machine(MACHINES / "h200.yaml").between
    for ranks, *times in DEEPEP:
        for what, size, measured in zip(("dispatch", "combine"), DEEPEP_BYTES, times, strict=True):
            predicted = 1e6 * (link.latency_s + link.peer_s * (ranks - 1) + size / link.bytes_per_s)
            yield {"ranks": ranks, "what": what, "published_us": measured, "predicted_us": predicted} | {
                "error": predicted / measured - 1
            }

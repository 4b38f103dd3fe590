"""Going on with a recording that was stopped: it becomes that of an unbroken run, and nothing else."""

from pathlib import Path

import numpy as np
import pytest

from exflow.errors import InputError
from exflow.profiling.layout import RoutingLayout
from exflow.profiling.shard import Rows, row_slice
from exflow.profiling.trace import RoutingTrace
from exflow.profiling.writer import TraceWriter

LAYOUT = RoutingLayout("tiny", 2, (0, 1), num_experts=4, top_k=1)
SEQUENCES, LENGTH = 6, 5
SHARD = 8  # tokens


def rows() -> Rows:
    tokens = SEQUENCES * LENGTH
    return {
        "experts": np.random.default_rng(0).integers(0, 4, (tokens, 2, 1)).astype(np.uint8),
        "sequence": np.repeat(np.arange(SEQUENCES), LENGTH).astype(np.int32),
        "position": np.tile(np.arange(LENGTH), SEQUENCES).astype(np.int32),
        "phase": np.zeros(tokens, np.uint8),
    }


def writer(
    path: Path, source: str | None = "book", resume: bool = True, layout: RoutingLayout = LAYOUT
) -> TraceWriter:
    return TraceWriter(path, layout, has_weights=False, shard_tokens=SHARD, source=source, resume=resume)


@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("stop", range(SEQUENCES * LENGTH + 1))
def test_it_becomes_the_trace_of_an_unbroken_run(tmp_path: Path, stop: int, killed: bool) -> None:
    stopped = writer(tmp_path / "t", resume=False)
    stopped.append(row_slice(rows(), 0, stop))
    if not killed:
        stopped.close()
    with writer(tmp_path / "t") as going_on:
        written = stop // SHARD * SHARD if killed else stop
        assert going_on.resumed == max(0, written - 1) // LENGTH
        going_on.append(row_slice(rows(), going_on.resumed * LENGTH, SEQUENCES * LENGTH))
    assert (
        RoutingTrace.load(tmp_path / "t").digest()
        == RoutingTrace.from_arrays(
            rows()["experts"],
            num_experts=4,
            model="tiny",
            **{name: rows()[name] for name in ("sequence", "position", "phase")},
        ).digest()
    )
    assert len(list((tmp_path / "t").iterdir())) == 1 + -(-SEQUENCES * LENGTH // SHARD)


def test_there_may_be_nothing_yet(tmp_path: Path) -> None:
    assert writer(tmp_path / "t").resumed == 0
    assert writer(tmp_path / "t").resumed == 0


@pytest.mark.parametrize(
    ("source", "layout"),
    [("book", RoutingLayout("small", 2, (0, 1), num_experts=4, top_k=1)), ("law", LAYOUT), (None, LAYOUT)],
)
def test_another_recording_is_not_gone_on_with(
    tmp_path: Path, source: str | None, layout: RoutingLayout
) -> None:
    with writer(tmp_path / "t", resume=False) as first:
        first.append(rows())
    before = RoutingTrace.load(tmp_path / "t").digest()
    with pytest.raises(InputError, match=r"t: was recorded from another model or text.* without resuming"):
        writer(tmp_path / "t", source, layout=layout)
    assert RoutingTrace.load(tmp_path / "t").digest() == before


def test_an_error_before_the_first_row_leaves_the_old_trace(tmp_path: Path) -> None:
    for again in range(2):
        with writer(tmp_path / "t", resume=False) as first:
            first.append(rows())
        before = RoutingTrace.load(tmp_path / "t").digest()
        with pytest.raises(KeyboardInterrupt), writer(tmp_path / "t", resume=bool(again)):
            raise KeyboardInterrupt
        assert RoutingTrace.load(tmp_path / "t").digest() == before

"""Draws exchange.svg, why no row is overwritten before it is read: python docs/figures/exchange.py

Two ranks of a node, and what each does in exchanges n, n + 1 and n + 2. A rank's work is in one stream, from
left to right. Rows of exchange n lie in buffer n mod 2 of the rank that receives them.
"""

from dataclasses import dataclass
from pathlib import Path

from frame import framed

from exflow.report.draw.svg import rect, text

HERE = Path(__file__).parent
LEFT, UNIT = 108.0, 81.0  # of the time axis, and of one piece of work
HIGH = 34.0  # of a piece of work
RANK_A, RANK_B, BUFFERS = 46.0, 130.0, 190.0  # tops of the rows
HEIGHT = 300.0
STYLE = """\
svg .on{fill:var(--surface);font-weight:600}
svg .arrow{fill:none;stroke:var(--ink)}
"""
LABEL = (
    "Rank A writes exchange n + 2 into a buffer of rank B only after it saw B's flag of n + 1, "
    "which B raises after its last read of exchange n"
)


@dataclass(frozen=True)
class Work:
    """A piece of a rank's stream: from `start`, `length` units, in the colour of its buffer."""

    start: float
    length: float
    name: str
    kind: str

    @property
    def left(self) -> float:
        return LEFT + UNIT * self.start

    @property
    def right(self) -> float:
        return self.left + UNIT * self.length


A = [
    Work(0, 1, "write n", "exchange"),
    Work(1, 0.8, "flag n", "gpu"),
    Work(2.2, 1.2, "read n", "exchange"),
    Work(3.5, 1, "write n+1", "background"),
    Work(4.5, 0.9, "flag n+1", "gpu"),
    Work(7.3, 1.2, "read n+1", "background"),
    Work(8.6, 1.2, "write n+2", "exchange"),
]
B = [
    Work(0.3, 1, "write n", "exchange"),
    Work(1.3, 0.8, "flag n", "gpu"),
    Work(2.2, 2.3, "read n", "exchange"),
    Work(4.6, 1, "write n+1", "background"),
    Work(5.6, 0.9, "flag n+1", "gpu"),
    Work(6.6, 2.0, "read n+1", "background"),
]


def picture() -> str:
    body = [
        text(LEFT, 24, "Why rank A cannot overwrite what rank B still reads", kind="strong"),
        *_stream("rank A", RANK_A, A),
        *_stream("rank B", RANK_B, B),
        *_arrows(),
        *_buffers(),
    ]
    return framed(HEIGHT, LABEL, [_ARROWHEAD, *body], STYLE)


_ARROWHEAD = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0 0L8 4L0 8z" fill="var(--ink)"/></marker></defs>'
)


def _stream(name: str, top: float, works: list[Work]) -> list[str]:
    boxes = [rect(work.left, top, work.right - work.left - 2, HIGH, work.kind) for work in works]
    names = [
        text((work.left + work.right) / 2 - 1, top + 21, work.name, anchor="middle", kind="on")
        for work in works
    ]
    return [text(16, top + 21, name, kind="strong"), *boxes, *names]


def _arrows() -> list[str]:
    """B's flag lets A read n + 1; only then can A write n + 2 into B's buffer."""
    flag, read = B[4], A[5]
    return [
        f'<path class="arrow" marker-end="url(#tip)" d="M{flag.right - 8:g} {RANK_B:g}'
        f'L{read.left + 3:g} {RANK_A + HIGH + 2:g}"/>',
        text(A[4].right + 12, RANK_A + 14, "waits for", kind="small"),
        text(A[4].right + 12, RANK_A + 28, "all flags n+1", kind="small"),
    ]


def _buffers() -> list[str]:
    """The content of B's two buffers, the time until which it may be read, and the time of the next write."""
    rows = []
    for parity, write, read, kind in ((0, A[0], B[2], "exchange"), (1, A[3], B[5], "background")):
        top = BUFFERS + 34 * parity
        number = "n" if parity == 0 else "n+1"
        rows += [
            text(16, top + 16, f"buffer {parity} of B", kind="strong"),
            rect(write.left, top, read.right - write.left - 2, 22, kind),
            text((write.left + read.right) / 2, top + 15, f"rows of {number}", anchor="middle", kind="on"),
        ]
    again = A[6]
    rows += [
        rect(again.left, BUFFERS, again.right - again.left - 2, 22, "exchange"),
        text((again.left + again.right) / 2, BUFFERS + 15, "rows of n+2", anchor="middle", kind="on"),
        text(
            LEFT,
            BUFFERS + 92,
            "B's last read of n comes before B's flag n+1, and A's write n+2 comes after it.",
            kind="small",
        ),
    ]
    return rows


if __name__ == "__main__":
    (HERE / "exchange.svg").write_text(picture(), encoding="utf-8")

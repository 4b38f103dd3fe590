"""Measures how many tokens must be profiled: plans from more and more tokens, judged on held-out ones."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from benchmarks.study.data import Subject
from benchmarks.study.figures import Panel, Series, curves, markdown
from exflow.placement.learning_curve import learning_curve
from exflow.placement.make_plan import Solving, place
from exflow.placement.solve.objective import Objective
from exflow.placement.traffic.confidence import interval, split_by_sequence

SHARE, POINTS = 0.25, 7
CONTIGUOUS = "contiguous"


@dataclass(frozen=True)
class Profiled:
    """A plan from some tokens: messages of coherent decoding per token and layer.

    contiguous  those of the contiguous plan on the same held-out sequences
    """

    model: str
    tokens: int
    sequences: int
    on_its_own: float
    held_out: float
    low: float
    high: float
    contiguous: float

    @property
    def saved(self) -> float:
        """The share of the contiguous plan's messages that is not sent."""
        return 1 - self.held_out / self.contiguous


def measure(subject: Subject, solving: Solving, tell: Callable[[str], None]) -> list[Profiled]:
    """Rows of all domains together; a quarter of the sequences is held out."""
    train, held_out = split_by_sequence(subject.trace, SHARE)
    contiguous = place(train, subject.topology, solving=Solving(CONTIGUOUS))
    theirs = interval(contiguous, held_out)["messages_per_token_layer"]["value"]
    points = learning_curve(
        subject.trace,
        subject.topology,
        objective=Objective(),
        solving=solving,
        share=SHARE,
        points=POINTS,
        tell=lambda tokens: tell(f"{subject.name}: a plan from {tokens:,} tokens"),
    )
    return [Profiled(model=subject.name, contiguous=theirs, **asdict(point)) for point in points]


def table(rows: list[Profiled]) -> str:
    headings = ["model", "tokens", "sequences", "held-out messages", "of contiguous", "on its own tokens"]
    lines = [
        [
            each.model,
            f"{each.tokens:,}",
            str(each.sequences),
            f"{each.held_out:.3f} ({each.low:.3f} to {each.high:.3f})",
            f"{each.held_out / each.contiguous:.3f}",
            f"{each.on_its_own:.3f}",
        ]
        for each in rows
    ]
    return markdown(headings, lines)


def figure(rows: list[Profiled]) -> str:
    models = list(dict.fromkeys(each.model for each in rows))
    messages, saved = [], []
    for colour, model in enumerate(models, start=1):
        points = [each for each in rows if each.model == model]
        x = [each.tokens for each in points]
        low, value, high = (
            [getattr(each, name) / each.contiguous for each in points] for name in ("low", "held_out", "high")
        )
        messages.append(Series(model, colour, x, value, low, high))
        saved.append(Series(model, colour, x, [each.saved / points[-1].saved for each in points]))
    return curves(
        "Messages on held-out sequences against the tokens that a plan was made from",
        [
            Panel("profiled tokens", "messages over those of contiguous", messages, logarithmic=True),
            Panel("profiled tokens", "share of what all tokens save", saved, logarithmic=True),
        ],
    )

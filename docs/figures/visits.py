"""Draws visits.svg, what a placement changes for an engine: python docs/figures/visits.py

Three tokens, two experts each, on two GPUs of two experts. Where a token's experts share a GPU, it is sent
to one GPU instead of two.
"""

from pathlib import Path

from frame import framed

from exflow.report.draw.svg import WIDTH, rect, text

HERE = Path(__file__).parent
TOKENS = ((0, 2), (1, 3), (0, 2))  # the experts that each takes in this layer
IN_ORDER, PLACED = ((0, 1), (2, 3)), ((0, 2), (1, 3))  # the experts of each GPU
HEIGHT, HALF = 236.0, WIDTH / 2
TOKEN_TOP, GPU_TOP = 46.0, 140.0
STYLE = """\
svg .on{fill:var(--surface);font-weight:600}
svg .way{fill:none;stroke:var(--inter);stroke-width:2}
"""


def visits(placement: tuple[tuple[int, ...], ...]) -> list[tuple[int, int]]:
    """Each (token, GPU) where a token has an expert, once."""
    return [
        (token, gpu)
        for token, experts in enumerate(TOKENS)
        for gpu, held in enumerate(placement)
        if set(experts) & set(held)
    ]


def picture() -> str:
    before, after = (len(visits(each)) for each in (IN_ORDER, PLACED))
    label = (
        f"Three tokens, two experts each: {before} visits of GPUs with experts in order, {after} when placed"
    )
    sides = ((0, "Experts in order", IN_ORDER), (HALF, "Experts used together share a GPU", PLACED))
    return framed(HEIGHT, label, (shape for side in sides for shape in _side(*side)), STYLE)


def _side(left: float, title: str, placement: tuple[tuple[int, ...], ...]) -> list[str]:
    ways = visits(placement)
    drawn = [text(left + 40, 24, f"{title}: {len(ways)} visits of a GPU", kind="strong")]
    drawn += [
        f'<path class="way" d="M{_token_x(left, token) + 62:g} {TOKEN_TOP + 28:g}'
        f'L{_gpu_x(left, gpu) + 80:g} {GPU_TOP - 2:g}"/>'
        for token, gpu in ways
    ]
    for token, experts in enumerate(TOKENS):
        x = _token_x(left, token)
        drawn += [rect(x, TOKEN_TOP, 124, 28, "gpu")]
        name = f"token {token}: {experts[0]} and {experts[1]}"
        drawn += [text(x + 62, TOKEN_TOP + 18, name, anchor="middle", kind="on")]
    for gpu, held in enumerate(placement):
        x = _gpu_x(left, gpu)
        drawn += [rect(x, GPU_TOP, 160, 66, "frame"), text(x + 8, GPU_TOP + 58, f"GPU {gpu}", kind="small")]
        for place, expert in enumerate(held):
            at = x + 10 + 72 * place
            drawn += [rect(at, GPU_TOP + 10, 68, 28, "intra")]
            drawn += [text(at + 34, GPU_TOP + 28, f"expert {expert}", anchor="middle", kind="on")]
    return drawn


def _token_x(left: float, token: int) -> float:
    return left + 40 + 130 * token


def _gpu_x(left: float, gpu: int) -> float:
    return left + 40 + 210 * gpu


if __name__ == "__main__":
    (HERE / "visits.svg").write_text(picture(), encoding="utf-8")

"""The frame of the drawings here: light or dark as the reader's system is, on a ground of their own."""

from collections.abc import Iterable

from exflow.report.draw.colours import DARK, LIGHT
from exflow.report.draw.svg import STYLE, WIDTH


def framed(height: float, label: str, body: Iterable[str], style: str = "") -> str:
    """A drawing as a file. `label` is what a screen reader says of it, `style` more CSS than the report's."""
    light, dark = ("".join(f"--{name}:{value};" for name, value in each.items()) for each in (LIGHT, DARK))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{label}">'
        f"<style>svg{{{light}}}@media (prefers-color-scheme:dark){{svg{{{dark}}}}}\n{STYLE}{style}</style>"
        f'<rect width="100%" height="100%" fill="var(--surface)"/>{"".join(body)}</svg>\n'
    )

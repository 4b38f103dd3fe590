"""The colours of the report, light and dark, as CSS custom properties; a drawing only names them.

Ramps of heat maps go from the page's background to its opposite, so that more is always what stands out.
"""

from collections.abc import Sequence

import numpy as np

LIGHT = {
    "page": "#f9f9f7",
    "surface": "#fcfcfb",
    "ink": "#0b0b0b",
    "ink-2": "#52514e",
    "muted": "#706e69",
    "grid": "#e1e0d9",
    "axis": "#c3c2b7",
    "link": "#1c5cab",
    "intra": "#2a78d6",
    "inter": "#eb6834",
    "stay": "#1baf7a",
    "plan-0": "#8a8880",
    "plan-1": "#4a3aa7",
    "plan-2": "#d0477f",
    "plan-3": "#b07a00",
    "plan-4": "#008300",
}
DARK = {
    "page": "#0d0d0d",
    "surface": "#1a1a19",
    "ink": "#ffffff",
    "ink-2": "#c3c2b7",
    "muted": "#9c9a93",
    "grid": "#2c2c2a",
    "axis": "#4a4a46",
    "link": "#6da7ec",
    "intra": "#3987e5",
    "inter": "#d95926",
    "stay": "#199e70",
    "plan-0": "#a3a199",
    "plan-1": "#9085e9",
    "plan-2": "#e06a98",
    "plan-3": "#d9a520",
    "plan-4": "#3fae3f",
}
PLAN_COLOURS = 4  # besides the baseline's; further plans begin again, told apart by marker and name

RAMPS = {
    "amount-light": ("#eef3fa", "#cde2fb", "#86b6ef", "#3987e5", "#1c5cab", "#0d366b"),
    "amount-dark": ("#20262e", "#0d366b", "#1c5cab", "#3987e5", "#86b6ef", "#e3effc"),
    "balance-light": ("#184f95", "#6da7ec", "#f0efec", "#ee9291", "#a82626"),
    "balance-dark": ("#9ec5f4", "#2a78d6", "#383835", "#c94a49", "#f3b4b3"),
    "chance-light": ("#a82626", "#ee9291", "#f0efec", "#6da7ec", "#184f95"),
    "chance-dark": ("#f3b4b3", "#c94a49", "#383835", "#2a78d6", "#9ec5f4"),
}
_KINDS = ("amount", "balance", "chance")


def css() -> str:
    """Style sheet with both sets of colours: dark if the reader's system asks for it, light on paper."""
    light, dark = (
        "".join(f"--{name}:{value};" for name, value in {**colours, **_ramps(mode)}.items())
        for mode, colours in (("light", LIGHT), ("dark", DARK))
    )
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
    )


def filters() -> str:
    """One SVG filter for each ramp. It turns the grey of a heat map's image into the ramp's colours."""
    return "".join(
        f'<filter id="{name}" color-interpolation-filters="sRGB" x="0" y="0" width="1" height="1">'
        f"<feComponentTransfer>{_functions(ramp)}</feComponentTransfer></filter>"
        for name, ramp in RAMPS.items()
    )


def palette(ramp: str) -> list[tuple[int, int, int]]:
    """256 colours of a ramp, for an image that stands alone; the first belongs to no value."""
    stops = np.array([rgb(colour) for colour in RAMPS[ramp]])
    where = np.linspace(0, len(stops) - 1, 256)
    channels = [np.interp(where, np.arange(len(stops)), channel) for channel in stops.T]
    return [(int(r), int(g), int(b)) for r, g, b in np.rint(np.stack(channels, axis=1))]


def rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _ramps(mode: str) -> dict[str, str]:
    return {kind: f"url(#{kind}-{mode})" for kind in _KINDS}


def _functions(ramp: Sequence[str]) -> str:
    channels = zip(*(rgb(colour) for colour in ramp), strict=True)
    return "".join(
        f'<feFunc{name} type="table" tableValues="{" ".join(f"{value / 255:.3f}" for value in channel)}"/>'
        for name, channel in zip("RGB", channels, strict=True)
    )

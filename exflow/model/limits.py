"""Upper bounds of a model's configuration: a small file must not cause endless work.

The bounds are far above any model. They keep the bytes of every tensor, and all counts, within 63 bits.
"""

from typing import Annotated

from pydantic import Field

MAX_EXPERTS_IN_ALL = 1 << 16
LayerCount = Annotated[int, Field(gt=0, le=512)]
ExpertCount = Annotated[int, Field(gt=0, le=1 << 16)]
HeadCount = Annotated[int, Field(gt=0, le=1 << 16)]
Width = Annotated[int, Field(gt=0, le=1 << 20)]
TokenCount = Annotated[int, Field(gt=0, le=1 << 24)]  # entries of a vocabulary
PositionCount = Annotated[int, Field(gt=0, lt=1 << 31)]
Theta = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Turns = Annotated[float, Field(ge=1e-6, le=1e6)]  # turns of a rotary pair in the original positions

"""How large a configuration may make a model: what a small file says must not make work without end.

The bounds are far above any model, and keep the bytes of every tensor, and all counts, within 63 bits.
"""

from typing import Annotated

from pydantic import Field

MAX_EXPERTS_IN_ALL = 1 << 16
LayerCount = Annotated[int, Field(gt=0, le=512)]
ExpertCount = Annotated[int, Field(gt=0, le=1 << 16)]
HeadCount = Annotated[int, Field(gt=0, le=1 << 16)]
Width = Annotated[int, Field(gt=0, le=1 << 20)]
TokenCount = Annotated[int, Field(gt=0, le=1 << 24)]  # of a vocabulary
PositionCount = Annotated[int, Field(gt=0, lt=1 << 31)]
Theta = Annotated[float, Field(gt=1, allow_inf_nan=False)]
Turns = Annotated[float, Field(ge=1e-6, le=1e6)]  # of a rotary pair in the original positions

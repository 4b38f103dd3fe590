"""Rotary positions in a Hugging Face configuration, read as transformers 5 does.

Two spellings are in use. transformers 4 wrote `rope_scaling`, with `rope_theta` beside it. transformers 5
writes `rope_parameters`, with `rope_theta` in it. Model cards advise to add `rope_scaling` for long contexts,
so some files have both: then `rope_scaling` counts, and `rope_parameters` is ignored
(transformers/modeling_rope_utils.py, `convert_rope_params_to_dict`).
"""

from math import log
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    model_validator,
)

from exflow.model.limits import PositionCount, Theta


class RopeParameters(BaseModel):
    """The content of `rope_scaling` or `rope_parameters`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rope_type: Literal["default", "yarn"] = Field(
        default="default", validation_alias=AliasChoices("rope_type", "type")
    )
    rope_theta: Theta | None = None
    partial_rotary_factor: float = Field(default=1.0, ge=1.0, le=1.0)
    factor: PositiveFloat | None = None
    original_max_position_embeddings: PositionCount | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: NonNegativeFloat | None = None
    beta_slow: NonNegativeFloat | None = None
    truncate: bool | None = True
    mscale: float | None = None
    mscale_all_dim: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_for_all_layers(cls, value: Any) -> Any:
        for key, part in value.items() if isinstance(value, dict) else ():
            if isinstance(part, dict):
                raise ValueError(f"{key!r} has settings of its own; layers may not differ in them here")
        return value

    @model_validator(mode="after")
    def _yarn_says_how_far(self) -> Self:
        if self.rope_type == "yarn" and "factor" not in self.model_fields_set:
            raise ValueError("rope_type 'yarn' needs the key 'factor'; add it")
        return self


class RopeConfig(BaseModel):
    """The keys of a configuration that rotary positions depend on. A family sets the defaults."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    default_theta: ClassVar[float] = 10_000.0
    default_rope: ClassVar[RopeParameters] = RopeParameters()  # used if neither spelling has a value

    max_position_embeddings: PositionCount
    rope_theta: Theta | None = None
    rope_scaling: RopeParameters | None = None
    rope_parameters: RopeParameters | None = None
    original_max_position_embeddings: PositionCount | None = None
    partial_rotary_factor: float | None = Field(default=None, ge=1.0, le=1.0)

    @model_validator(mode="before")
    @classmethod
    def _empty_scaling_says_nothing(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("rope_scaling") == {}:
            return value | {"rope_scaling": None}
        return value

    @model_validator(mode="after")
    def _theta_is_known(self) -> Self:
        if self._theta() is None:
            raise ValueError("rope_theta is null; give a number, or leave the key out")
        return self

    def rope(self) -> dict[str, Any]:
        """The settings of a Rope (config.py)."""
        given, theta = self._given(), self._theta()
        if given.rope_type == "default":
            return {"theta": theta}
        original = (
            self.original_max_position_embeddings
            or given.original_max_position_embeddings
            or self.max_position_embeddings
        )
        factor = given.factor or self.max_position_embeddings / original
        yarn = {
            "factor": factor,
            "original_positions": original,
            "attention_factor": given.attention_factor or _attention_factor(factor, given),
            "beta_fast": given.beta_fast or 32.0,
            "beta_slow": given.beta_slow or 1.0,
            "truncate": bool(given.truncate),
        }
        return {"theta": theta, "yarn": yarn}

    def _given(self) -> RopeParameters:
        return self.rope_scaling or self.rope_parameters or self.default_rope

    def _theta(self) -> float | None:
        """rope_theta of the spelling that counts, else the top-level key, else the family's default.

        A null value is not an absent one.
        """
        for place in (self._given(), self):
            if "rope_theta" in place.model_fields_set:
                return place.rope_theta
        return self.default_theta


def _attention_factor(factor: float, given: RopeParameters) -> float:
    """YaRN's default scale of rotated queries and keys, used if the configuration has none."""

    def scale(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * log(factor) + 1.0

    if given.mscale and given.mscale_all_dim:
        return scale(given.mscale) / scale(given.mscale_all_dim)
    return scale(1.0)

"""Settings of V-JEPA 2.1. Never imports torch."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from vjepa.methods.vjepa2.settings import MaskedPredictionSettings


class VJEPA21Settings(MaskedPredictionSettings):
    """Predict hidden and visible tokens at several depths (V-JEPA 2.1, arXiv:2603.14482). Requires
    `model.predict_context` and is meant for four `model.levels`."""

    name: Literal["vjepa2_1"] = "vjepa2_1"
    predicts_context: ClassVar[bool] = True

    context_weight: float = Field(default=0.5, ge=0)
    """Weight of the error on visible tokens at the end of its ramp."""

    context_ramp: tuple[int, int] = (15_000, 30_000)
    """Steps between which that weight grows linearly from 0."""

    by_distance: bool = True
    """Weight the error of a visible token by 1 / sqrt(distance to the nearest hidden token). V-JEPA 2.1 turns this off
    in its cooldown."""

    @model_validator(mode="after")
    def _ramp_ascends(self) -> "VJEPA21Settings":
        start, end = self.context_ramp
        if not 0 <= start <= end:
            raise ValueError(f"context_ramp must be [start, end] with 0 <= start <= end, got [{start}, {end}]")
        return self

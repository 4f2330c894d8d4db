"""Settings of V-JEPA 2. Never imports torch."""

import os
from typing import ClassVar, Literal

from pydantic import Field

from vjepa.methods.mask_settings import BLOCKS, Mask
from vjepa.methods.settings import MethodSettings, RunSettings, check_window


class MaskedPredictionSettings(MethodSettings):
    """Settings shared by the methods that predict features of hidden tokens."""

    masks: tuple[Mask, ...] = Field(default=BLOCKS, min_length=1)
    """Kinds of mask. Every clip is seen through each of them in every step."""

    loss_exponent: float = Field(default=1.0, gt=0)
    """p of mean(|error|^p) / p."""

    teacher: str | None = None
    """Native export whose encoder gives the targets, in place of the moving average (SALT, arXiv:2509.24317, stage 2,
    and distillation). It stays as it is, and may have another width: a linear map then follows the predictor.
    Checkpoints hold its path and sha256, and no target. The student is exported."""

    predicts_context: ClassVar[bool] = False
    """True if the method also predicts visible tokens."""

    @property
    def mask_kinds(self) -> tuple[Mask, ...]:
        """Kinds of mask through which every clip is seen."""
        return self.masks

    def with_absolute_paths(self) -> "MaskedPredictionSettings":
        """Return the same settings with absolute paths."""
        return self.model_copy(update={"teacher": self.teacher and os.path.abspath(self.teacher)})

    def check(self, run: RunSettings) -> None:
        """Reject a class token, which stays untrained, and a predictor without the output layers that are trained."""
        check_window(run)
        if run.model.class_token:
            raise ValueError(f"objective {self.name} does not train a class token; remove model.class_token")
        if run.model.predict_context != self.predicts_context:
            state = "missing" if self.predicts_context else "left untrained"
            raise ValueError(
                f"model.predict_context ({run.model.predict_context}) does not fit objective {self.name}: an output "
                f"layer would be {state}; set it to {self.predicts_context}"
            )


class VJEPA2Settings(MaskedPredictionSettings):
    """Predict the target encoder's layer-normed features of hidden tokens (V-JEPA 2, arXiv:2506.09985)."""

    name: Literal["vjepa2"] = "vjepa2"

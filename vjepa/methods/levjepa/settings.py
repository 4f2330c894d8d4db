"""Settings of LeVJEPA. Never imports torch."""

from typing import Literal

from pydantic import Field

from vjepa.methods.mask_settings import Mask, RandomMask, ReferenceMask
from vjepa.methods.settings import MethodSettings, RunSettings, check_window
from vjepa_data.settings import Share


class LeVJEPASettings(MethodSettings):
    """Bring views of a clip together and keep embeddings spread (LeVJEPA, arXiv:2608.27395). The method has neither a
    predictor nor a target."""

    name: Literal["levjepa"] = "levjepa"

    masks: tuple[Mask, ...] = (RandomMask(visible_share=0.05),)
    """The only kind of mask, through which every view is seen. The paper keeps a random 5 % of the tokens."""

    average: bool = True
    """Keep a moving average of the encoder. Training does not read it. Evaluations and exports use it."""

    local_views: int = Field(default=10, ge=1)
    """Small crops of each clip, in addition to the global view."""

    local_px: int = Field(default=96, ge=1)
    """Height and width of a small crop, in pixels: a multiple of `model.patch_px`."""

    local_scale: tuple[Share, Share] = (0.02, 0.4)
    """Smallest and largest area of a small crop, as a share of the global view."""

    jitter: Share = 0.8
    """Probability that a small crop changes brightness, contrast and saturation."""

    gray: Share = 0.2
    """Probability that a small crop loses its colour."""

    projector: tuple[int, int] = (2048, 256)
    """Hidden channels of the projector, and channels of an embedding."""

    regularizer: Literal["sigreg", "vicreg", "barlow"] = "sigreg"
    """The term that prevents collapse."""

    weight: float = Field(default=0.02, ge=0)
    """Weight of the regularizer. LeVJEPA uses 0.02 with sigreg. VICReg's own proportions are 1 with vicreg."""

    slices: int = Field(default=1024, ge=1)
    """Random directions of sigreg."""

    knots: int = Field(default=17, ge=2)
    """Points at which sigreg compares characteristic functions."""

    @property
    def mask_kinds(self) -> tuple[Mask, ...]:
        """The only kind of mask, through which every view is seen."""
        return self.masks

    def check(self, run: RunSettings) -> None:
        """Reject crops that are not whole tokens, several masks, several levels, and accumulation."""
        check_window(run)
        if self.local_px % run.model.patch_px:
            raise ValueError(
                f"objective.local_px ({self.local_px}) must be divisible by model.patch_px ({run.model.patch_px})"
            )
        if len(self.masks) != 1 or isinstance(self.masks[0], ReferenceMask):
            raise ValueError("objective levjepa takes one kind of mask with exact counts; try random")
        if run.model.levels:
            raise ValueError("objective levjepa trains the last block alone; remove model.levels")
        if run.model.predict_context:
            raise ValueError("objective levjepa has no predictor; remove model.predict_context")
        if run.accumulate > 1:
            raise ValueError(
                f"objective levjepa compares all clips of a step, so parallel.accumulate ({run.accumulate}) would "
                "change the result. Use more ranks or a smaller batch_size."
            )

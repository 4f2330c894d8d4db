"""Settings of the memory method. Never imports torch."""

from typing import Literal

from pydantic import Field

from vjepa.methods.settings import MethodSettings, RunSettings
from vjepa_data.settings import Share


class MemorySettings(MethodSettings):
    """Predict a later clip of a video from a recurrent memory of its earlier clips. Requires `data.clip.sequence`."""

    name: Literal["memory"] = "memory"

    encoder: str | None = None
    """Native export whose encoder is used and stays frozen (`vjepa export --format native`). By default the encoder is
    trained with the memory, and predictions aim at its moving average."""

    whiten: bool = False
    """Whiten the features that the memory reads and predicts, so that the error asks for more than the few directions
    with most of the variance. The map is fitted to the run's first batch, under the frozen encoder."""

    side: int = Field(default=4, ge=1)
    """Rows and columns of the cells to which the tokens of a clip are averaged."""

    pairs: int = Field(default=8, ge=1)
    """Pairs of an earlier and a later clip of each sequence that are compared in a step."""

    returns: Share = 0.0
    """Share of these pairs that are drawn where a memory helps: the later clip resembles a clip before the earlier one,
    and not the earlier one itself. Other pairs have uniform distances."""

    shown: int = Field(default=2, ge=0)
    """Cells of the later clip that the predictor sees, so that it can tell which part of the scene is visible again.
    The other cells are predicted."""

    gap_clips: tuple[int, ...] = (2, 8)
    """Ends of the ranges of gaps, in clips, for which the gain of memory is logged: 1-2, 3-8, and more."""

    def check(self, run: RunSettings) -> None:
        """Reject runs without sequences, clips of mixed length, and settings that the encoder would ignore."""
        clip = run.data.clip
        if clip.sequence < 2:
            raise ValueError(
                f"objective memory learns from several clips of a video, and data.clip.sequence is {clip.sequence}; "
                "try 16"
            )
        if self.whiten and self.encoder is None:
            raise ValueError(
                "objective.whiten needs features that stay as they are; set objective.encoder, or whiten to false"
            )
        if self.whiten and run.accumulate > 1:
            raise ValueError(
                f"objective.whiten is fitted to all clips of the first step, so parallel.accumulate ({run.accumulate}) "
                "would change it; set it to 1"
            )
        lengths = sorted({source.frames or clip.frames for source in run.data.sources})
        if len(lengths) > 1 or lengths[0] % run.model.tubelet_frames:
            raise ValueError(
                f"objective memory needs clips of one length, a multiple of model.tubelet_frames "
                f"({run.model.tubelet_frames}); the sources have {lengths}"
            )
        side = run.data.crop.px // run.model.patch_px
        if self.side > side:
            raise ValueError(f"objective.side ({self.side}) exceeds the {side} x {side} tokens of a frame")
        if self.shown >= self.side**2:
            raise ValueError(f"objective.shown ({self.shown}) must be below objective.side squared ({self.side**2})")
        if list(self.gap_clips) != sorted(set(self.gap_clips)) or not all(gap >= 1 for gap in self.gap_clips):
            raise ValueError(f"objective.gap_clips {list(self.gap_clips)} must ascend from at least 1")
        if run.model.class_token or run.model.levels or run.model.predict_context:
            raise ValueError(
                "objective memory pools the tokens of the last block; remove model.class_token, model.levels and "
                "model.predict_context"
            )

"""Settings of LeWM. Never imports torch."""

from typing import Literal

from pydantic import Field

from vjepa.methods.action_settings import ActionSettings
from vjepa.methods.settings import RunSettings


class LeWMSettings(ActionSettings):
    """Learn an encoder of frames and a predictor of the next frame's latent under actions, end to end (LeWM,
    arXiv:2603.19312). Targets are not detached. SIGReg and an inverse model prevent collapse."""

    name: Literal["lewm"] = "lewm"

    action_channels: int = Field(default=2, ge=1)
    """Numbers of an action between two frames: the columns of the signal, times the rows with `combine: stack`."""

    latent: tuple[int, int] = (256, 32)
    """Hidden channels of the projector, and channels of a latent."""

    rollout_steps: int = Field(default=8, ge=0)
    """Steps that are predicted from the first frame alone, from prediction to prediction, or 0 for none. LeWM trains
    without, PLDM with 16."""

    regularizer_weight: float = Field(default=0.09, ge=0)
    """Weight of SIGReg, which is applied to the latents of each frame of the clips separately. LeWM: 0.09."""

    inverse_weight: float = Field(default=1.0, ge=0)
    """Weight of the inverse model, which recovers the action from the latents before and after it."""

    inverse_hidden: int = Field(default=256, ge=0)
    """Hidden channels of the inverse model. With 0 it is linear in the difference of the two latents, so that an action
    that is a displacement makes latents linear in the position."""

    shuffle_actions: bool = False
    """Give each clip the actions of another clip. This is a control: the action gain must stay 1."""

    temporal_weight: float = Field(default=0.0, ge=0)
    """Weight of the squared distance between latents of neighbouring frames (PLDM)."""

    straight_weight: float = Field(default=0.0, ge=0)
    """Weight of 1 minus the cosine between neighbouring differences of latents (arXiv:2603.12231)."""

    slices: int = Field(default=1024, ge=1)
    """Random directions of SIGReg."""

    knots: int = Field(default=17, ge=2)
    """Points at which SIGReg compares characteristic functions."""

    def check(self, run: RunSettings) -> None:
        """Reject clips without actions, mixed lengths, several levels, and accumulation."""
        self.check_clips(run, self.action)
        if run.data.clip.sequence > 1:
            raise ValueError(
                f"objective lewm compares frames of all clips, but data.clip.sequence is {run.data.clip.sequence}. Set "
                "it to 1."
            )
        if run.model.levels or run.model.predict_context or run.model.causal:
            raise ValueError(
                "objective lewm encodes single frames; remove model.levels, model.predict_context and model.causal"
            )
        if run.accumulate > 1:
            raise ValueError(
                f"objective lewm compares all clips of a step, so parallel.accumulate ({run.accumulate}) would change "
                "the result. Use more ranks or a smaller batch_size."
            )

"""Settings of the dynamics method. Never imports torch."""

import os
from typing import Literal

from pydantic import Field

from vjepa.methods.action_settings import ActionSettings
from vjepa.methods.settings import RunSettings


class DynamicsSettings(ActionSettings):
    """Predict the features of the next frame under actions, on a frozen encoder (V-JEPA 2-AC, arXiv:2506.09985)."""

    name: Literal["dynamics"] = "dynamics"

    encoder: str
    """Native export whose encoder is used (`vjepa export --format native`). Checkpoints hold its path and sha256, and
    none of its weights."""

    feature_cache: str | None = None
    """Folder in which features of frames are kept, so that later epochs do not compute them again. It changes only the
    speed. Several encoders, corpora and runs may share it."""

    state: str | None = None
    """Signal of the state at each frame, such as the pose of an arm. By default the predictor sees none."""

    state_channels: int = Field(default=0, ge=0)
    """Columns of the state."""

    exponent: Literal[1, 2] = 2
    """Power of the absolute error. V-JEPA 2-AC: 1. jepa-wms (arXiv:2512.24497) found 2 better in planning."""

    random_prefix: bool = False
    """Begin the rollout after a random number of true frames, the same for all clips of a step. By default after one
    frame."""

    detach: bool = False
    """Let no gradient flow from a step of the rollout into the steps before it (jepa-wms)."""

    @property
    def state_signal(self) -> tuple[str, int] | None:
        """Name and channels of the state, if any."""
        return None if self.state is None else (self.state, self.state_channels)

    def with_absolute_paths(self) -> "DynamicsSettings":
        """Return the same settings with absolute paths."""
        cache = self.feature_cache and os.path.abspath(self.feature_cache)
        return self.model_copy(update={"encoder": os.path.abspath(self.encoder), "feature_cache": cache})

    def check(self, run: RunSettings) -> None:
        """Reject clips without actions or with mixed lengths."""
        self.check_clips(run, *filter(None, (self.action, self.state)))
        if (self.state is None) != (self.state_channels == 0):
            raise ValueError(
                f"objective.state is {self.state!r} and objective.state_channels {self.state_channels}; set both or "
                "none"
            )
        if run.model.levels or run.model.class_token or run.model.still_tokens:
            raise ValueError(
                "objective dynamics predicts the tokens of the last block; remove model.levels, model.class_token and "
                "model.still_tokens"
            )

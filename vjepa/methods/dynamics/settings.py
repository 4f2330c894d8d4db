"""Settings of the dynamics method. Never imports torch."""

import os
from typing import Literal

from pydantic import Field

from vjepa.methods.settings import MethodSettings, RunSettings


class DynamicsSettings(MethodSettings):
    """Predict the features of the next frame under actions, on a frozen encoder (V-JEPA 2-AC, arXiv:2506.09985)."""

    name: Literal["dynamics"] = "dynamics"

    encoder: str
    """Native export whose encoder is used (`vjepa export --format native`). Checkpoints hold its path and sha256, and
    none of its weights."""

    feature_cache: str | None = None
    """Folder in which features of frames are kept, so that later epochs do not compute them again. It changes only the
    speed. Several encoders, corpora and runs may share it."""

    action: str = "action"
    """Signal that acts between frames. It must be among `data.signals`."""

    action_channels: int = Field(ge=1)
    """Numbers of an action between two frames: the columns of the signal; with `combine: stack` times the rows."""

    state: str | None = None
    """Signal of the state at each frame, such as the pose of an arm. By default the predictor sees none."""

    state_channels: int = Field(default=0, ge=0)
    """Columns of the state."""

    normalise: Literal["z", "none"] = "z"
    """Scale actions and states by their statistics over the train split, or read them as they are (V-JEPA 2-AC)."""

    exponent: Literal[1, 2] = 2
    """Power of the absolute error. V-JEPA 2-AC: 1. jepa-wms (arXiv:2512.24497) found 2 better in planning."""

    rollout_steps: int = Field(default=2, ge=0)
    """Steps that are predicted from prediction to prediction. V-JEPA 2-AC: 2."""

    rollout_weight: float = Field(default=1.0, ge=0)
    """Weight of the mean error over these steps."""

    random_prefix: bool = False
    """Begin the rollout after a random number of true frames, the same for all clips of a step. By default after
    one."""

    detach: bool = False
    """Let no gradient flow from a step of the rollout into the steps before it (jepa-wms)."""

    def with_absolute_paths(self) -> "DynamicsSettings":
        """Return the same settings with absolute paths."""
        cache = self.feature_cache and os.path.abspath(self.feature_cache)
        return self.model_copy(update={"encoder": os.path.abspath(self.encoder), "feature_cache": cache})

    def check(self, run: RunSettings) -> None:
        """Reject clips without actions or with mixed lengths."""
        data = run.data
        for signal in filter(None, (self.action, self.state)):
            if signal not in data.signals:
                raise ValueError(f"objective dynamics reads the signal {signal!r}; add it to data.signals")
        if (self.state is None) != (self.state_channels == 0):
            raise ValueError(
                f"objective.state is {self.state!r} and objective.state_channels {self.state_channels}; set both or "
                "none"
            )
        lengths = sorted({source.frames or data.clip.frames for source in data.sources})
        if len(lengths) > 1 or lengths[0] < max(2, 1 + self.rollout_steps):
            raise ValueError(
                f"objective dynamics needs clips of one length, at least {max(2, 1 + self.rollout_steps)} frames for "
                f"objective.rollout_steps {self.rollout_steps}; the sources have {lengths}"
            )
        if lengths[0] % run.model.tubelet_frames:
            raise ValueError(
                f"data.clip.frames ({lengths[0]}) must be divisible by model.tubelet_frames "
                f"({run.model.tubelet_frames}), since pictures and reports encode whole clips"
            )
        if run.model.levels or run.model.class_token or run.model.still_tokens:
            raise ValueError(
                "objective dynamics predicts the tokens of the last block; remove model.levels, model.class_token and "
                "model.still_tokens"
            )

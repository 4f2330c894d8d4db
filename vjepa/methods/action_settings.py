"""Settings that all methods with actions have. Never imports torch."""

from typing import Literal

from pydantic import Field

from vjepa.methods.settings import MethodSettings, RunSettings


class ActionSettings(MethodSettings):
    """Base of the settings of a method that predicts frames under actions."""

    action: str = "action"
    """Signal that acts between frames. It must be among `data.signals`."""

    action_channels: int = Field(ge=1)
    """Numbers of an action between two frames: the columns of the signal, times the rows with `combine: stack`."""

    normalise: Literal["z", "none"] = "z"
    """Scale signals by their statistics over the train split, which the corpus holds, or read them as they are
    (V-JEPA 2-AC)."""

    rollout_steps: int = Field(default=2, ge=0)
    """Steps that are predicted from prediction to prediction, or 0 for none. V-JEPA 2-AC: 2."""

    rollout_weight: float = Field(default=1.0, ge=0)
    """Weight of the mean error over these steps."""

    @property
    def action_signal(self) -> tuple[str, int]:
        """Name and channels of the action."""
        return self.action, self.action_channels

    def check_clips(self, run: RunSettings, *signals: str) -> None:
        """Reject clips without the signals, of mixed lengths, or too short for the rollout.

        Raises:
            ValueError: see above.
        """
        data, needed = run.data, max(2, 1 + self.rollout_steps)
        for signal in signals:
            if signal not in data.signals:
                names = ", ".join([*data.signals, signal])
                raise ValueError(f"objective {self.name} reads the signal {signal!r}; set data.signals=[{names}]")
        lengths = sorted({source.frames or data.clip.frames for source in data.sources})
        if len(lengths) > 1:
            raise ValueError(
                f"objective {self.name} needs clips of one length, but sources have {lengths} frames. Give all sources "
                "the same frames."
            )
        if lengths[0] < needed:
            raise ValueError(
                f"objective.rollout_steps ({self.rollout_steps}) needs clips of {needed} frames, data.clip.frames is "
                f"{lengths[0]}; set it to {needed} or more, or objective.rollout_steps to {max(0, lengths[0] - 1)}"
            )
        if lengths[0] % run.model.tubelet_frames:
            raise ValueError(
                f"data.clip.frames ({lengths[0]}) must be divisible by model.tubelet_frames "
                f"({run.model.tubelet_frames}), since pictures and reports encode whole clips"
            )

"""A predictor of the features of frames: all tokens of the next frame, under actions.

    frame, repeated to fill a tubelet --frozen encoder--> tokens --layer norm--> h_t [N D]
    (h_t, a_t, s_t, and those before) --predictor--> layer norm --> h_{t+1}

This module imports torch and our networks alone, so that a native export loads without our other dependencies.

Letters: B clips, T frames, Y X pixels, h w rows and columns, N = h w tokens of a frame, D width of the encoder,
A channels of an action, AC of an action and a state, U and V intervals, S steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vjepa.nn.dynamics import DynamicsPredictor
from vjepa.nn.latent_dynamics import ActionScale, FrameEncoder
from vjepa.nn.shapes import Float, Model, UInt8


class FramePredictions(NamedTuple):
    """Predictions of the features of frames, after the layer norm."""

    following: Float[Tensor, "B U N D"]
    """Frames 1 to T - 1, each from the true frames before it."""

    shuffled: Float[Tensor, "B U N D"]
    """Predictions under other actions, without gradient."""

    rollout: Float[Tensor, "B S N D"]
    """Frames from the end of the prefix on, from prediction to prediction."""


def normed(features: Float[Tensor, "B T N D"]) -> Float[Tensor, "B T N D"]:
    """Apply a layer norm without parameters, in fp32."""
    return F.layer_norm(features.float(), features.shape[-1:])


class FrameDynamics(DynamicsPredictor):
    """A dynamics predictor of the features of an encoder."""

    scales: ActionScale
    """Scale of the actions, then of the states. Only a loaded model has it. A method applies the scale itself."""

    def __init__(self, settings: Model, *, actions: int, states: int = 0, seed: int = 0):
        """Build the predictor and initialize it, unless on the meta device.

        Args:
            settings: sizes of the encoder and the predictor.
            actions, states: channels of an action and of a state.
            seed: determines the initial weights, independently of device and sharding.
        """
        super().__init__(settings, latent=settings.encoder.width, actions=actions, states=states)
        if not self.predictor_embed.weight.is_meta:
            self.init_weights(seed)

    @classmethod
    def of_shapes(cls, settings: Model, shape: Callable[[str], tuple[int, ...]]) -> "FrameDynamics":
        """Build the predictor with its scale for tensors of these shapes."""
        first = "" if settings.condition == "token" else "0."
        actions, both = shape(f"dynamics.action_encoder.{first}weight")[1], shape("dynamics.scales.mean")[0]
        found = cls(settings, actions=actions, states=both - actions)
        found.scales = ActionScale(both)
        return found

    def forward(
        self,
        features: Float[Tensor, "B T N D"],
        conditions: Float[Tensor, "B U AC"],
        shuffled: Float[Tensor, "B U A"],
        grid: tuple[int, int],
        prefix: int,
        steps: int,
        detach: bool,
    ) -> FramePredictions:
        """Return everything that a loss needs, in a single call, since FSDP2 gathers parameters around `forward`.

        Args:
            features: features of the frames after the layer norm, without gradient.
            conditions: scaled actions after each frame but the last, then the scaled states at these frames.
            shuffled: scaled actions of other clips.
            grid: rows and columns of a frame.
            prefix: true frames before the rollout.
            steps: steps of the rollout.
            detach: let no gradient flow from a step into the steps before it.
        """
        actions, states = self._split(conditions)
        given = features[:, :-1]
        following = normed(self.predict(given, actions, states, grid=grid)[0])
        with torch.no_grad():
            other = normed(self.predict(given, shuffled, states, grid=grid)[0])
        unrolled = following[:, :0]
        if steps:
            actions, states = self._split(conditions[:, : prefix + steps - 1])
            unrolled = self.predict_steps(
                given[:, :prefix], actions, states, grid=grid, detach=detach, transform=normed
            )
        return FramePredictions(following, other, unrolled)

    def _split(self, conditions: Float[Tensor, "B U AC"]) -> tuple[Tensor, Tensor | None]:
        channels = conditions.shape[-1] - self.states
        return conditions[..., :channels], conditions[..., channels:] if self.states else None

    def latents(self, encoder: FrameEncoder, frames: UInt8[Tensor, "B T Y X C"]) -> Float[Tensor, "B T h w D"]:
        """Encode each frame alone, and apply the layer norm."""
        tokens = encoder.features(frames.flatten(0, 1)[:, None]).unflatten(0, frames.shape[:2])
        return normed(tokens).unflatten(2, self._grid(frames))

    def rollout(
        self, encoder: FrameEncoder, frames: UInt8[Tensor, "B T Y X C"], actions: Float[Tensor, "B V AC"]
    ) -> Float[Tensor, "B S h w D"]:
        """Predict the features of the frames that follow.

        Args:
            encoder: the encoder of the model.
            frames: the frames that are known.
            actions: unscaled actions between the frames, then of the S steps, V = T - 1 + S. Of a model with states,
                each is followed by the state of the frame before it.

        Raises:
            BadInput: the actions have another number of channels, or there are too few.
        """
        return self.rollout_from(self.latents(encoder, frames), actions)

    def rollout_from(
        self, latents: Float[Tensor, "B T h w D"], actions: Float[Tensor, "B V AC"]
    ) -> Float[Tensor, "B S h w D"]:
        """Predict the features of the frames that follow given latents. Arguments and errors are as in `rollout`."""
        split = self._split(self.scales.for_rollout(actions, known=latents.shape[1], states=self.states))
        grid = (latents.shape[2], latents.shape[3])
        return self.predict_steps(latents.flatten(2, 3), *split, grid=grid, transform=normed).unflatten(2, grid)

    def _grid(self, frames: Tensor) -> tuple[int, int]:
        patch = self.settings.patch_px
        return frames.shape[2] // patch, frames.shape[3] // patch

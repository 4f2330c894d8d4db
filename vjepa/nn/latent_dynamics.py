"""A predictor in a small latent space: all tokens of a frame become a vector, and actions lead from vector to vector.

    frame --encoder--> tokens [N D] --projector--> z [E]          (z_t, a_t, and those before) --> z_{t+1}

This module imports torch and our networks alone, so that a native export loads without our other dependencies.

Letters: B clips, T frames, Y X pixels, N tokens of a frame, D width of the encoder, E channels of a latent, A channels
of an action, S steps.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from vjepa.nn.dynamics import DynamicsPredictor
from vjepa.nn.shapes import Float, Model, UInt8
from vjepa_data.errors import BadInput


class ActionScale(nn.Module):
    """Mean and standard deviation of each channel of an action. Training does not change them."""

    def __init__(self, channels: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.std = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, actions: Float[Tensor, "B U A"]) -> Float[Tensor, "B U A"]:
        return (actions - self.mean) / self.std

    def for_rollout(self, actions: Float[Tensor, "B V A"], *, known: int, states: int = 0) -> Float[Tensor, "B V A"]:
        """Scale the actions of a rollout: between the known frames, then of the steps to predict.

        Args:
            actions: unscaled actions.
            known: number of frames that are known.
            states: how many of the channels are the state.

        Raises:
            BadInput: the actions have another number of channels, or there are too few.
        """
        channels = self.mean.shape[0]
        if actions.shape[-1] != channels or actions.shape[1] < known:
            of_state = f" ({states} of them for the state)" if states else ""
            raise BadInput(
                f"actions are {list(actions.shape)}; {known} frames need at least {known} actions of {channels} "
                f"channels{of_state}: first between the frames, then for each step to predict"
            )
        return self(actions)


class Centre(nn.Module):
    """Mean and standard deviation of each channel of all tokens of a frame, in the first batch of a run.

    The projector reads tokens that are centred and scaled with them, from the first step to the last and in an export.
    Otherwise most of its input would be the same for all frames, and every change of a weight would move all latents
    together. Batch norm would do the same, but in use it computes something else than in training.

    Source of an initialization that depends on data: Salimans and Kingma, Weight normalization (arXiv:1602.07868).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.std = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.is_set = nn.Parameter(torch.zeros(1), requires_grad=False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initialize the mean to 0 and the scale to 1, which leaves tokens unchanged."""
        self.mean.zero_()
        self.std.fill_(1)
        self.is_set.zero_()

    def forward(self, tokens: Float[Tensor, "B T ND"]) -> Float[Tensor, "B T ND"]:
        return (tokens - self.mean) / self.std


class Predictions(NamedTuple):
    """The latents of a batch and their predictions."""

    latents: Float[Tensor, "B T E"]
    """Latents of the frames, z."""

    following: Float[Tensor, "B U E"]
    """Predictions of frames 1 to T - 1, each from the true latents before it. U = T - 1."""

    shuffled: Float[Tensor, "B U E"]
    """Predictions under other actions, without gradient."""

    rollout: Float[Tensor, "B S E"]
    """Predictions of frames 1 to S from frame 0 alone."""


@runtime_checkable
class FrameEncoder(Protocol):
    """The part of `vjepa.weights.VideoEncoder` that a rollout needs."""

    def features(self, frames: Tensor) -> Tensor:
        """Encode clips to tokens."""
        ...


class LatentDynamics(DynamicsPredictor):
    """A projector of frames and a dynamics predictor of its latents, with a single token per latent."""

    actions: ActionScale
    """Scale of the actions. Only a loaded model has it. A method applies the scale itself."""

    centre: Centre
    """Centre of the tokens. Only a loaded model has it. A method passes its own."""

    def __init__(self, settings: Model, *, tokens: int, hidden: int, latent: int, actions: int, seed: int = 0):
        """Build the networks and initialize them, unless on the meta device.

        Args:
            settings: sizes of the encoder and the predictor.
            tokens: tokens of a frame that the projector reads, N.
            hidden, latent, actions: hidden channels of the projector, channels of a latent and of an action.
            seed: determines the initial weights, independently of device and sharding.
        """
        super().__init__(settings, latent=latent, actions=actions)
        self.tokens, self.inputs = tokens, tokens * settings.encoder.width
        self.projector = nn.Sequential(nn.Linear(self.inputs, hidden), nn.GELU(), nn.Linear(hidden, latent))
        if not self.predictor_embed.weight.is_meta:
            self.init_weights(seed)

    @classmethod
    def of_shapes(cls, settings: Model, shape: Callable[[str], tuple[int, ...]]) -> "LatentDynamics":
        """Build the network with its action scale for tensors of these shapes."""
        hidden, inputs = shape("dynamics.projector.0.weight")
        latent, actions = shape("dynamics.projector.2.weight")[0], shape("dynamics.actions.mean")[0]
        found = cls(settings, tokens=inputs // settings.encoder.width, hidden=hidden, latent=latent, actions=actions)
        found.actions, found.centre = ActionScale(actions), Centre(inputs)
        return found

    def project(self, tokens: Float[Tensor, "B T N D"], centre: Centre) -> Float[Tensor, "B T E"]:
        """Return the latent of each frame, fp32.

        Args:
            tokens: features of the frames, each encoded alone.
            centre: mean and scale of the tokens.

        Raises:
            BadInput: the frames have another number of tokens than in training.
        """
        if tokens.shape[2] != self.tokens:
            raise BadInput(
                f"frames have {tokens.shape[2]} tokens, the projector reads {self.tokens}. Give frames of the "
                "size that the model was trained on."
            )
        centred = centre(tokens.flatten(2).float())
        return self.projector(centred.to(tokens.dtype)).float()

    def forward(
        self,
        tokens: Float[Tensor, "B T N D"],
        actions: Float[Tensor, "B U A"],
        shuffled: Float[Tensor, "B U A"],
        steps: int,
        centre: Centre,
    ) -> Predictions:
        """Return everything that a loss needs, in a single call, since FSDP2 gathers parameters around `forward`.

        Args:
            tokens: features of the frames, each encoded alone.
            actions: scaled actions between the frames, U = T - 1.
            shuffled: actions of other clips.
            steps: steps to predict from the first frame alone.
            centre: mean and scale of the tokens.
        """
        latents = self.project(tokens, centre)
        given = latents[:, :-1, None]
        following = self.predict(given, actions)[0].squeeze(2)
        with torch.no_grad():
            other = self.predict(given, shuffled)[0].squeeze(2)
        unrolled = self.predict_steps(given[:, :1], actions[:, :steps]).squeeze(2) if steps else following[:, :0]
        return Predictions(latents, following, other, unrolled)

    def latents(self, encoder: FrameEncoder, frames: UInt8[Tensor, "B T Y X C"]) -> Float[Tensor, "B T 1 1 E"]:
        """Encode each frame alone."""
        alone = encoder.features(frames.flatten(0, 1)[:, None]).unflatten(0, frames.shape[:2])
        return self.project(alone, self.centre)[:, :, None, None]

    def rollout(
        self, encoder: FrameEncoder, frames: UInt8[Tensor, "B T Y X C"], actions: Float[Tensor, "B V A"]
    ) -> Float[Tensor, "B S 1 1 E"]:
        """Predict the latents of the frames that follow.

        Args:
            encoder: the encoder of the model.
            frames: the frames that are known.
            actions: unscaled actions between the frames, then of the S steps, V = T - 1 + S.

        Raises:
            BadInput: the actions have another number of channels, or there are too few.
        """
        return self.rollout_from(self.latents(encoder, frames), actions)

    def rollout_from(
        self, latents: Float[Tensor, "B T 1 1 E"], actions: Float[Tensor, "B V A"]
    ) -> Float[Tensor, "B S 1 1 E"]:
        """Predict the latents of the frames that follow given latents. Arguments and errors are as in `rollout`."""
        scaled = self.actions.for_rollout(actions, known=latents.shape[1])
        return self.predict_steps(latents.flatten(2, 3), scaled)[:, :, None]

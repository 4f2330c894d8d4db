"""LeWM: an encoder of single frames and a predictor of the next frame's latent, trained together without a teacher.

    frame t --encoder--> tokens --projector--> z_t         a_t: everything that acts between frames t and t + 1
    loss = mean_t (p_{t+1} - z_{t+1})^2                    p_{t+1} predicted from z_{<=t} and a_{<=t}
         + rollout  * the same, from z_0 and predictions alone
         + SIGReg   of z at each time, over the batch
         + inverse  * (a_t - recovered from z_t and z_{t+1})^2
         + temporal * (z_{t+1} - z_t)^2  + straight * (1 - cos of neighbouring differences)

The gradient goes through predictions and targets. SIGReg compares the global batch: its value and gradient are the same
on any number of ranks. The projector reads tokens that are centred and scaled by the statistics of the run's first
batch, which a checkpoint keeps. No network has running statistics, so an export computes the trained function.

LeWM: arXiv:2603.19312. The inverse model and the temporal term come from PLDM (arXiv:2502.14819) and eb_jepa
(arXiv:2602.03604). LeWM has no rollout loss, and reads the class token through an MLP with batch norm.

Letters: B clips, T frames, U = T - 1 intervals, Y X pixels, N tokens of a frame, D width, E channels of a latent,
A channels of an action, S steps of the rollout.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vjepa.methods.actions import (
    RATIOS,
    ActedClips,
    CorpusScale,
    actions_of_next_slot,
    example_signals,
    read_clips,
)
from vjepa.methods.base import Loss, Method, Networks, TokenCounts, sample_tokens
from vjepa.methods.lewm.settings import LeWMSettings
from vjepa.methods.regularizers import directions, sigreg, sum_over_ranks, world_size
from vjepa.nn.attention import Backend
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.grid import clip_grid
from vjepa.nn.init import init_weights
from vjepa.nn.latent_dynamics import Centre, LatentDynamics
from vjepa.nn.settings import Model
from vjepa_data.reader.batch import Batch, Signal

SMALLEST_STD = 0.1
"""Added to the standard deviation of tokens, which a layer norm brought to about 1, so that constant channels stay
small."""


class Inverse(nn.Module):
    """Recovers an action from the latents before and after it. Not exported."""

    def __init__(self, model: Model, *, latent: int, hidden: int, actions: int, seed: int = 0):
        """Args:
        model: `init_std`.
        latent: channels of a latent.
        hidden: hidden channels. With 0 the action is a linear function of the difference of the latents.
        actions: channels of an action.
        seed: determines the initial weights.
        """
        super().__init__()
        self.settings, self.is_linear = model, not hidden
        self.layers = nn.Sequential(
            *([nn.Linear(2 * latent, hidden), nn.GELU()] if hidden else []), nn.Linear(hidden or latent, actions)
        )
        if not self.layers[0].weight.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int = 0) -> None:
        """Initialize the weights."""
        init_weights(self, seed=seed, name="inverse", std=self.settings.init_std)

    def forward(self, latents: Float[Tensor, "B T E"]) -> Float[Tensor, "B U A"]:
        pairs = latents.diff(dim=1) if self.is_linear else torch.cat((latents[:, :-1], latents[:, 1:]), dim=-1)
        return self.layers(pairs.to(next(self.parameters()).dtype)).float()


class LeWM(Method):
    """Prediction of the next latent under actions, end to end."""

    settings: LeWMSettings
    _is_centred = False

    def build(self, attention: Backend = "sdpa") -> Networks:
        """Return the encoder, the projector with its predictor, the inverse model, and the scale of the actions."""
        run, settings, model = self.run, self.settings, self.run.model
        hidden, latent = settings.latent
        encoder = Encoder(model, seed=run.seed, attention=attention)
        grid = clip_grid(1, run.data.crop.px, model)
        dynamics = LatentDynamics(
            model,
            tokens=1 if model.class_token else grid.tokens,
            hidden=hidden,
            latent=latent,
            actions=settings.action_channels,
            seed=run.seed,
        )
        inverse = Inverse(
            model,
            latent=latent,
            hidden=settings.inverse_hidden,
            actions=settings.action_channels,
            seed=run.seed,
        )
        data = run.data if settings.normalise == "z" else None
        scale = CorpusScale(data, {settings.action: settings.action_channels})
        trained = {"encoder": encoder, "dynamics": dynamics, "inverse": inverse}
        return Networks(trained, constants={"dynamics.actions": scale, "dynamics.centre": Centre(dynamics.inputs)})

    def example_signals(self, clips: int, frames: int, device: torch.device) -> Mapping[str, Signal]:
        """Return actions between frames."""
        return example_signals(clips, frames, device, self.settings.action_signal)

    def prepare(self, batch: Batch, device: torch.device) -> ActedClips:
        """Bring clips and actions to the device.

        Raises:
            BadInput: the actions have another number of channels than the settings say.
        """
        return read_clips(batch, device, self.settings.action_signal)

    def loss(self, networks: Networks, inputs: ActedClips, *, step: int) -> Loss:
        """Return the weighted sum of the terms."""
        settings, run = self.settings, self.run
        count = run.batch_size
        actions = networks["dynamics.actions"](inputs.actions)
        if settings.shuffle_actions:
            actions = actions_of_next_slot(actions, inputs.slots, count)
        tokens = self._encode_frames(networks["encoder"], inputs.frames)
        others = actions_of_next_slot(actions, inputs.slots, count)
        centre = networks["dynamics.centre"]
        assert isinstance(centre, Centre)
        if not self._is_centred:
            set_centre(centre, tokens.flatten(2).float(), run.batch_size)
            self._is_centred = True
        found = networks["dynamics"](tokens, actions, others, settings.rollout_steps, centre)
        z, valid = found.latents, inputs.valid.float()
        intervals = count * valid.shape[1]

        def error(predicted: Tensor, frames: Tensor, weight: Tensor, of: int) -> Float[Tensor, ""]:
            return ((predicted - frames).square().mean(-1) * weight).sum() / of

        steps = settings.rollout_steps
        prediction = error(found.following, z[:, 1:], valid, intervals)
        rolled = error(found.rollout, z[:, 1 : steps + 1], valid[:, :steps].cumprod(1), count * max(1, steps))
        inverse = error(networks["inverse"](z), actions, valid, intervals)
        temporal = error(z[:, :-1], z[:, 1:], valid, intervals)
        change = z.diff(dim=1)
        bends = (1 - F.cosine_similarity(change[:, 1:], change[:, :-1], dim=-1)) * valid[:, 1:] * valid[:, :-1]
        straight = bends.sum() / (count * max(1, bends.shape[1]))
        spread = self._regularizer(z, inputs.step) / world_size()  # every rank adds its share of the same number
        value = prediction + settings.rollout_weight * rolled + settings.regularizer_weight * spread
        value = value + settings.inverse_weight * inverse
        if settings.temporal_weight:
            value = value + settings.temporal_weight * temporal
        if settings.straight_weight:
            value = value + settings.straight_weight * straight
        with torch.no_grad():
            shuffled = error(found.shuffled, z[:, 1:], valid, intervals)
        metrics = {
            "prediction": prediction,
            "rollout": rolled,
            "regularizer": spread,
            "inverse": inverse,
            "copy_last": temporal,
            "shuffled_actions": shuffled,
            "straight": straight,
        }
        return Loss(
            value=value,
            metrics={name: metric.detach() for name, metric in metrics.items()},
            features=sample_tokens([z.detach()]),
            tokens=TokenCounts(total=tokens.shape[:3].numel(), visible=tokens.shape[:3].numel()),
            ratios=RATIOS,
        )

    def _encode_frames(self, encoder: nn.Module, frames: Float[Tensor, "B T C Y X"]) -> Float[Tensor, "B T N D"]:
        """Encode each frame alone, repeated to fill a tubelet. With a class token, return that token alone."""
        model = self.run.model
        alone = frames.flatten(0, 1)[:, :, None]
        if not model.still_tokens:
            alone = alone.expand(-1, -1, model.tubelet_frames, -1, -1)
        (tokens,) = encoder([View(alone)], class_token=model.class_token)
        return tokens[:, : 1 if model.class_token else None].unflatten(0, frames.shape[:2])

    def _regularizer(self, z: Float[Tensor, "B T E"], step: int) -> Float[Tensor, ""]:
        """Return SIGReg, averaged over the frames of a clip."""
        settings, run = self.settings, self.run
        slices = directions(seed=run.seed, step=step, width=z.shape[-1], slices=settings.slices, device=z.device)
        terms = [sigreg(each, count=run.batch_size, slices=slices, knots=settings.knots) for each in z.unbind(1)]
        return torch.stack(terms).mean()


@torch.no_grad()
def set_centre(centre: Centre, tokens: Float[Tensor, "B T ND"], count: int) -> None:
    """Set the centre from the first batch, unless a checkpoint already did.

    Args:
        centre: as initialized or restored.
        tokens: tokens of the frames of this rank's clips, side by side.
        count: clips over all ranks.
    """
    if centre.is_set.is_meta or centre.is_set.item():
        return
    frames = count * tokens.shape[1]
    mean = sum_over_ranks(tokens.sum((0, 1))) / frames
    variance = sum_over_ranks((tokens - mean).square().sum((0, 1))) / frames
    centre.mean.copy_(mean)
    centre.std.copy_((variance + SMALLEST_STD**2).sqrt())
    centre.is_set.fill_(1)

"""Dynamics on a frozen encoder: the features of the next frame, under the action between the two.

    frame t, repeated to fill a tubelet --frozen encoder--> tokens --layer norm--> h_t
    loss = mean_t |p_{t+1} - h_{t+1}|^e                      p_{t+1} predicted from h_{<=t}, a_{<=t}, s_{<=t}
         + rollout * the same over steps from prediction to prediction

V-JEPA 2-AC: arXiv:2506.09985, section 3. Its predictor is `model.condition: token`. Frames are encoded alone, so that
no feature holds a later frame. The states in a rollout are the true ones, as there.

The encoder is read from a native export. It receives no gradient, and no checkpoint holds it: a checkpoint holds the
sha256 of its file, and a run that resumes with another file stops.

Letters: B clips, T frames, U = T - 1 intervals, Y X pixels, N tokens of a frame, D width, AC channels of an action and
a state.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
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
from vjepa.methods.dynamics.settings import DynamicsSettings
from vjepa.methods.feature_cache import FeatureCache, frame_keys
from vjepa.methods.frozen_encoder import EncoderFile, FrozenEncoder
from vjepa.nn.attention import Backend
from vjepa.nn.encoder import View
from vjepa.nn.frame_dynamics import FrameDynamics, normed
from vjepa.nn.grid import clip_grid
from vjepa_data.reader.batch import Batch, Signal
from vjepa_data.rng import generator


class Dynamics(Method):
    """Prediction of the features of the next frame under actions, on a frozen encoder."""

    settings: DynamicsSettings
    _cache: FeatureCache | None = None

    def build(self, attention: Backend = "sdpa") -> Networks:
        """Return the frozen encoder and the predictor."""
        run, settings, folder = self.run, self.settings, Path(self.settings.encoder)
        encoder = FrozenEncoder(run.model, folder, attention=attention)
        predictor = FrameDynamics(
            run.model, actions=settings.action_channels, states=settings.state_channels, seed=run.seed
        )
        signals = dict(filter(None, (settings.action_signal, settings.state_signal)))
        scales = CorpusScale(run.data if settings.normalise == "z" else None, signals)
        return Networks(
            {"dynamics": predictor},
            frozen={"encoder": encoder},
            constants={"dynamics.scales": scales, "encoder_file": EncoderFile(folder)},
        )

    def example_signals(self, clips: int, frames: int, device: torch.device) -> Mapping[str, Signal]:
        """Return actions between frames, and states at frames."""
        return example_signals(clips, frames, device, self.settings.action_signal, self.settings.state_signal)

    def prepare(self, batch: Batch, device: torch.device) -> ActedClips:
        """Bring clips and signals to the device.

        Raises:
            BadInput: a signal has another number of channels than the settings say.
        """
        clips = read_clips(batch, device, self.settings.action_signal, self.settings.state_signal)
        if not self.settings.feature_cache:
            return clips
        return replace(clips, keys=tuple(frame_keys(batch.groups[0].frames.flatten(0, 1))))

    def loss(self, networks: Networks, inputs: ActedClips, *, step: int) -> Loss:
        """Return the teacher-forced error plus the weighted error of the rollout."""
        settings, run, size = self.settings, self.run, inputs.frames.shape
        reference = networks["encoder_file"]
        assert isinstance(reference, EncoderFile)
        reference.check()
        features = self._features(networks, inputs)
        conditions = networks["dynamics.scales"](inputs.actions)
        others = actions_of_next_slot(conditions[..., : settings.action_channels], inputs.slots, run.batch_size)
        grid, steps = clip_grid(1, size[-1], run.model), settings.rollout_steps
        prefix = self._prefix(inputs.step, intervals=size[1] - 1)
        found = networks["dynamics"](features, conditions, others, (grid.h, grid.w), prefix, steps, settings.detach)
        valid, targets = inputs.valid.float(), features[:, 1:]

        def error(predicted: Tensor, frames: Tensor, weight: Tensor) -> Float[Tensor, ""]:
            power = (predicted - frames).abs() ** settings.exponent
            return (power.mean((-2, -1)) * weight).sum() / (run.batch_size * max(1, weight.shape[1]))

        prediction = error(found.following, targets, valid)
        span = slice(prefix - 1, prefix - 1 + steps)
        reached = valid.cumprod(1)[:, span]  # a rollout is lost where one of its frames is
        rolled = error(found.rollout, targets[:, span], reached)
        with torch.no_grad():
            copied, shuffled = error(features[:, :-1], targets, valid), error(found.shuffled, targets, valid)
        metrics = {
            "prediction": prediction,
            "rollout": rolled,
            "copy_last": copied,
            "shuffled_actions": shuffled,
        }
        return Loss(
            value=prediction + settings.rollout_weight * rolled,
            metrics={name: metric.detach() for name, metric in metrics.items()},
            features=sample_tokens([found.following.detach().flatten(1, 2)]),
            tokens=TokenCounts(total=features.shape[:3].numel(), visible=features.shape[:3].numel()),
            ratios=RATIOS,
        )

    @torch.no_grad()
    def _features(self, networks: Networks, inputs: ActedClips) -> Float[Tensor, "B T N D"]:
        """Return the features of all frames, each encoded alone, after the layer norm."""
        frames = inputs.frames.flatten(0, 1)[:, :, None].expand(-1, -1, self.run.model.tubelet_frames, -1, -1)

        def encode(numbers: list[int] | slice) -> Float[Tensor, "M N D"]:
            return networks["encoder"]([View(frames[numbers])])[0]

        if inputs.keys:
            cache = self._open_cache(networks["encoder_file"], frames.device)
            features = cache.features(inputs.keys, encode, device=frames.device)
        else:
            features = encode(slice(None))
        return normed(features.unflatten(0, inputs.frames.shape[:2]))

    def _open_cache(self, encoder: nn.Module, device: torch.device) -> FeatureCache:
        """Return the cache of the features of this encoder, which is opened once."""
        if self._cache is None:
            assert isinstance(encoder, EncoderFile)
            assert self.settings.feature_cache is not None
            of_predictor = {"predictor", "window", "condition"}
            identity = {
                "encoder_sha256": bytes(encoder.sha256.tolist()).hex(),
                "model": self.run.model.model_dump(mode="json", exclude=of_predictor),
                "precision": self.run.precision,
                "device": device.type,
            }
            self._cache = FeatureCache(Path(self.settings.feature_cache), identity)
        return self._cache

    def _prefix(self, step: int, *, intervals: int) -> int:
        """Return the number of true frames before the rollout, a function of the seed and the step."""
        if not self.settings.random_prefix:
            return 1
        longest = intervals - max(1, self.settings.rollout_steps) + 1
        return int(generator(self.run.seed, "prefix", step).integers(1, longest, endpoint=True))

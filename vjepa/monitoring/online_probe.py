"""An online probe: a linear readout of a label from the exported encoder, on a fixed set of videos, during training.

Every rank encodes its share of the clips. Half of the videos are for fitting, the other half for scoring. Scores are
comparable within a run. Across runs use `vjepa eval probe`, with its protocol, intervals and baselines.
"""

import logging
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from vjepa.config import OnlineProbe, Run
from vjepa.distributed.world import World
from vjepa.evals.ridge import Kind, Table, prior_score, ridge_score
from vjepa.nn.encoder import View, normalise
from vjepa_data.evaluation.clips import EvalClips
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

CLIPS_AT_ONCE = 8


class ProbeRunner:
    """Predicts a label from the mean feature of a clip."""

    def __init__(self, settings: OnlineProbe, run: Run, world: World) -> None:
        """Read and decode this rank's share of the videos.

        Raises:
            BadInput: the corpus, split or label does not exist, or too few videos have it.
        """
        self.settings, self.world = settings, world
        clip = run.data.clip
        clips = EvalClips(
            Path(settings.shards), split=settings.split, px=run.data.crop.px, frames=clip.frames, fps=clip.fps,
            max_videos=settings.videos, short=clip.short,
        )  # fmt: skip
        clips.chosen = clips.chosen[world.rank :: world.size]
        labelled = [one for one in clips if one.labels.get(settings.label) is not None]
        self._frames = [one.frames for one in labelled]
        self._blank = torch.zeros(clip.frames, run.data.crop.px, run.data.crop.px, 3, dtype=torch.uint8)
        pairs = world.gather([(one.video, one.labels[settings.label]) for one in labelled])
        everyone = [pair for of_rank in pairs for pair in of_rank]
        if len(everyone) < 4:
            raise BadInput(
                f"track.probe: {len(everyone)} of the videos of {settings.shards} ({settings.split}) have the label "
                f"{settings.label!r}. Give another label or split, or more videos."
            )
        self._videos = np.array([video for video, _ in everyone])
        labels = [label for _, label in everyone]
        are_numbers = all(isinstance(one, Real) and not isinstance(one, bool) for one in labels)
        self._kind: Kind = "number" if are_numbers else "class"
        self._labels = np.array(labels if self._kind == "number" else [str(one) for one in labels])
        # All ranks run the network equally often, because its weights are sharded over all of them.
        self._rounds = max(world.gather(-(-len(labelled) // CLIPS_AT_ONCE)))

    def is_due(self, step: int) -> bool:
        """Return whether the probe is due after `step` updates."""
        return step % self.settings.every_steps == 0

    @torch.no_grad()
    def measure(self, encoder: nn.Module) -> dict[str, float]:
        """Encode all clips and fit the readout. All ranks must call it together.

        Args:
            encoder: takes a list of views, as `vjepa.nn.encoder.Encoder`.

        Returns:
            `probe/score`, accuracy or R2, and `probe/prior`, the score without features.
        """
        found: list[Tensor] = []
        for number in range(self._rounds):
            frames = self._frames[number * CLIPS_AT_ONCE : (number + 1) * CLIPS_AT_ONCE]
            batch = torch.stack(frames or [self._blank]).to(self.world.device)
            means = encoder([View(normalise(batch))])[0].float().mean(1).cpu()
            found.append(means[: len(frames)])
        features = torch.cat([part for parts in self.world.gather(found) for part in parts])
        score, prior = self.world.first(lambda: self._read_out(features))
        return {"probe/score": score, "probe/prior": prior}

    def _read_out(self, features: Float[Tensor, "n D"]) -> tuple[float, float]:
        table = Table(features, self._labels, self._videos)
        order = np.argsort(self._videos, kind="stable")
        fit, held = table.rows(order[::2]), table.rows(order[1::2])
        return ridge_score(fit, held, self._kind).value, prior_score(fit, held, self._kind).value

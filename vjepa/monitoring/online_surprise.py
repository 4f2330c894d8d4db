"""Surprise during training: how often a generated film that breaks a law surprises more, with the weights of the
moment."""

import numpy as np
import torch

from vjepa.config import OnlineSurprise, Run
from vjepa.distributed.world import World
from vjepa.evals.surprise.evaluation import (
    SurpriseSettings,
    Windows,
    film_surprise,
    group_accuracy,
    masked_surprise,
    pair_accuracy,
    pairs_of,
)
from vjepa.methods.base import Networks, named_parameters
from vjepa.monitoring.online_model import copy_model
from vjepa.weights.world_model import part_kinds
from vjepa_data.errors import BadInput
from vjepa_data.evaluation.violations import draw_violations
from vjepa_data.synthetic.violations import LAWS

SEED = 2**31 - 1
"""Seed of the films, apart from the small numbers that users give to `vjepa synthesize violations`."""


class SurpriseRunner:
    """Compares films with the trained networks."""

    def __init__(self, settings: OnlineSurprise, run: Run, world: World, networks: Networks) -> None:
        """Draw the films, without writing them.

        Raises:
            BadInput: the method has no masked predictor, or a clip is longer than the films.
        """
        parts = part_kinds(named_parameters(networks.trained))
        if "predict" not in {part.capability for part in parts}:
            raise BadInput(
                f"track.surprise needs a masked predictor, which objective {run.objective.name} does not train"
            )
        self.settings, self._run, self._world, self._networks = settings, run, world, networks
        clip = run.data.clip
        self._films, shown = draw_violations(SEED, settings.quadruplets, px=run.data.crop.px, fps=clip.fps)
        form = {"trained_frames": clip.frames, "tubelet": run.model.tubelet_frames}
        self._windows = Windows.choose(self._films, SurpriseSettings(), **form)
        self._clips = [self._windows.cut(frames) for frames in shown]
        if not len(self._clips[0]):
            raise BadInput(
                f"track.surprise shows films of {len(shown[0])} frames at {clip.fps:g} per second, and a clip has "
                f"{clip.frames}; shorten data.clip.frames or raise data.clip.fps"
            )

    def is_due(self, step: int) -> bool:
        """Return whether a comparison is due after `step` updates."""
        return step % self.settings.every_steps == 0

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Compare all films on the first rank. All ranks must call it together, to gather sharded weights.

        Returns:
            `surprise/pairs`, and shares of the quadruplets: `surprise/groups` and `surprise/LAW`. Empty on other ranks.
        """
        model = copy_model(self._run, self._world, self._networks)
        if model is None:
            return {}
        score = masked_surprise(model, mask_kind=0)
        values = np.array(
            [
                film_surprise(score(clips.to(self._world.device), self._windows.contexts), "mean").mean()
                for clips in self._clips
            ]
        )
        pairs = {law: pairs_of(self._films, law) for law in LAWS[: self.settings.quadruplets]}
        return {
            "surprise/pairs": pair_accuracy(values, self._films.pairs),
            "surprise/groups": group_accuracy(values, self._films, self._films.pairs),
            **{f"surprise/{law}": group_accuracy(values, self._films, pairs[law]) for law in pairs},
        }

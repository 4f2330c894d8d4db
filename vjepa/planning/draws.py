"""Random numbers of a planner, each a function of (seed, episode, step, iteration).

Every episode has its own stream, so a plan does not depend on the episodes that are planned with it, on their order, or
on the number of processes.

Letters: E episodes, N samples, H steps of a plan, A columns of an action.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from vjepa_data.rng import generator


@dataclass(frozen=True)
class Draws:
    """The streams of the episodes that are planned together."""

    seed: int
    episodes: Sequence[int]
    step: int
    """Step of the world at which the plan begins."""

    device: torch.device | str = "cpu"

    def normal(
        self, iteration: int, *, samples: int, horizon: int, actions: int, colour: float = 0.0
    ) -> Float[Tensor, "E N H A"]:
        """Return normal numbers of variance 1.

        Args:
            iteration: iteration of the planner.
            samples, horizon, actions: shape for each episode.
            colour: exponent of the power spectrum over the horizon. 0 is white noise, 2 a random walk.
        """
        shape = (samples, horizon, actions)
        rows = [
            coloured(
                generator(self.seed, "planner", episode, self.step, iteration).standard_normal(shape), exponent=colour
            )
            for episode in self.episodes
        ]
        return torch.from_numpy(np.stack(rows).astype(np.float32)).to(self.device)


def coloured(white: Float[ndarray, "N H A"], *, exponent: float) -> Float[ndarray, "N H A"]:
    """Return noise whose power falls with the frequency f over H as f ** -exponent, of the same variance.

    The lowest frequency of a horizon stands for the constant part, as in iCEM (arXiv:2008.06389). A horizon of one or
    two steps has a single frequency, so the noise stays white.
    """
    horizon = white.shape[1]
    if exponent == 0 or horizon < 3:
        return white
    frequencies = np.fft.rfftfreq(horizon)
    frequencies[0] = frequencies[1]
    scale = frequencies ** (-exponent / 2)
    twice = np.full(len(scale), 2.0)  # all frequencies but the first, and the last of an even horizon, count twice
    twice[0] = 1
    if horizon % 2 == 0:
        twice[-1] = 1
    scale /= np.sqrt((twice * scale**2).sum() / horizon)
    return np.fft.irfft(np.fft.rfft(white, axis=1) * scale[:, None], n=horizon, axis=1)

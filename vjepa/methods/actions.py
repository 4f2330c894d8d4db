"""Clips with actions, which the methods that predict under actions read: their signals, scale and loss.

Letters: B clips, T frames, U = T - 1 intervals between frames, Y X pixels, A channels of an action and perhaps a state.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vjepa.methods.base import send
from vjepa.methods.regularizers import sum_over_ranks
from vjepa.nn.encoder import normalise
from vjepa.nn.latent_dynamics import ActionScale
from vjepa_data.errors import BadInput
from vjepa_data.reader.batch import Batch, Signal
from vjepa_data.reader.signals import interval_statistics
from vjepa_data.settings import Data

RATIOS = {"copy_ratio": ("prediction", "copy_last"), "action_gain": ("shuffled_actions", "prediction")}
"""Ratios to log. A model whose error is not below that of copying the last frame is worthless. The action gain is 1 for
a model that ignores actions."""


@dataclass(frozen=True)
class ActedClips:
    """Clips on the device with the actions between their frames, and perhaps the state at each frame."""

    frames: Float[Tensor, "B T C Y X"]
    """Normalised pixels. The colours of a frame are neighbours in memory, since each frame is encoded alone."""

    actions: Float[Tensor, "B U A"]
    """Actions after each frame but the last, then the states at these frames, if the method reads states."""

    valid: Bool[Tensor, "B U"]
    """False where a frame is held, or where the source has no action."""

    step: int
    slots: tuple[int, ...]
    keys: tuple[bytes, ...] = ()
    """Keys of the B T frames in the feature cache, if any."""


def read_clips(
    batch: Batch, device: torch.device, action: tuple[str, int], state: tuple[str, int] | None = None
) -> ActedClips:
    """Bring clips of equal length and their signals to the device.

    Args:
        batch: a batch with a single group of clips.
        device: where they go.
        action, state: name of the signal, and its channels.

    Raises:
        BadInput: a signal has another number of channels.
    """
    (clips,) = batch.groups  # the settings make sure that all clips have one length
    signal = clips.signals[action[0]]
    values, valid = check_channels(action[0], signal, action[1]), signal.valid
    if state is not None:
        signal = clips.signals[state[0]]
        values = torch.cat((values, check_channels(state[0], signal, state[1])[:, :-1]), dim=-1)
        valid = valid & signal.valid[:, :-1]
    pixels = send(clips.frames, device)
    frames = normalise(pixels.flatten(0, 1)[:, None]).squeeze(2).unflatten(0, pixels.shape[:2])
    return ActedClips(frames, send(values, device), send(valid, device), batch.step, clips.slots)


def example_signals(
    clips: int, frames: int, device: torch.device, action: tuple[str, int], state: tuple[str, int] | None = None
) -> Mapping[str, Signal]:
    """Return zeros of the shapes that `read_clips` reads.

    Args:
        clips, frames: number of clips and of their frames.
        device: where the signals lie.
        action, state: name of the signal, and its channels.
    """

    def make(channels: int, length: int) -> Signal:
        valid = torch.ones(clips, length, dtype=torch.bool, device=device)
        return Signal(torch.zeros(clips, length, channels, device=device), valid, ("",) * channels, ("",) * channels)

    found = {action[0]: make(action[1], frames - 1)}
    return found | ({state[0]: make(state[1], frames)} if state else {})


class CorpusScale(ActionScale):
    """The scale of signals in the corpora of a run, read when the weights are initialized."""

    def __init__(self, data: Data | None, signals: dict[str, int]):
        """Args:
        data: the corpora. None leaves signals as they are.
        signals: channels of each signal, in the order in which they are concatenated.
        """
        super().__init__(sum(signals.values()))
        self.data, self.signals = data, signals
        if not self.mean.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Read the statistics of the corpora.

        Raises:
            BadInput: a corpus has none, or a signal has other channels.
        """
        mean, std = torch.zeros(len(self.mean)), torch.ones(len(self.mean))
        first = 0
        for name, channels in self.signals.items() if self.data else ():
            assert self.data is not None
            found = interval_statistics(self.data, name)
            rows = channels // len(found.mean)  # more than one for stacked rows
            if len(found.mean) * rows != channels:
                raise BadInput(_other_channels(name, len(found.mean), channels))
            part = slice(first, first + channels)
            mean[part], std[part] = (torch.tensor(each).repeat(rows) for each in (found.mean, found.std))
            first += channels
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1.0))


def check_channels(name: str, signal: Signal, channels: int) -> Float[Tensor, "B U A"]:
    """Return the values of a signal with stacked rows side by side.

    Raises:
        BadInput: it has another number of channels than the settings say.
    """
    values = signal.values.flatten(2)
    if values.shape[2] != channels:
        raise BadInput(_other_channels(f"{name} ({', '.join(signal.columns)})", values.shape[2], channels))
    return values


def _other_channels(name: str, found: int, channels: int) -> str:
    return f"signal {name} has {found} numbers, the objective's channels are {channels}; set them to {found}"


def actions_of_next_slot(actions: Float[Tensor, "B U A"], slots: tuple[int, ...], count: int) -> Float[Tensor, "B U A"]:
    """Return for each clip the actions of the clip in the next slot of the global batch.

    Args:
        actions: actions of this rank's clips.
        slots: their slots.
        count: slots of the global batch.
    """
    own = torch.tensor(slots, device=actions.device)
    everyone = actions.new_zeros(count, *actions.shape[1:])
    everyone[own] = actions.detach()
    return sum_over_ranks(everyone)[(own + 1) % count]

"""What methods with actions share: reading signals, their scale, and the actions of other clips.

Letters: B clips, U intervals between frames, A channels of an action.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from vjepa.methods.regularizers import sum_over_ranks
from vjepa.nn.latent_dynamics import ActionScale
from vjepa_data.errors import BadInput
from vjepa_data.reader.batch import Signal
from vjepa_data.reader.signals import interval_statistics
from vjepa_data.settings import Data


class CorpusScale(ActionScale):
    """The scale of signals in the corpora of a run, read when the weights are initialized."""

    def __init__(self, data: Data | None, signals: dict[str, int]):
        """Args:
        data: the corpora; None leaves signals as they are.
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

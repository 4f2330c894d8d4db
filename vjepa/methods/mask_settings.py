"""Kinds of mask: which tokens of a clip are visible and which are hidden. Never imports torch."""

from typing import Annotated, Literal

from pydantic import Field

from vjepa_data.settings import Settings, Share


class BalancedMask(Settings):
    """Block masks with exact counts: whole spatial tubes are added or removed, and nothing is truncated."""

    mode: Literal["balanced"] = "balanced"
    blocks: int = Field(ge=1)
    """Rectangles whose union is hidden, through all of time."""

    block_share: Share
    """Area of a rectangle as a share of the frame."""

    aspect: tuple[float, float] = (0.75, 1.5)
    """Smallest and largest height / width of a rectangle."""

    visible_share: Share | None = None
    """Share of tokens that stay visible. By default the average area outside the rectangles."""


class ReferenceMask(Settings):
    """V-JEPA 2's own sampler, with its truncation to the batch minimum, for parity and reproduction."""

    mode: Literal["reference"] = "reference"
    blocks: int = Field(ge=1)
    spatial_scale: tuple[Share, Share]
    temporal_scale: tuple[Share, Share] = (1.0, 1.0)
    aspect: tuple[float, float] = (0.75, 1.5)
    batch: int = Field(default=24, ge=1)
    """Slots that are truncated together. In V-JEPA 2 this is the batch size of a GPU, which decides the masking
    ratio."""

    groups: int | None = Field(default=None, ge=1)
    """How many such groups the global batch has: `batch_size / batch`. Slots `s`, `s + groups`, ... then form a group,
    as they lie on one rank. With `groups` ranks, each draws and packs a single group. By default neighbouring slots
    form a group, so that every rank draws many groups and has as many lengths. Either way masks do not depend on the
    number of ranks."""


class RandomMask(Settings):
    """Tokens hidden with equal probability, exact count (LeVJEPA's token drop)."""

    mode: Literal["random"] = "random"
    visible_share: Share


class TubeMask(Settings):
    """Spatial tubes hidden at random, exact count (VideoMAE)."""

    mode: Literal["tube"] = "tube"
    visible_share: Share


class CausalMask(Settings):
    """The future is hidden and predicted from the first tubelets."""

    mode: Literal["causal"] = "causal"
    visible_tubelets: int = Field(ge=1)


Mask = Annotated[BalancedMask | ReferenceMask | RandomMask | TubeMask | CausalMask, Field(discriminator="mode")]

# V-JEPA and V-JEPA 2: eight small rectangles ("short range") and two large rectangles ("long range").
BLOCKS = (BalancedMask(blocks=8, block_share=0.15), BalancedMask(blocks=2, block_share=0.7))

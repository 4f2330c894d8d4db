"""The grid of a clip's tokens in time, height and width. Never imports torch."""

from dataclasses import dataclass

from vjepa.nn.shapes import Model
from vjepa_data.errors import BadInput


@dataclass(frozen=True)
class Grid:
    """The grid of a clip. Token id = (t * h + row) * w + column, so the tokens of a frame are neighbours."""

    t: int
    """Tubelets."""

    h: int
    """Rows of patches."""

    w: int
    """Columns of patches."""

    @classmethod
    def of(cls, frames: int, px_h: int, px_w: int, settings: Model) -> "Grid":
        """Return the grid of a clip.

        Args:
            frames: frames in the clip.
            px_h: height of the frames, in pixels.
            px_w: width of the frames, in pixels.
            settings: patch and tubelet size.

        Raises:
            BadInput: the clip is not a whole number of tokens.
        """
        tubelet = 1 if settings.still_tokens and frames == 1 else settings.tubelet_frames
        for side, size, part in (
            ("frames", frames, tubelet),
            ("height", px_h, settings.patch_px),
            ("width", px_w, settings.patch_px),
        ):
            if size < part or size % part:
                raise BadInput(
                    f"a clip's {side} ({size}) must be a multiple of a token's ({part}); "
                    f"try {max(part, size - size % part)}"
                )
        return cls(frames // tubelet, px_h // settings.patch_px, px_w // settings.patch_px)

    @property
    def tokens(self) -> int:
        """Number of tokens of the clip."""
        return self.t * self.h * self.w

    @property
    def cells(self) -> int:
        """Number of tokens of a tubelet: positions in the frame."""
        return self.h * self.w


def clip_grid(frames: int, px: int, model: Model) -> Grid:
    """Return the token grid of a square clip as the encoder receives it.

    A still image is repeated until it fills a tubelet, unless the model embeds still images separately.

    Args:
        frames: frames of the clip as it was loaded.
        px: height and width of the frames.
        model: patch and tubelet size.

    Raises:
        BadInput: the clip is not a whole number of tokens.
    """
    is_repeated = frames == 1 and not model.still_tokens
    return Grid.of(model.tubelet_frames if is_repeated else frames, px, px, model)

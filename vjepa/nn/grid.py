"""Where a token sits: the grid of a clip's tokens in time, height and width. Never imports torch."""

from dataclasses import dataclass

from vjepa.nn.shapes import Model
from vjepa_data.errors import BadInput


@dataclass(frozen=True)
class Grid:
    """Tokens of one clip. Token id = (t * h + row) * w + column, so a frame's tokens lie together, time outermost."""

    t: int
    """Tubelets."""

    h: int
    """Rows of patches."""

    w: int
    """Columns of patches."""

    @classmethod
    def of(cls, frames: int, px_h: int, px_w: int, settings: Model) -> "Grid":
        """Cut a clip into tokens.

        Args:
            frames: frames in the clip.
            px_h: height of the frames, in pixels.
            px_w: width of the frames, in pixels.
            settings: patch and tubelet size.

        Raises:
            BadInput: the clip is not a whole number of tokens.
        """
        tubelet = 1 if settings.still_tokens and frames == 1 else settings.tubelet_frames
        for what, size, part in (
            ("frames", frames, tubelet),
            ("height", px_h, settings.patch_px),
            ("width", px_w, settings.patch_px),
        ):
            if size < part or size % part:
                raise BadInput(
                    f"a clip's {what} ({size}) must be a multiple of a token's ({part}); "
                    f"try {max(part, size - size % part)}"
                )
        return cls(frames // tubelet, px_h // settings.patch_px, px_w // settings.patch_px)

    @property
    def tokens(self) -> int:
        """Tokens of the whole clip."""
        return self.t * self.h * self.w

    @property
    def cells(self) -> int:
        """Tokens of one tubelet: places in the picture, each the foot of a tube through time."""
        return self.h * self.w

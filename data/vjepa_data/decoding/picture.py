"""Convert pictures of any mode and orientation to upright RGB."""

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Apply the EXIF orientation and convert to RGB with 8 bits per channel.

    Raises:
        ValueError: the pixels have 32 bits, whose range is unknown.
        Exception: the picture is damaged. Pillow does not document the types that it raises then.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # range 0 to 65,535; Pillow would clip it at 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("pixels have 32 bits, whose range is unknown; convert them to 8 or 16 bits")
    return picture.convert("RGB")

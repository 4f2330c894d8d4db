"""A picture as it is meant to be seen, of which its file says more than its pixels."""

import numpy as np
from PIL import Image, ImageOps


def upright_rgb(picture: Image.Image) -> Image.Image:
    """Turn it as its EXIF says, and make it 8 bits of red, green and blue.

    Raises:
        ValueError: it has pixels of 32 bits, whose range no file tells.
        Exception: it is damaged; Pillow promises nothing of what it raises then.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):  # of 65,535; Pillow itself would make white of all above 255
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError("pixels of 32 bits, whose black and white are not known; make them 8 or 16 bits")
    return picture.convert("RGB")

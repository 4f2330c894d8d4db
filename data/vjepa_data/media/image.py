"""Store images as samples of one frame: upright RGB JPEGs of the requested size."""

import io
import struct
from pathlib import Path

from PIL import ExifTags, Image, UnidentifiedImageError

from vjepa_data.decoding.picture import upright_rgb
from vjepa_data.media.canonical import ClipFormat
from vjepa_data.media.transcode import StoredClip, stored_size
from vjepa_data.media.video import MAX_PIXELS, Reason, Refused, VideoInfo
from vjepa_data.spec import Encode

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

# Exceptions that Pillow's readers were observed to raise on damaged files, or catch internally. They are undocumented.
DAMAGE = (OSError, EOFError, SyntaxError, ValueError, TypeError, IndexError, KeyError, struct.error)


def probe_image(path: Path) -> VideoInfo:
    """Read the declared properties of an image file.

    Raises:
        Refused: the file is missing, empty, too large or not an image.
    """
    with _open(path) as image:
        width, height = _shown_size(image)
        kind = (image.format or "").lower()
        size = path.stat().st_size
        return VideoInfo(size, kind, kind, image.mode, width, height, (1, 1), 0.0, 1, 0.0, False)


def store_image(path: Path, *, encode: Encode) -> StoredClip:
    """Encode an image in its stored form.

    Raises:
        Refused: the image is damaged, or longer than a JPEG can be.
    """
    file = io.BytesIO()
    with _open(path) as image:
        try:
            picture = upright_rgb(image)
            width, height = stored_size(*picture.size, encode=encode)
            picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
            picture.save(file, "JPEG", quality=encode.jpeg_quality, subsampling=0)
        except DAMAGE as error:
            raise Refused(Reason.NOT_IMAGE, str(error)) from None
    return StoredClip(file.getvalue(), ClipFormat(1, (1, 1), width, height))


def _shown_size(image: Image.Image) -> tuple[int, int]:
    """Return width and height of the upright image, without decoding it."""
    try:
        is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    except DAMAGE as error:
        raise Refused(Reason.NOT_IMAGE, str(error)) from None
    return (image.height, image.width) if is_rotated else (image.width, image.height)


def _open(path: Path) -> Image.Image:
    if path.exists() and not path.is_file():
        raise Refused(Reason.MISSING, "not a file")
    try:
        size = path.stat().st_size
        # Pillow 10.0 resolves a Path, and a link to a file in memory leads nowhere.
        image = Image.open(str(path), formats=FORMATS) if size else None
    except UnidentifiedImageError:
        raise Refused(Reason.NOT_IMAGE, "unknown image format") from None
    except Image.DecompressionBombError:
        raise Refused(Reason.TOO_LARGE, "decompression bomb") from None
    except OSError as error:
        raise Refused(Reason.MISSING, error.strerror or "cannot be read") from None
    except DAMAGE as error:
        raise Refused(Reason.NOT_IMAGE, str(error)) from None
    if image is None:
        raise Refused(Reason.EMPTY, "0 bytes")
    if image.width * image.height > MAX_PIXELS:
        raise Refused(Reason.TOO_LARGE, f"{image.width}x{image.height}")
    return image

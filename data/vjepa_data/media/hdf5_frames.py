"""Frames inside an HDF5 file, provided as a video: lossless, every frame a key frame, the same bytes each time.

h5py is imported late, since it is an optional package.
"""

import io
from fractions import Fraction
from typing import Any, BinaryIO

import av
import numpy as np
from PIL import Image

from vjepa_data.child_process import heartbeat
from vjepa_data.errors import BadInput
from vjepa_data.media.video import Reason, Refused


def open_hdf5(path: str) -> Any:
    """Open an HDF5 file for reading.

    Raises:
        BadInput: h5py is not installed.
        OSError: the file is missing or damaged.
    """
    try:
        import h5py
    except ImportError:
        raise BadInput(f"{path} needs h5py, which is not installed; run pip install 'vjepa-pretrain[robots]'") from None
    return h5py.File(path, "r")


def write_frames(path: str, dataset: str, frames_hz: float, out: BinaryIO) -> None:
    """Write a dataset of frames as a video: PNG in MOV, whose times and number of frames are exact.

    Args:
        path: the HDF5 file.
        dataset: uint8 [T, H, W, 3], or a compressed picture per row.
        frames_hz: frames per second.
        out: file to write to.

    Raises:
        Refused: the dataset is missing, damaged or holds something else.
    """
    try:
        with open_hdf5(path) as file:
            stored = file[dataset]
            rate = Fraction(frames_hz).limit_denominator(1001)
            with av.open(out, "w", format="mov", options={"fflags": "+bitexact"}) as container:
                stream = container.add_stream("png", rate=rate, options={"threads": "1", "flags": "+bitexact"})
                for number in range(len(stored)):
                    pixels = _read_frame(stored, number)
                    if number == 0:
                        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], "rgb24"
                    frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                    frame.pts = number
                    frame.time_base = 1 / rate
                    container.mux(stream.encode(frame))
                    heartbeat()
                container.mux(stream.encode())
    except (OSError, KeyError, RuntimeError) as error:
        raise Refused(Reason.MISSING, f"dataset {dataset}: {str(error).splitlines()[0]}") from None


def _read_frame(stored: Any, number: int) -> np.ndarray:
    """Return a frame as uint8 [H W 3]. Compressed pictures may be padded with zeros."""
    value = stored[number]
    if stored.ndim < 3:
        data = value if isinstance(value, bytes) else np.asarray(value, dtype=np.uint8).tobytes()
        with Image.open(io.BytesIO(data)) as picture:  # UnidentifiedImageError is an OSError
            return np.asarray(picture.convert("RGB"))
    if value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
        found = f"{value.dtype} {list(stored.shape)}"
        raise Refused(
            Reason.NOT_IMAGE, f"dataset {stored.name} is {found}; frames are uint8 [frames, height, width, 3]"
        )
    return np.ascontiguousarray(value)

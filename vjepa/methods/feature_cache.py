"""Features of a frozen encoder on the disk, so that later epochs train the predictor alone.

    FOLDER/IDENTITY/identity.json      encoder, settings, precision, device
    FOLDER/IDENTITY/WRITER.features    records of equal size, one after another
    FOLDER/IDENTITY/WRITER.keys        for each record: hash of the frame's pixels, checksum of the record

A frame is found by its pixels, after crop and flip, so a changed corpus or crop never finds the features of another.
A changed encoder has another identity. Each process writes files of its own and reads the files of all processes. A
record counts once its key is written, and a damaged record is computed again. When the disk is full, nothing more is
written.

Letters: F frames, Y X pixels, N tokens of a frame, D width.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
import socket
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from jaxtyping import Float, UInt8
from torch import Tensor

from vjepa.atomic import new_file

log = logging.getLogger(__name__)

KEY = np.dtype([("key", "V16"), ("checksum", "<u4")])

RESERVED_BYTES = 4 << 30
"""Free space that is left on the disk for checkpoints and other users."""

REFRESH_S = 60.0
"""Interval at which records of other processes are looked for while frames are missing, in seconds."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def frame_keys(frames: UInt8[Tensor, "F Y X C"]) -> list[bytes]:
    """Return a hash of the pixels and the shape of each frame."""
    shape = repr(tuple(frames.shape[1:])).encode()
    return [xxhash.xxh3_128_digest(shape + frame.tobytes()) for frame in frames.cpu().numpy()]


class FeatureCache:
    """Features of frames under an encoder."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open the features that exist.

        Args:
            folder: folder of the features of all encoders.
            identity: everything that features depend on besides the pixels.
        """
        text = json.dumps(identity, sort_keys=True, indent=1)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.writer = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        self.is_writable = True
        self._places: dict[bytes, tuple[str, int, int]] = {}  # file, number and checksum of the record
        self._files: dict[str, int] = {}
        self._read_of: dict[str, int] = {}  # records of each file that are in the table
        self._refreshed = 0.0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.folder / "identity.json", overwrite=True) as partial:
                partial.write_text(text + "\n")
        except OSError as error:
            self._stop_writing(error)
        self._refresh()

    def features(
        self,
        keys: Sequence[bytes],
        encode: Callable[[list[int]], Float[Tensor, "M N D"]],
        *,
        device: torch.device,
    ) -> Float[Tensor, "F N D"]:
        """Return the features of frames, and encode and store the missing features.

        All ranks must call this together. Where any rank lacks a frame, every rank calls `encode`, since the encoder's
        weights may be sharded.

        Args:
            keys: result of `frame_keys`.
            encode: computes the features of the frames with these numbers.
            device: where the features go.
        """
        found = self._read_all(keys)
        if len(found) < len(set(keys)) and time.monotonic() - self._refreshed > REFRESH_S:
            self._refresh()
            found |= self._read_all([key for key in keys if key not in found])
        missing = {key: number for number, key in enumerate(keys) if key not in found}
        if _any_rank(bool(missing), device):
            encoded = encode(list(missing.values()) or [0])
            if missing:
                parts = encoded.detach().cpu()
                found |= dict(zip(missing, parts, strict=True))
                self._write(list(missing), parts)
        return torch.stack([found[key] for key in keys]).to(device, non_blocking=True)

    def _read_all(self, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        found = {}
        for key in dict.fromkeys(keys):
            place = self._places.get(key)
            record = None if place is None else self._read(*place)
            if record is not None:
                found[key] = record
            elif place is not None:
                log.warning("features in %s are damaged or gone; they are computed again", place[0])
                del self._places[key]
        return found

    def _read(self, name: str, number: int, checksum: int) -> Tensor | None:
        """Return a record, or None if it is damaged."""
        _, dtype, tokens, width = name.removesuffix(".features").rsplit(".", 3)
        kind, shape = DTYPES[dtype], (int(tokens), int(width))
        size = shape[0] * shape[1] * kind.itemsize
        try:
            if name not in self._files:
                self._files[name] = os.open(self.folder / name, os.O_RDONLY)
            data = os.pread(self._files[name], size, number * size)
        except OSError:
            return None
        if len(data) != size or zlib.crc32(data) != checksum:
            return None
        return torch.frombuffer(bytearray(data), dtype=kind).view(shape)

    def _refresh(self) -> None:
        """Read the keys that any process has written since."""
        self._refreshed = time.monotonic()
        for path in sorted(self.folder.glob("*.keys")):
            name, known = f"{path.stem}.features", self._read_of.get(path.name, 0)
            try:
                with path.open("rb") as file:
                    file.seek(known * KEY.itemsize)
                    data = file.read()
            except OSError:
                continue
            rows = np.frombuffer(data[: len(data) // KEY.itemsize * KEY.itemsize], dtype=KEY)
            for number, (key, checksum) in enumerate(rows.tolist(), start=known):
                self._places.setdefault(bytes(key), (name, number, checksum))
            self._read_of[path.name] = known + len(rows)

    def _write(self, keys: Sequence[bytes], features: Float[Tensor, "M N D"]) -> None:
        """Append records, then their keys. A failure ends writing and nothing else."""
        if not self.is_writable:
            return
        dtype = str(features.dtype).removeprefix("torch.")
        stem = f"{self.writer}.{dtype}.{features.shape[1]}.{features.shape[2]}"
        data = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in features]
        try:
            if shutil.disk_usage(self.folder).free < RESERVED_BYTES + sum(map(len, data)):
                raise OSError(f"less than {RESERVED_BYTES >> 30} GiB are free")
            with (self.folder / f"{stem}.features").open("ab") as file:
                file.write(b"".join(data))
            rows = np.array([(key, zlib.crc32(part)) for key, part in zip(keys, data, strict=True)], dtype=KEY)
            with (self.folder / f"{stem}.keys").open("ab") as file:
                file.write(rows.tobytes())
        except OSError as error:
            self._stop_writing(error)
            return
        first = self._read_of.get(f"{stem}.keys", 0)
        for number, (key, checksum) in enumerate(rows.tolist(), start=first):
            self._places[bytes(key)] = (f"{stem}.features", number, checksum)
        self._read_of[f"{stem}.keys"] = first + len(rows)

    def _stop_writing(self, error: OSError) -> None:
        self.is_writable = False
        reason = error.strerror or error
        log.warning("%s: no more features are stored (%s); training goes on without them", self.folder, reason)


def _any_rank(value: bool, device: torch.device) -> bool:
    """Return whether any rank says so."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    count = torch.tensor(int(value), device=device)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    return bool(count.item())

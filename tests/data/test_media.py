"""Untrusted files opened in this process are rejected with a reason and have no other effect."""

import io
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vjepa_data.corpus.remote import object_store
from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.media import tasks
from vjepa_data.media.fetch import FileRef, open_local
from vjepa_data.media.image import probe_image, store_image
from vjepa_data.media.video import Reason, Refused, VideoInfo
from vjepa_data.spec import Encode

ROTATED = 6  # EXIF: display rotated by 90 degrees


def rotated_jpeg() -> bytes:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = ROTATED
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(picture).save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_a_rotated_image_is_probed_and_stored_upright(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(rotated_jpeg())
    seen, kept = probe_image(file), store_image(file, encode=Encode(short_side_px=32))
    assert (seen.width, seen.height) == (40, 60)
    assert (kept.stored.width, kept.stored.height) == (32, 48)


def test_16_bit_images_are_scaled_and_32_bit_rejected(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65_535, 64 * 64).reshape(64, 64)
    file = tmp_path / "x.png"
    Image.fromarray(ramp.astype(np.uint16)).save(file)
    stored = store_image(file, encode=Encode(short_side_px=64)).data
    read = decode(file.read_bytes(), [0], backend="image", expect=Expect(1, 64, 64))
    for grey in (np.asarray(Image.open(io.BytesIO(stored))), read[0]):
        assert np.abs(grey - ramp[..., None] / 257).max() < 3
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(Refused, match="pixels have 32 bits, whose range is unknown; convert them to 8 or 16"):
        store_image(tmp_path / "x.tif", encode=Encode())


@pytest.mark.filterwarnings("ignore::UserWarning")  # from Pillow
def test_a_damaged_rotated_image_is_rejected(tmp_path: Path) -> None:
    file, data = tmp_path / "a.jpg", rotated_jpeg()
    draw = np.random.default_rng(0)
    refused = 0
    for cut in draw.integers(1, len(data), 100).tolist():
        torn = bytearray(data[:cut])
        torn[draw.integers(cut)] ^= 0xFF
        file.write_bytes(torn)
        for read in (probe_image, lambda path: store_image(path, encode=Encode())):
            try:
                read(file)
            except Refused:
                refused += 1
    assert refused > 100


def test_an_image_with_a_truncated_header_is_rejected(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    header = bytearray(file.getvalue())
    header[8:12] = (5).to_bytes(4)  # the first chunk, too short
    header[21:25] = zlib.crc32(header[12:21]).to_bytes(4)
    (tmp_path / "a.png").write_bytes(header)
    with pytest.raises(Refused) as caught:
        probe_image(tmp_path / "a.png")
    assert caught.value.reason == Reason.NOT_IMAGE


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://[::1/x.mp4", "Invalid IPv6 URL"),
        (f"http://{'a' * 64}.com/x.mp4", "label"),
        ("file:///etc/passwd", "unsupported scheme 'file'"),
    ],
)
def test_an_invalid_url_is_rejected(url: str, why: str) -> None:
    with pytest.raises(Refused) as caught, open_local(FileRef(url)):
        pass
    assert why in caught.value.detail


def test_a_url_that_needs_a_missing_package_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    object_store.cache_clear()
    monkeypatch.setattr("fsspec.filesystem", missing)
    with pytest.raises(Refused) as caught, open_local(FileRef("s3://bucket/x.mp4")):
        pass
    assert "Install s3fs" in caught.value.detail


def test_a_clip_that_decord_cannot_decode_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    class DECORDError(Exception):
        pass

    def fail() -> None:
        raise DECORDError("a stack of C++\nError sending packet.")

    monkeypatch.setattr(tasks, "open_decord", lambda data: (SimpleNamespace(next=fail), (DECORDError,)))
    info = VideoInfo(1, "mp4", "h264", "yuv420p", 8, 8, (4, 1), 1.0, 4, 0.0, False)
    with pytest.raises(Refused) as caught:
        tasks.read_with_decord(b"", info)
    assert caught.value.detail == "decord: Error sending packet."

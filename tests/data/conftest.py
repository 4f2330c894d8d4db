"""Small real corpora: H.264 files whose frames tell their own number, in tar shards that webdataset wrote."""

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import xxhash

from vjepa_data.corpus.format import canonical_json

BITS = 12


def numbered_frame(number: int, width: int, height: int, look: int) -> np.ndarray:
    """Draw a frame that says its number: a row of black and white squares, over a background that moves."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([(x * 2 + number * 3 + look) % 256, (y * 3 + look * 7) % 256, (x + y + number) % 256], axis=-1)
    picture = picture.astype(np.uint8)
    size = width // BITS
    for bit in range(BITS):
        picture[: height // 2, bit * size : (bit + 1) * size] = 255 if number >> bit & 1 else 0
    return picture


def read_number(frame: np.ndarray) -> int:
    """Read the number off a decoded frame."""
    height, width = frame.shape[:2]
    size = width // BITS
    return sum(int(frame[height // 4, b * size + size // 2].mean() > 128) << b for b in range(BITS))


def encode(*, frames: int = 48, fps: Fraction | int = 12, width: int = 96, height: int = 64, look: int = 0) -> bytes:
    """Encode a video in the canonical form: H.264 yuv420p, constant rate, closed groups of 12, no B-frames' delay."""
    options = {"crf": "18", "g": "12", "keyint_min": "12", "sc_threshold": "0", "tune": "fastdecode", "threads": "1"}
    options |= {"preset": "veryfast", "x264-params": "open-gop=0"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        _encode(path, options, frames=frames, fps=fps, width=width, height=height, look=look)
        return path.read_bytes()


def _encode(path: Path, options: dict, *, frames: int, fps: Fraction | int, width: int, height: int, look: int) -> None:
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, width, height, look), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_corpus(folder: Path, shards: list[list[dict]], *, name: str = "toy", split: str = "train") -> Path:
    """Write shards, index and manifest from samples {key, video, frames, fps, width, height, suffix}."""
    (folder / "shards").mkdir(parents=True)
    files, rows = [], []
    for number, samples in enumerate(shards):
        path = folder / "shards" / f"{name}-{split}-{number:06d}.tar"
        with wds.TarWriter(str(path), mtime=0) as tar:  # pyright: ignore[reportAttributeAccessIssue]
            for s in samples:
                facts = {k: v for k, v in s.items() if k != "video"}
                suffix = s.get("suffix", "mp4")
                tar.write({"__key__": s["key"], "json": json.dumps(facts).encode(), suffix: s["video"]})
        with tarfile.open(path) as tar:
            at = {m.name: (m.offset_data, m.size) for m in tar.getmembers()}
        for position, s in enumerate(samples):
            suffix = s.get("suffix", "mp4")
            row = {"key": s["key"], "split": split, "shard": number, "position": position, "suffix": suffix}
            row["video_offset"], row["video_size"] = at[f"{s['key']}.{suffix}"]
            row["json_offset"], row["json_size"] = at[f"{s['key']}.json"]
            row |= {k: s[k] for k in ("frames", "fps", "width", "height")}
            row["duration_s"] = s["frames"] / s["fps"]
            row |= {"group": s["key"], "labels": "{}", "xxh64": xxhash.xxh64_hexdigest(s["video"])}
            rows.append(row)
        data = path.read_bytes()
        files.append(
            {
                "file": f"shards/{path.name}",
                "split": split,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "samples": len(samples),
            }
        )
    kinds = {"shard": pa.int32(), "position": pa.int32(), "frames": pa.int32(), "width": pa.int32()}
    kinds |= {"height": pa.int32(), "fps": pa.float64()}
    table = pa.Table.from_pylist(rows)
    schema = pa.schema([pa.field(f.name, kinds.get(f.name, f.type)) for f in table.schema])
    pq.write_table(table.cast(schema), folder / "samples.parquet")
    manifest = {
        "format": 1,
        "name": name,
        "spec": {},
        "tools": {},
        "shards": files,
        "splits": {split: {"samples": len(rows), "shards": len(files), "seconds": 1.0}},
        "samples_sha256": hashlib.sha256((folder / "samples.parquet").read_bytes()).hexdigest(),
    }
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write a manifest under the hash that fits it."""
    manifest = {k: v for k, v in manifest.items() if k != "hash"}
    manifest["hash"] = hashlib.sha256(canonical_json(manifest)).hexdigest()
    (folder / "manifest.json").write_bytes(canonical_json(manifest))


def samples_of(video: bytes, keys: list[str], **facts) -> list[dict]:
    """Describe several samples that share one video's bytes."""
    facts = {"frames": 48, "fps": 12.0, "width": 96, "height": 64, **facts}
    return [{"key": key, "video": video, **facts} for key in keys]


@pytest.fixture(scope="session")
def videos() -> list[bytes]:
    """Six different videos of 48 frames at 12 fps, 96x64."""
    return [encode(look=look * 40) for look in range(6)]


@pytest.fixture(scope="session")
def corpus(videos: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 26 samples in four uneven shards, not to be changed."""
    counts, shards, total = [9, 1, 12, 4], [], 0
    for count in counts:
        shards.append([])
        for i in range(total, total + count):
            shards[-1] += samples_of(videos[i % len(videos)], [f"toy-{i:04d}"])
        total += count
    return write_corpus(tmp_path_factory.mktemp("data") / "toy", shards)


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., Path]:
    """The writer itself, for corpora of a test's own."""
    return write_corpus


@pytest.fixture(scope="session")
def make_video() -> Callable[..., bytes]:
    """The encoder itself, for videos of other lengths and rates."""
    return encode


@pytest.fixture(scope="session", name="read_number")
def _read_number() -> Callable[[np.ndarray], int]:
    """Reads the number off a frame of `videos`."""
    return read_number


@pytest.fixture(scope="session")
def edit_manifest() -> Callable[..., None]:
    """Changes the manifest of a corpus, and its hash with it: `edit_manifest(folder, change)`."""

    def edit(folder: Path, change: Callable[[dict], object]) -> None:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        change(manifest)
        write_manifest(folder, manifest)

    return edit

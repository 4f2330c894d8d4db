"""A corpus of real shards and a run that is small enough to train in a test."""

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import hypothesis
import numpy as np
import pytest
from jaxtyping import install_import_hook
from object_store import ObjectStore

# Before they are loaded: every call in these packages is held to its signature.
install_import_hook(("vjepa", "vjepa_data", "vjepa_launch"), "signatures.hold")

from vjepa.config import Run  # noqa: E402
from vjepa_data.corpus import remote  # noqa: E402
from vjepa_data.corpus.format import SampleRecord, ShardWriter, read_record, write_manifest  # noqa: E402

# Slow tests must not fail on a busy machine.
hypothesis.settings.register_profile("project", deadline=None)
hypothesis.settings.load_profile("project")

# Before torch is loaded: tiny tensors gain nothing from threads, and on a busy machine lose a factor of four.
os.environ.setdefault("OMP_NUM_THREADS", "1")

FRAMES, FPS, SIDE = 24, 8, 48

LONGEST_GROUPS = ("slurm", "distributed/test_ranks.py", "learning", "examples", "docs/test_pages.py")
"""Groups of tests to start with, so that no worker is left alone with a long group at the end."""


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run all tests of a file on one worker, so that its fixtures are made once, and the longest groups first."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(f"{item.path.parent.name}/{item.path.name}"))
    order = {name: number for number, name in enumerate(LONGEST_GROUPS)}
    items.sort(key=lambda item: order.get(_group_of(item), len(order)))


def _group_of(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return mark.args[0]


def encode_video(look: int, codec: str = "libx264") -> bytes:
    """A moving pattern, as H.264 unless said: one closed group of pictures every 12 frames."""
    sink = io.BytesIO()
    y, x = np.mgrid[:SIDE, :SIDE]
    with av.open(sink, "w", format="mp4") as container:
        options = {"crf": "20", "g": "12", "threads": "1"}
        if codec == "libx264":
            options |= {"preset": "ultrafast", "x264-params": "open-gop=0"}
        stream = container.add_stream(codec, rate=FPS, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            ring = np.hypot(x - SIDE / 2 - number * (look % 3 - 1), y - SIDE / 2 - number * (look % 2)) + 7 * look
            picture = np.stack([128 + 100 * np.sin(ring / (2 + channel)) for channel in range(3)], axis=-1)
            frame = av.VideoFrame.from_ndarray(picture.astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return sink.getvalue()


def write_tiny_corpus(folder: Path, codec: str = "libx264") -> Path:
    """Twenty samples in three uneven shards, made by the builder's own writer."""
    (folder / "shards").mkdir(parents=True)
    stored = {"frames": FRAMES, "fps": float(FPS), "width": SIDE, "height": SIDE, "duration_s": FRAMES / FPS}
    videos = [encode_video(look, codec) for look in range(5)]
    first = 0
    for number, count in enumerate((7, 9, 4)):
        writer = ShardWriter(folder, number=number, file=f"shards/tiny-train-{number:06d}.tar", split="train")
        for key in range(first, first + count):
            labels = {"look": f"look {key % len(videos)}", "speed": key % 2}
            facts = {"stored": stored, "group": str(key), "labels": labels}
            writer.write(
                SampleRecord(key=f"tiny-{key:03d}", video=videos[key % len(videos)], suffix="mp4", facts=facts)
            )
        writer.commit(plan="test")
        first += count
    records = [record for number in range(3) if (record := read_record(folder, number, plan="test"))]
    write_manifest(folder, records, [], name="tiny", spec={}, tools={})
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty samples in three shards, not to be changed."""
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


@pytest.fixture(scope="session")
def tiny_run(tiny_corpus: Path) -> Callable[..., Run]:
    """Make a run of a few seconds. Nested settings such as `optim={"lr": 1.0}` replace single names."""
    return maker_of_runs(tiny_corpus)


@pytest.fixture
def tiny_av1_run(tmp_path: Path) -> Callable[..., Run]:
    """Make the same run on AV1 videos, which decord does not decode."""
    return maker_of_runs(write_tiny_corpus(tmp_path / "av1", codec="libsvtav1"))


def maker_of_runs(corpus: Path) -> Callable[..., Run]:
    """Return the function of the fixture `tiny_run` for a corpus."""

    def make(**changes: Any) -> Run:
        settings: dict[str, Any] = {
            "name": "tiny",
            "steps": 6,
            "batch_size": 4,
            "precision": "fp32",
            "data": {
                "sources": [{"shards": str(corpus)}],
                "clip": {"frames": 4, "fps": 4},
                "crop": {"px": 32},
            },
            "model": {
                "encoder": {"name": "custom", "width": 24, "depth": 2, "heads": 2},
                "predictor": {"width": 12, "depth": 1, "heads": 1},
                "patch_px": 8,
            },
            "objective": {
                "masks": [
                    {"mode": "balanced", "blocks": 2, "block_share": 0.15},
                    {"mode": "balanced", "blocks": 1, "block_share": 0.5},
                ]
            },
            "optim": {"lr": 1e-2, "warmup_steps": 1, "decay": "constant", "ema": 0.9},
            "loader": {"workers": 0, "decoder": "pyav"},
            "checkpoint": {"every_steps": 3},
            "track": {"wandb": "off", "wandb_timeout_s": 120, "every_steps": 2, "monitor_every_steps": 6},
            "parallel": {"timeout_s": 60},
        }
        for name, value in changes.items():
            old = settings.get(name)
            settings[name] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        return Run.model_validate(settings)

    return make


@pytest.fixture
def store() -> Iterator[ObjectStore]:
    """An empty object store on this machine."""
    made = ObjectStore()
    yield made
    made.close()


@pytest.fixture
def s3(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """Make `s3://` mean this store. Clients that this process has cached for another store are dropped."""
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of botocore, whose pauses are long; s3fs and we try again as well
    remote.object_store.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    return store

"""A checkpoint in which every parameter has been moved, and a small real corpus of known objects."""

import json
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from vjepa import config
from vjepa.checkpoints.checkpoint import digest
from vjepa.evals.base import EvaluationContext, open_context
from vjepa.nn.encoder import Encoder
from vjepa.nn.predictor import Predictor
from vjepa_data.corpus.format import SampleRecord, ShardWriter, read_record, write_manifest
from vjepa_data.rng import generator
from vjepa_data.settings import Data, Source

PX, FRAMES, FPS = 32, 4, 8.0


def make_run(corpus: Path, **model: object) -> config.Run:
    """Return the settings of a run of a tiny model, in which all sizes differ."""
    sizes = {
        "encoder": {"name": "custom", "width": 48, "depth": 2, "heads": 3},
        "predictor": {"width": 36, "depth": 1, "heads": 2},
        "patch_px": 8,
    }
    data = {"sources": (Source(shards=str(corpus)),), "clip": {"frames": FRAMES, "fps": FPS}, "crop": {"px": PX}}
    return config.Run(
        name="tiny",
        steps=100,
        batch_size=4,
        data=Data.model_validate(data),
        model=config.Model.model_validate({**sizes, **model}),
        objective={"name": "vjepa2_1" if model.get("predict_context") else "vjepa2"},  # pyright: ignore[reportArgumentType]
        optim=config.Optim(lr=1e-3),
    )


def make_tensors(run: config.Run) -> dict[str, torch.Tensor]:
    """Return all three models with every parameter moved off its start, so that a swapped bias is noticed."""
    parts = {
        "encoder": Encoder(run.model, seed=1),
        "target": Encoder(run.model, seed=2),
        "predictor": Predictor(run.model, len(run.objective.mask_kinds), seed=3),
    }
    noise = torch.Generator().manual_seed(4)
    return {
        f"{part}.{name}": tensor + 0.05 * torch.randn(tensor.shape, generator=noise)
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }


def write_checkpoint(run: config.Run, folder: Path, *, step: int = 40, predictor: bool = True) -> Path:
    """Write a run folder with a checkpoint, as training does, or with the head of another objective."""
    tensors = make_tensors(run)
    if not predictor:
        tensors = {name: one for name, one in tensors.items() if not name.startswith("predictor.")}
        tensors["predictor.net.0.weight"] = torch.zeros(3, 48)
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save_dcp(tensors, checkpoint_id=path, no_dist=True)
    files = {one.name: {"bytes": one.stat().st_size, "xxh3": digest(one)} for one in path.iterdir()}
    state = {
        "format": 1,
        "step": step,
        "world": 1,
        "settings": run.model_dump(mode="json"),
        "settings_hash": "5e77",
        "manifests": ["c0ffee"],
        "wandb_id": None,
        "versions": {"vjepa": "0"},
        "files": files,
    }
    (path / "state.json").write_text(json.dumps(state))
    return folder


@pytest.fixture(scope="session")
def trained(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint at step 40. Read only."""
    return write_checkpoint(make_run(scenes), tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="session")
def make_trained(scenes: Path) -> Callable[..., Path]:
    """Write another run folder: `make_trained(folder, rope="interleaved")`."""

    def make(folder: Path, *, _without_predictor: bool = False, **model: object) -> Path:
        return write_checkpoint(make_run(scenes, **model), folder, predictor=not _without_predictor)

    return make


def draw_scene(number: int) -> tuple[np.ndarray, dict]:
    """Draw a disc or a square that slides over a grey ground: uint8 [12 64 64 3], and its labels."""
    draw = generator(0, "test scene", number)
    shape, size = ("disc", "square")[number % 2], 0.2
    start, speed = draw.uniform(0.3, 0.7, 2), draw.uniform(-0.25, 0.25, 2)
    colour = draw.integers(120, 256, 3)
    where = start + speed * (np.arange(12) / 8)[:, None]  # [12 2], shares of the frame
    places = (np.arange(64) + 0.5) / 64
    x, y = places[None, None, :] - where[:, 0, None, None], places[None, :, None] - where[:, 1, None, None]
    inside = np.hypot(x, y) < size if shape == "disc" else np.maximum(abs(x), abs(y)) < size * 0.8
    frames = np.where(inside[..., None], colour, 60).astype(np.uint8)
    track = {"shape": shape, "size": size, "x": where[:, 0].tolist(), "y": where[:, 1].tolist(), "visible": [True] * 12}
    return frames, {"shape": shape, "speed": float(np.hypot(*speed)), "tracks": [track]}


def encode_mp4(path: Path, frames: np.ndarray, *, fps: int = 8) -> bytes:
    """Encode a real mp4 in the canonical form."""
    options = {"crf": "12", "g": "12", "tune": "fastdecode", "preset": "veryfast", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.read_bytes()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 16 scenes to train on and 24 to evaluate on, with labels and tracks. Read only."""
    folder = tmp_path_factory.mktemp("scenes") / "shards"
    (folder / "shards").mkdir(parents=True)
    stored = {"frames": 12, "fps": 8.0, "width": 64, "height": 64, "duration_s": 1.5}
    number = 0
    for shard, (split, count) in enumerate((("train", 16), ("val", 24))):
        writer = ShardWriter(folder, number=shard, file=f"shards/scenes-{split}-{shard:06d}.tar", split=split)
        for _ in range(count):
            frames, labels = draw_scene(number)
            facts = {"stored": stored, "group": f"g{number}", "labels": labels}
            video = encode_mp4(folder.parent / "one.mp4", frames)
            writer.write(SampleRecord(f"scene-{number:04d}", video, "mp4", facts))
            number += 1
        writer.commit(plan="test")
    records = [record for number in range(2) if (record := read_record(folder, number, plan="test"))]
    write_manifest(folder, records, (), name="scenes", spec={}, tools={})
    return folder


@pytest.fixture(scope="session")
def write_corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a corpus of a single scene under given labels: `write_corpus(folder, train=[{"word": "a"}], val=[...])`."""
    scene = draw_scene(0)[0]
    place = tmp_path_factory.mktemp("one") / "one.mp4"

    def write(folder: Path, *, frames: int = 12, **splits: list[dict]) -> Path:
        (folder / "shards").mkdir(parents=True)
        video = encode_mp4(place, scene[:frames])
        stored = {"frames": frames, "fps": 8.0, "width": 64, "height": 64, "duration_s": frames / 8}
        for shard, (split, labels) in enumerate(splits.items()):
            writer = ShardWriter(folder, number=shard, file=f"shards/odd-{split}-{shard:06d}.tar", split=split)
            for number, one in enumerate(labels):
                facts = {"stored": stored, "group": f"{split}{number}", "labels": one}
                writer.write(SampleRecord(f"{split}-{number:04d}", video, "mp4", facts))
            writer.commit(plan="test")
        records = [record for number in range(len(splits)) if (record := read_record(folder, number, plan="test"))]
        write_manifest(folder, records, (), name="odd", spec={}, tools={})
        return folder

    return write


@pytest.fixture
def context(tmp_path: Path) -> Iterator[EvaluationContext]:
    """The context of an evaluation in a single process, with its cache in the test's folder."""
    with open_context(tmp_path / "result.json") as context:
        yield context


@pytest.fixture
def write_scene() -> Callable[[Path, int], Path]:
    """Write a scene as an mp4 file: `write_scene(folder / "a.mp4", 3)`."""

    def write(path: Path, number: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        encode_mp4(path, draw_scene(number)[0])
        return path

    return write

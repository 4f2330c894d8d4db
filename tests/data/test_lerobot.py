"""LeRobot folders of both layouts, written here: frames and rows of an episode agree, and bad folders are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vjepa_data.builder.lerobot import open_folder, refusals, write_rows
from vjepa_data.builder.shard import shard
from vjepa_data.corpus.index import Index
from vjepa_data.errors import BadInput
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.reader.signals import read_rows
from vjepa_data.settings import Clip, Crop, Data, Loader, Source
from vjepa_data.spec import Spec
from vjepa_data.synthetic.physics import write_video
from vjepa_data.worlds.episodes import Episodes, simulate
from vjepa_data.worlds.files import write_episodes
from vjepa_data.worlds.two_room import TwoRoom

FPS, FRAMES, PX, CAMERA = 10, 12, 64, "observation.images.top"
WORLD = TwoRoom()


def episodes(count: int = 3) -> tuple[Episodes, list[np.ndarray]]:
    found = simulate(WORLD, policy="expert", layout="fixed", seed=0, episodes=range(count), frames=FRAMES)
    return found, [
        WORLD.render(states, np.tile(place, (FRAMES, 1)), PX)
        for states, place in zip(found.states, found.layouts, strict=True)
    ]


def table_of(found: Episodes, number: int) -> dict[str, list]:
    """The rows of an episode. As robots record it, the last frame has an action too."""
    actions = np.concatenate((found.actions[number], np.zeros((1, 2))))
    return {
        "action": actions.astype(np.float32).tolist(),
        "observation.state": found.states[number].astype(np.float32).tolist(),
        "timestamp": [np.float32(i / FPS) for i in range(FRAMES)],
        "frame_index": list(range(FRAMES)),
        "episode_index": [number] * FRAMES,
    }


def write_info(folder: Path, version: str, paths: dict[str, str]) -> None:
    features = {
        CAMERA: {"dtype": "video"},
        "action": {"dtype": "float32", "shape": [2]},
        "observation.state": {"dtype": "float32", "shape": [2]},
    }
    info = {"codebase_version": version, "fps": FPS, "features": features, "chunks_size": 1000, **paths}
    (folder / "meta").mkdir(parents=True)
    (folder / "meta" / "info.json").write_text(json.dumps(info))


def write_table(path: Path, rows: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)


def write_v2(folder: Path) -> None:
    paths = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    write_info(folder, "v2.1", paths)
    found, frames = episodes()
    lines = []
    for number, pixels in enumerate(frames):
        write_table(folder / f"data/chunk-000/episode_{number:06d}.parquet", table_of(found, number))
        video = folder / f"videos/chunk-000/{CAMERA}/episode_{number:06d}.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        write_video(video, pixels, fps=FPS)
        lines.append(json.dumps({"episode_index": number, "tasks": ["go"], "length": FRAMES}))
    (folder / "meta" / "episodes.jsonl").write_text("\n".join(lines) + "\n")


def write_v3(folder: Path, **changes: Any) -> None:
    """All episodes share a video. Their rows lie in two files."""
    paths = {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    write_info(folder, "v3.0", paths)
    found, frames = episodes()
    video = folder / f"videos/{CAMERA}/chunk-000/file-000.mp4"
    video.parent.mkdir(parents=True)
    write_video(video, np.concatenate(frames), fps=FPS)
    tables, rows = [table_of(found, number) for number in range(3)], []
    for number in range(3):
        row = {
            "episode_index": number,
            "tasks": ["go"],
            "length": FRAMES,
            "dataset_from_index": number * FRAMES,
            "dataset_to_index": (number + 1) * FRAMES,
            "data/chunk_index": 0,
            "data/file_index": int(number == 2),
            f"videos/{CAMERA}/chunk_index": 0,
            f"videos/{CAMERA}/file_index": 0,
            f"videos/{CAMERA}/from_timestamp": number * FRAMES / FPS,
            f"videos/{CAMERA}/to_timestamp": (number + 1) * FRAMES / FPS,
        }
        rows.append(row | changes.get(f"episode_{number}", {}))
    for number, table in enumerate(tables):
        table.update(changes.get(f"rows_{number}", {}))
    both = {name: tables[0][name] + tables[1][name] for name in tables[0]}
    write_table(folder / "data/chunk-000/file-000.parquet", both)
    write_table(folder / "data/chunk-000/file-001.parquet", tables[2])
    write_table(
        folder / "meta/episodes/chunk-000/file-000.parquet", {name: [r[name] for r in rows] for name in rows[0]}
    )


def write_world(folder: Path) -> None:
    """The folder that `vjepa synthesize two_room --form lerobot` writes."""
    ask = {"policy": "expert", "layout": "fixed", "px": PX, "frames": FRAMES, "form": "lerobot"}
    write_episodes(WORLD, folder, episodes=3, seed=0, **ask)


def spec(**more: Any) -> Spec:
    signals = {
        "action": {"columns": ["dx", "dy"], "units": ["side", "side"], "kind": "action", "combine": "sum"},
        "state": {"columns": ["x", "y"], "units": ["side", "side"], "kind": "state"},
    }
    return Spec.model_validate({"signals": signals, "encode": {"short_side_px": PX, "crf": 12}, **more})


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_folder.cache_clear()


@pytest.mark.parametrize("write", [write_v2, write_v3, write_world])
def test_frames_and_rows_of_an_episode_agree(tmp_path: Path, write: Callable[[Path], None]):
    write(tmp_path / "robot")
    shard([str(tmp_path / "robot")], tmp_path / "corpus", spec=spec(), workers=1)
    index = Index(tmp_path / "corpus")
    assert len(index) == 3
    truth, _ = episodes()
    numbers = set()
    for sample in range(3):
        read = index.read(sample, ["action.npy", "state.npy"])
        number = read.labels["episode"]
        numbers.add(number)
        assert read.labels["task"] == ("two_room" if write is write_world else "go")
        assert index.frames[sample] == FRAMES
        states = read_rows(read.members["state.npy"], columns=2, name="state")
        actions = read_rows(read.members["action.npy"], columns=2, name="action")
        assert np.allclose(states, truth.states[number], atol=1e-6)
        assert np.allclose(actions[: FRAMES - 1], truth.actions[number], atol=1e-6)
    assert numbers == {0, 1, 2}
    data = Data(
        sources=(Source(shards=str(tmp_path / "corpus")),),
        clip=Clip(frames=4, fps=5),
        crop=Crop(px=PX, scale=(1, 1), aspect=(1, 1), flip=0),
        signals=("action", "state"),
    )
    (clips,) = next(iter(ClipLoader(data, Loader(workers=0), seed=0, batch_size=6))).groups
    red = clips.frames[..., 0].float() - clips.frames[..., 2].float()  # the disc
    weight = red.where(red > 60, 0)
    places = (np.arange(PX) + 0.5) / PX
    x, y = (np.einsum(f"btij,{axis}->bt", weight.numpy(), places) / weight.sum((2, 3)).numpy() for axis in "ji")
    # The disc that is seen lies where the state of the same frame says.
    assert np.abs(np.stack((x, y), -1) - clips.signals["state"].values.numpy()).max() < 1 / PX


def test_an_episode_stays_in_one_split(tmp_path: Path):
    write_v3(tmp_path / "robot")
    cut = {"kind": "fixed", "length_s": 0.6}
    manifest = shard([str(tmp_path / "robot")], tmp_path / "c", spec=spec(cut=cut, split={"val_share": 0.4}), workers=1)
    groups = {}
    for split in manifest.splits:
        index = Index(tmp_path / "c", split)
        for sample in range(len(index)):
            groups.setdefault(index.read(sample).labels["episode"], set()).add(split)
    assert sum(len(splits) for splits in groups.values()) == 3


LATE = [np.float32(i / FPS + 0.06) for i in range(FRAMES)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows_1": {"timestamp": LATE}}, "row 0 of episode 1 is 0.060 s from its frame at 10 fps"),
        ({"rows_1": {"timestamp": [np.float32("nan")] * FRAMES}}, "row 0 of episode 1 is nan s from its frame"),
        ({"rows_1": {"action": [[0.0, 0.0]] * 4 + [[float("nan"), 0.0]] * 8}}, "row 4 of action of episode 1"),
        ({"rows_1": {"action": [[0.0] * 3] * FRAMES}}, "action of episode 1 has 3 numbers, the spec has 2"),
        ({"rows_1": {"episode_index": [2] * FRAMES}}, "rows of episode 1 belong to other episodes"),
        ({"rows_1": {"action": [[0.0]] + [[0.0, 0.0]] * 11}}, "action of episode 1 has no numbers"),
        ({"episode_1": {"length": FRAMES + 3}}, "12 rows for 15 frames of episode 1"),
        (
            {"episode_1": {f"videos/{CAMERA}/from_timestamp": 1.5}},
            "episodes 1 and 2 share frames of file-000",
        ),
    ],
)
def test_an_episode_whose_rows_do_not_fit_is_refused_alone(tmp_path: Path, changes: dict, reason: str):
    write_v3(tmp_path / "robot", **changes)
    opened = open_folder(tmp_path / "robot", None)
    found = {number: refused.detail for number, refused in refusals(opened, spec().signals).items()}
    assert set(found) == ({1, 2} if "share" in reason else {1})
    assert all(reason in detail for detail in found.values())
    rows = np.load(write_rows(tmp_path / f"robot/videos/{CAMERA}/chunk-000/file-000.mp4", "action", None, 2))
    truth, _ = episodes()
    assert np.allclose(rows[: FRAMES - 1], truth.actions[0])


def test_a_build_keeps_the_other_episodes_of_a_video(tmp_path: Path):
    write_v3(tmp_path / "robot", rows_1={"timestamp": LATE})
    shard([str(tmp_path / "robot")], tmp_path / "corpus", spec=spec(), workers=1)
    index = Index(tmp_path / "corpus")
    assert {index.read(sample).labels["episode"] for sample in range(len(index))} == {0, 2}
    (reject,) = pq.read_table(tmp_path / "corpus/rejects.parquet").to_pylist()
    assert (reject["reason"], reject["start_s"]) == ("bad_signal", FRAMES / FPS)
    assert "0.060 s from its frame" in reject["detail"]


def test_frames_of_a_deleted_episode_belong_to_none(tmp_path: Path):
    write_v3(tmp_path / "robot")
    meta = tmp_path / "robot/meta/episodes/chunk-000/file-000.parquet"
    pq.write_table(pq.read_table(meta).take([0, 2]), meta)
    rows = np.load(write_rows(tmp_path / f"robot/videos/{CAMERA}/chunk-000/file-000.mp4", "state", None, 2))
    truth, _ = episodes()
    assert np.allclose(rows[:FRAMES], truth.states[0])
    assert np.allclose(rows[2 * FRAMES :], truth.states[2])
    assert not rows[FRAMES : 2 * FRAMES].any()


def test_a_camera_is_chosen_by_name(tmp_path: Path):
    write_v2(tmp_path / "robot")
    assert open_folder(tmp_path / "robot", "top").camera == CAMERA
    with pytest.raises(BadInput, match=r"no camera 'wrist'; it has the cameras observation\.images\.top"):
        open_folder(tmp_path / "robot", "wrist")
    info = json.loads((tmp_path / "robot/meta/info.json").read_text())
    info["features"]["observation.images.wrist"] = {"dtype": "video"}
    (tmp_path / "robot/meta/info.json").write_text(json.dumps(info))
    open_folder.cache_clear()
    with pytest.raises(BadInput, match=r"several cameras; .* set camera=NAME"):
        open_folder(tmp_path / "robot", None)


def test_unknown_versions_and_damaged_tables_are_refused(tmp_path: Path):
    write_v2(tmp_path / "robot")
    (tmp_path / "robot/meta/episodes.jsonl").write_text("{")
    with pytest.raises(BadInput, match="does not list its episodes"):
        open_folder(tmp_path / "robot", None)
    info = json.loads((tmp_path / "robot/meta/info.json").read_text())
    (tmp_path / "robot/meta/info.json").write_text(json.dumps(info | {"codebase_version": "v4.0"}))
    open_folder.cache_clear()
    with pytest.raises(BadInput, match=r"has version v4\.0"):
        open_folder(tmp_path / "robot", None)

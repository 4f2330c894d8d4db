"""Episodes of DROID, robomimic and Minari, written here: frames and rows agree, and bad episodes are refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vjepa_data.builder.shard import shard
from vjepa_data.corpus.index import Index
from vjepa_data.errors import BadInput
from vjepa_data.media.fetch import FileRef, open_local
from vjepa_data.reader.signals import read_rows
from vjepa_data.spec import Spec
from vjepa_data.synthetic.physics import write_video
from vjepa_data.worlds.episodes import WORLDS, Episodes, simulate

FPS, FRAMES, PX, COUNT = 10, 12, 64, 3
WORLD = WORLDS["two_room"]
FOUND: Episodes = simulate(WORLD, policy="expert", layout="fixed", seed=0, episodes=range(COUNT), frames=FRAMES)
PICTURES = [WORLD.render(s, np.tile(p, (FRAMES, 1)), PX) for s, p in zip(FOUND.states, FOUND.layouts, strict=True)]


def droid(folder: Path, *, actions: int = FRAMES, late_s: float = 0.0, bad: float = 0.0) -> None:
    """Write trajectories with an action for every row, as DROID records them."""
    for number in range(COUNT):
        episode = folder / f"Fri_{number}"
        (episode / "recordings" / "MP4").mkdir(parents=True)
        write_video(episode / "recordings" / "MP4" / "111.mp4", PICTURES[number], fps=FPS)
        write_video(episode / "recordings" / "MP4" / "222.mp4", PICTURES[number][:, ::-1], fps=FPS)
        facts = {"uuid": f"id{number}", "current_task": "go", "ext1_cam_serial": "111", "wrist_cam_serial": "222"}
        (episode / f"metadata_{number}.json").write_text(json.dumps(facts))
        with h5py.File(episode / "trajectory.h5", "w") as file:
            rows = np.concatenate((FOUND.actions[number], [[bad, 0.0]]))[:actions]
            file["action/cartesian_velocity"] = rows
            file["observation/robot_state/cartesian_position"] = FOUND.states[number][:, :1]
            file["observation/robot_state/gripper_position"] = FOUND.states[number][:, 1]
            times = np.arange(FRAMES) / FPS
            times[5] += late_s
            file["observation/timestamp/control/step_start"] = (1.7e12 + 1000 * times).astype(np.int64)


DROID_SOURCES = {
    "action": ["action/cartesian_velocity"],
    "state": ["observation/robot_state/cartesian_position", "observation/robot_state/gripper_position"],
}


def robomimic(folder: Path, *, actions: int = FRAMES, late_s: float = 0.0, bad: float = 0.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "demos.hdf5", "w") as file:
        file.create_group("data").attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": FPS}})
        for number in range(COUNT):
            group = file.create_group(f"data/demo_{number}")
            group["obs/agentview_image"] = PICTURES[number]
            group["obs/wrist_image"] = PICTURES[number][:, ::-1]
            group["next_obs/agentview_image"] = PICTURES[number]
            group["actions"] = np.concatenate((FOUND.actions[number], [[bad, 0.0]]))[:actions]
            group["states"] = FOUND.states[number]
            times = np.arange(FRAMES) / FPS
            times[5] += late_s
            group["timestamp"] = times
        file["mask/train"] = np.array([b"demo_0", b"demo_1"])
        file["mask/valid"] = np.array([b"demo_2"])


def minari(folder: Path, *, actions: int = FRAMES - 1, late_s: float = 0.0, bad: float = 0.0) -> None:
    """Write Minari episodes, with an observation more than actions."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "metadata.json").write_text(
        json.dumps({"env_spec": json.dumps({"kwargs": {"render_fps": FPS}})})
    )
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for number in range(COUNT):
            group = file.create_group(f"episode_{number}")
            group["observations/pixels"] = PICTURES[number]
            group["observations/state"] = FOUND.states[number]
            group["actions"] = np.concatenate(
                (FOUND.actions[number][:-1], [[bad or FOUND.actions[number][-1][0]] * 2])
            )[:actions]
            times = np.arange(FRAMES) / FPS
            times[5] += late_s
            group["infos/timestamp"] = times
            group["timestamps"] = times


def spec(kind: str, **more: Any) -> Spec:
    sources = DROID_SOURCES if kind == "droid" else {}
    signals = {
        "action": {"columns": ["dx", "dy"], "units": ["side"] * 2, "kind": "action", "combine": "sum"},
        "state": {"columns": ["x", "y"], "units": ["side"] * 2, "kind": "state"},
    }
    for name, source in sources.items():
        signals[name]["source"] = source
    camera = {"droid": "ext1", "robomimic": "agentview", "minari": None}[kind]
    return Spec.model_validate(
        {"signals": signals, "encode": {"short_side_px": PX, "crf": 12}, "camera": camera} | more
    )


WRITERS: dict[str, Callable[..., None]] = {"droid": droid, "robomimic": robomimic, "minari": minari}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", WRITERS)
def test_frames_and_rows_of_an_episode_agree(tmp_path: Path, kind: str):
    WRITERS[kind](tmp_path / "in")
    manifest = shard([str(tmp_path / "in")], tmp_path / "corpus", spec=spec(kind), workers=1)
    seen = set()
    for split in manifest.splits:
        index = Index(tmp_path / "corpus", split)
        for sample in range(len(index)):
            read = index.read(sample, ["action.npy", "state.npy"])
            number = int(str(read.labels["episode"])[-1])
            seen.add(number)
            assert (index.frames[sample], index.fps[sample]) == (FRAMES, FPS)
            states = read_rows(read.members["state.npy"], columns=2, name="state")
            actions = read_rows(read.members["action.npy"], columns=2, name="action")
            assert np.allclose(states, FOUND.states[number], atol=1e-6)
            assert np.allclose(actions[: FRAMES - 2], FOUND.actions[number][: FRAMES - 2], atol=1e-6)
            (tmp_path / "stored.mp4").write_bytes(read.video)
            assert np.abs(decode(tmp_path / "stored.mp4").astype(int) - PICTURES[number]).mean() < 3
            if kind == "droid":
                assert read.labels["task"] == "go"
            if kind == "robomimic":  # its own masks are kept
                assert split == ("val" if number == 2 else "train")
    assert seen == set(range(COUNT))


def decode(path: Path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_frames_of_a_dataset_are_read_without_loss(tmp_path: Path):
    robomimic(tmp_path)
    place = FileRef(str(tmp_path / "demos.hdf5"), column="data/demo_1/obs/agentview_image", frames_hz=29.97)
    contents = []
    for _ in range(2):
        with open_local(place) as path:
            assert np.array_equal(decode(path), PICTURES[1])
            contents.append(path.read_bytes())
    assert contents[0] == contents[1]


def test_compressed_pictures_are_decoded(tmp_path: Path):
    parts = []
    for pixels in PICTURES[0]:
        Image.fromarray(pixels).save(sink := io.BytesIO(), "jpeg", quality=95)
        parts.append(np.frombuffer(sink.getvalue(), np.uint8))
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        padded = np.zeros((FRAMES, max(map(len, parts))), np.uint8)
        for row, part in zip(padded, parts, strict=True):
            row[: len(part)] = part
        file["episode_0/images/top"] = padded
    manifest = shard(
        [str(tmp_path / "a.hdf5")], tmp_path / "c", spec=spec("minari", signals={}, frames_hz=FPS), workers=1
    )
    assert manifest.splits["train"]["samples"] == 1
    assert Index(tmp_path / "c").frames[0] == FRAMES


def test_an_episode_stays_in_one_split(tmp_path: Path):
    minari(tmp_path / "in")
    cut = {"kind": "fixed", "length_s": 0.6}
    manifest = shard(
        [str(tmp_path / "in")], tmp_path / "c", spec=spec("minari", cut=cut, split={"val_share": 0.4}), workers=1
    )
    groups: dict[str, set[str]] = {}
    for split in manifest.splits:
        index = Index(tmp_path / "c", split)
        for sample in range(len(index)):
            groups.setdefault(index.read(sample).labels["episode"], set()).add(split)
    assert len(groups) == COUNT
    assert all(len(splits) == 1 for splits in groups.values())


@pytest.mark.parametrize(
    ("kind", "flaw", "reason"),
    [
        ("robomimic", {"actions": FRAMES - 4}, "8 rows at 10 Hz end after 0.800 s"),
        ("minari", {"actions": FRAMES - 4}, "8 rows at 10 Hz end after 0.800 s"),
        ("droid", {"late_s": 0.06}, "row 5 is 0.060 s from its frame at 10 Hz"),
        ("robomimic", {"late_s": 0.06}, "row 5 is 0.060 s from its frame at 10 Hz"),
        ("droid", {"bad": float("nan")}, "is not finite"),
    ],
)
def test_an_episode_whose_rows_do_not_fit_is_refused(tmp_path: Path, kind: str, flaw: dict, reason: str):
    WRITERS[kind](tmp_path / "in", **flaw)
    with pytest.raises(BadInput, match=reason):
        shard([str(tmp_path / "in")], tmp_path / "corpus", spec=spec(kind), workers=1)


@pytest.mark.parametrize(
    ("kind", "change", "error"),
    [
        (
            "robomimic",
            {"camera": None},
            r"data/demo_0: several cameras; .*obs/agentview_image, obs/wrist_image; set camera",
        ),
        ("robomimic", {"camera": "top"}, "no camera 'top'; it has the cameras obs/agentview_image"),
        ("droid", {"camera": None}, "several cameras; it has the cameras 111, 222; set camera=NAME, such as ext1"),
        ("droid", {"camera": "999"}, "no camera 999; it has the cameras 111, 222"),
    ],
)
def test_a_missing_camera_is_named_beside_those_that_exist(tmp_path: Path, kind: str, change: dict, error: str):
    WRITERS[kind](tmp_path / "in")
    with pytest.raises(BadInput, match=error):
        shard([str(tmp_path / "in")], tmp_path / "c", spec=spec(kind, **change), workers=1)


def test_a_missing_camera_refuses_its_episode_alone(tmp_path: Path):
    droid(tmp_path / "in")
    (tmp_path / "in/Fri_1/recordings/MP4/111.mp4").unlink()
    manifest = shard([str(tmp_path / "in")], tmp_path / "c", spec=spec("droid"), workers=1)
    assert manifest.splits["train"]["samples"] == COUNT - 1
    (reject,) = pq.read_table(tmp_path / "c" / "rejects.parquet").to_pylist()
    assert reject["detail"] == "no camera ext1; it has the cameras 222"


def test_other_layouts_and_unknown_datasets_are_refused(tmp_path: Path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["x"] = np.zeros(3)
    with pytest.raises(BadInput, match="has neither data/demo_0"):
        shard([str(tmp_path / "a.hdf5")], tmp_path / "c", spec=spec("minari"), workers=1)
    (tmp_path / "a.hdf5").write_bytes(b"no")
    with pytest.raises(BadInput, match="cannot be read"):
        shard([str(tmp_path / "a.hdf5")], tmp_path / "c", spec=spec("minari"), workers=1)
    minari(tmp_path / "in")
    (tmp_path / "in/data/metadata.json").unlink()
    with pytest.raises(BadInput, match="does not state the rate of its frames; set frames_hz=RATE"):
        shard([str(tmp_path / "in")], tmp_path / "c", spec=spec("minari"), workers=1)
    signals = {"torque": {"columns": ["a"], "units": ["1"], "kind": "state"}}
    with pytest.raises(BadInput, match=r"no dataset torque; choose from actions, .* with signals\.torque\.source"):
        shard([str(tmp_path / "in")], tmp_path / "c", spec=spec("minari", signals=signals, frames_hz=FPS), workers=1)

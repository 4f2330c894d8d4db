"""Write episodes as videos with signals, in a form that `vjepa shard` takes: sidecar files or a LeRobot folder.

OUT/spec.yaml                       description of the signals: vjepa shard OUT --spec OUT/spec.yaml --out corpus
OUT/two_room_000000.mp4             frames
OUT/two_room_000000.action.npy      float32 [F - 1, A]
OUT/two_room_000000.state.npy       float32 [F, S]
OUT/two_room_000000.json            labels: world, policy, layout

OUT/spec.yaml, meta/, data/, videos/     the same episodes as a LeRobot folder of version 2.1, with the camera `top`
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jaxtyping import Float, UInt8

from vjepa_data.errors import BadInput
from vjepa_data.signal_spec import SignalSpec
from vjepa_data.synthetic.physics import write_video
from vjepa_data.worlds.base import LayoutKind, World
from vjepa_data.worlds.episodes import Policy, simulate

FPS = 10
UNIT = "side"
"""Lengths are in sides of the frame."""

CAMERA = "observation.images.top"
CHUNKS_SIZE = 1000
DATA_PATH = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
VIDEO_PATH = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
LEROBOT_INDEX = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}

Form = Literal["videos", "lerobot"]
Pixels = UInt8[np.ndarray, "F P P 3"]
Rows = Float[np.ndarray, "_F _A"]

CHUNK = 64
"""Episodes that are simulated together."""


def signal_specs(world: World) -> dict[str, SignalSpec]:
    """Return the description of a world's signals.

    A flip changes the sign of dx and maps a position x to 1 - x.
    """
    flip = tuple(-1.0 if name == "dx" else 1.0 for name in world.action_columns)
    is_x = tuple(name.endswith("x") for name in world.state_columns)
    return {
        "action": SignalSpec(
            columns=world.action_columns,
            units=(UNIT,) * len(world.action_columns),
            kind="action",
            combine="sum",
            flip=flip,
        ),
        "state": SignalSpec(
            columns=world.state_columns,
            units=(UNIT,) * len(world.state_columns),
            kind="state",
            flip=tuple(-1.0 if x else 1.0 for x in is_x),
            flip_offset=tuple(map(float, is_x)),
        ),
    }


def build_spec(world: World, *, px: int) -> dict[str, Any]:
    """Return the settings with which `vjepa shard` stores these videos.

    Videos of 48 px are stored at 96 px: decord returns clips that are 48 px wide with four channels (version 0.6.0).
    """
    signals = {name: spec.model_dump(mode="json", exclude_defaults=True) for name, spec in signal_specs(world).items()}
    return {"name": world.name, "encode": {"short_side_px": 96 if px == 48 else px}, "signals": signals}


def write_episodes(
    world: World,
    out: Path,
    *,
    episodes: int,
    seed: int,
    policy: Policy = "mixed",
    layout: LayoutKind = "fixed",
    px: int = 64,
    frames: int = 33,
    form: Form = "videos",
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write a video, its signals and its labels for each episode, and the spec for `vjepa shard`.

    Args:
        world: the world.
        out: folder, created if it does not exist.
        episodes: number of episodes.
        seed: seed of the corpus. Episode n of a seed is the same in a corpus of any length.
        policy: the rule that chooses the actions.
        layout: which layouts to draw.
        px: height and width, even.
        frames: length of an episode.
        form: sidecar files of the videos, or a LeRobot folder.
        advance: called with the number of episodes that are written and of all episodes.

    Returns:
        Paths of the videos.

    Raises:
        BadInput: the size is odd or too small, or an episode has fewer than two frames.
    """
    if px % 2 or not 32 <= px <= 512:
        raise BadInput(f"px ({px}) must be even, from 32 to 512; try 64")
    out.mkdir(parents=True, exist_ok=True)
    (out / "spec.yaml").write_text(yaml.safe_dump(build_spec(world, px=px), sort_keys=False))
    paths: list[Path] = []
    for first in range(0, episodes, CHUNK):
        numbers = range(first, min(episodes, first + CHUNK))
        found = simulate(world, policy=policy, layout=layout, seed=seed, episodes=numbers, frames=frames)
        for number, states, actions, place in zip(numbers, found.states, found.actions, found.layouts, strict=True):
            pixels = world.render(states, np.tile(place, (frames, 1)), px)
            if form == "lerobot":
                paths.append(_write_lerobot_episode(out, number, pixels, states, actions))
            else:
                labels = {"world": world.name, "policy": policy, "layout": layout}
                labels |= {n: round(float(value), 6) for n, value in zip(world.layout_columns, place, strict=True)}
                paths.append(_write_video(out / f"{world.name}_{number:06d}.mp4", pixels, states, actions, labels))
            advance(len(paths), episodes)
    if form == "lerobot":
        _write_lerobot_meta(out, world, episodes=episodes, frames=frames, px=px)
    return paths


def _write_video(path: Path, pixels: Pixels, states: Rows, actions: Rows, labels: dict[str, Any]) -> Path:
    write_video(path, pixels, fps=FPS)
    for name, rows in (("state", states), ("action", actions)):
        np.save(path.with_suffix(f".{name}.npy"), rows.astype(np.float32))
    path.with_suffix(".json").write_text(json.dumps(labels) + "\n")
    return path


def _write_lerobot_episode(out: Path, number: int, pixels: Pixels, states: Rows, actions: Rows) -> Path:
    """Write the video and the table of an episode. As robots record it, the last frame has an action too: none."""
    place = {"episode_chunk": number // CHUNKS_SIZE, "episode_index": number, "video_key": CAMERA}
    video, table = out / VIDEO_PATH.format(**place), out / DATA_PATH.format(**place)
    for path in (video, table):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_video(video, pixels, fps=FPS)
    frames = np.arange(len(pixels))
    rows = {
        "action": list(np.concatenate((actions, np.zeros_like(actions[:1]))).astype(np.float32)),
        "observation.state": list(states.astype(np.float32)),
        "timestamp": (frames / FPS).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(len(frames), number),
        "index": number * len(frames) + frames,
        "task_index": np.zeros(len(frames), dtype=np.int64),
    }
    pq.write_table(pa.table(rows), table)
    return video


def _write_lerobot_meta(out: Path, world: World, *, episodes: int, frames: int, px: int) -> None:
    columns = {"action": world.action_columns, "observation.state": world.state_columns}
    features: dict[str, Any] = {
        name: {"dtype": "float32", "shape": [len(names)], "names": list(names)} for name, names in columns.items()
    }
    features[CAMERA] = {"dtype": "video", "shape": [px, px, 3], "names": ["height", "width", "channels"]}
    features |= {name: {"dtype": kind, "shape": [1], "names": None} for name, kind in LEROBOT_INDEX.items()}
    info = {
        "codebase_version": "v2.1",
        "robot_type": world.name,
        "fps": FPS,
        "total_episodes": episodes,
        "total_frames": episodes * frames,
        "chunks_size": CHUNKS_SIZE,
        "data_path": DATA_PATH,
        "video_path": VIDEO_PATH,
        "features": features,
    }
    meta = out / "meta"
    meta.mkdir(exist_ok=True)
    (meta / "info.json").write_text(json.dumps(info, indent=4) + "\n")
    (meta / "tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": world.name}) + "\n")
    lines = [json.dumps({"episode_index": n, "tasks": [world.name], "length": frames}) for n in range(episodes)]
    (meta / "episodes.jsonl").write_text("\n".join(lines) + "\n")

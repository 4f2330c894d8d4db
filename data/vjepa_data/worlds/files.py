"""Write episodes as videos with signals, in the form that `vjepa shard` takes.

OUT/spec.yaml                       description of the signals: vjepa shard OUT --spec OUT/spec.yaml --out corpus
OUT/two_room_000000.mp4             frames
OUT/two_room_000000.action.npy      float32 [F - 1, A]
OUT/two_room_000000.state.npy       float32 [F, S]
OUT/two_room_000000.json            labels: world, policy, layout
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vjepa_data.errors import BadInput
from vjepa_data.signal_spec import SignalSpec
from vjepa_data.synthetic.physics import write_video
from vjepa_data.worlds.base import LayoutKind, World
from vjepa_data.worlds.episodes import Policy, simulate

FPS = 10
UNIT = "side"
"""Lengths are in sides of the frame."""

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
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Write a video, its signals and its labels for each episode, and the spec for `vjepa shard`.

    Args:
        world: the world.
        out: folder, created if it does not exist.
        episodes: number of episodes.
        seed: seed of the corpus. Episode n of a seed is the same in a corpus of any length.
        policy: what chooses the actions.
        layout: which layouts to draw.
        px: height and width, even.
        frames: length of an episode.
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
            path = out / f"{world.name}_{number:06d}.mp4"
            write_video(path, world.render(states, np.tile(place, (frames, 1)), px), fps=FPS)
            for name, rows in (("state", states), ("action", actions)):
                np.save(path.with_suffix(f".{name}.npy"), rows.astype(np.float32))
            labels = {"world": world.name, "policy": policy, "layout": layout}
            labels |= {name: round(float(value), 6) for name, value in zip(world.layout_columns, place, strict=True)}
            path.with_suffix(".json").write_text(json.dumps(labels) + "\n")
            paths.append(path)
            advance(len(paths), episodes)
    return paths

"""Worlds with actions: nothing passes a wall, pixels show the state, and every draw is a function of its numbers."""

import json
from pathlib import Path

import av
import numpy as np
import pytest
import yaml

from vjepa.cli import main
from vjepa_data.builder.shard import shard
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import BadInput, Clip, Crop, Data, Loader, Source
from vjepa_data.spec import Spec
from vjepa_data.worlds.base import World
from vjepa_data.worlds.episodes import WORLDS, simulate
from vjepa_data.worlds.files import write_episodes
from vjepa_data.worlds.push import PUSHER_RADIUS, Push
from vjepa_data.worlds.two_room import HALF_WALL, RADIUS, TwoRoom


def uniform(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).random(shape)


def crosses(start: np.ndarray, end: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return whether segments pass through the inside of rectangles, by clipping them against the four sides."""
    enter, leave = np.zeros(len(start)), np.ones(len(start))
    for axis in (0, 1):
        way = end[:, axis] - start[:, axis]
        with np.errstate(divide="ignore", invalid="ignore"):
            one, other = ((edge[:, axis] - start[:, axis]) / way for edge in (low, high))
        is_inside = (start[:, axis] > low[:, axis]) & (start[:, axis] < high[:, axis])
        enter = np.where(way == 0, np.where(is_inside, enter, np.inf), np.maximum(enter, np.minimum(one, other)))
        leave = np.where(way == 0, leave, np.minimum(leave, np.maximum(one, other)))
    return enter < leave - 1e-9


@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_no_path_crosses_a_wall_in_500000_steps(kind):
    world, count, steps = TwoRoom(), 5000, 100
    layouts = world.layouts(kind, uniform(0, count, 2))
    state = world.starts(layouts, uniform(1, count, 4))
    wall, door, half = layouts.T
    low, high = np.full((count, 2), -1.0), np.full((count, 2), 2.0)
    low[:, 0], high[:, 0] = wall - HALF_WALL + 1e-7, wall + HALF_WALL - 1e-7
    above, below = high.copy(), low.copy()
    above[:, 1], below[:, 1] = door - (half - RADIUS) - 1e-7, door + (half - RADIUS) + 1e-7
    rooms_changed = 0
    for step in range(steps):
        # Some actions are far outside the bounds: they are clipped.
        action = (uniform(step + 2, count, 2) - 0.5) * (0.16 if step % 2 else 3)
        path = world.path(state, action, layouts)
        for a, b in zip(path[:, :-1].swapaxes(0, 1), path[:, 1:].swapaxes(0, 1), strict=True):
            assert not crosses(a, b, low, above).any()
            assert not crosses(a, b, below, high).any()
        rooms_changed += (np.sign(path[:, -1, 0] - wall) != np.sign(state[:, 0] - wall)).sum()
        state = path[:, -1]
        assert ((state >= RADIUS) & (state <= 1 - RADIUS)).all()
    assert rooms_changed > 1000  # otherwise the door is closed and the test shows nothing


def test_a_free_disc_moves_by_its_action():
    world, layout = TwoRoom(), np.array([[0.5, 0.3, 0.125]])
    moved = world.step(np.array([[0.2, 0.5]]), np.array([[0.05, -0.07]]), layout)
    assert np.allclose(moved, [[0.25, 0.43]])


def test_a_disc_slides_along_a_wall():
    world, layout = TwoRoom(), np.array([[0.5, 0.3, 0.125]])
    moved = world.step(np.array([[0.43, 0.7]]), np.array([[0.07, 0.05]]), layout)
    assert np.allclose(moved, [[0.5 - HALF_WALL, 0.75]])


def test_discs_never_overlap_or_leave_the_box():
    world, count = Push(), 2000
    layouts = world.layouts("random", uniform(0, count, 2))
    state = world.starts(layouts, uniform(1, count, 4))
    moved = 0.0
    for step in range(100):
        goal = np.tile((0.5, 0.5, *np.eye(2)[step % 2]), (count, 1))
        action = world.expert(state, goal, layouts) + (uniform(step + 2, count, 2) - 0.5) * 0.06
        after = world.step(state, action, layouts)
        gap = np.linalg.norm(after[:, 2:] - after[:, :2], axis=1) - layouts[:, 0] - PUSHER_RADIUS
        assert gap.min() > -1e-8
        for position, radius in ((after[:, :2], PUSHER_RADIUS), (after[:, 2:], layouts)):
            assert ((position >= radius - 1e-12) & (position <= 1 - radius + 1e-12)).all()
        assert (np.linalg.norm(after[:, 2:] - state[:, 2:], axis=1) < 0.1).all()  # nothing jumps
        moved += np.abs(after[:, 2:] - state[:, 2:]).sum()
        state = after
    assert moved > 100


@pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))
def test_an_episode_depends_on_its_seed_and_number_alone(world: World):
    ask = {"policy": "mixed", "layout": "random", "seed": 3}
    long = simulate(world, episodes=range(6), frames=20, **ask)
    short = simulate(world, episodes=[4, 1], frames=9, **ask)
    for row, number in enumerate((4, 1)):
        assert np.array_equal(short.layouts[row], long.layouts[number])
        assert np.array_equal(short.states[row], long.states[number, :9])
        assert np.array_equal(short.actions[row], long.actions[number, :8])
    assert not np.array_equal(long.states[0], simulate(world, episodes=[0], frames=20, **{**ask, "seed": 4}).states[0])


@pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))
def test_held_out_layouts_are_never_drawn_as_random(world: World):
    column = 1 if world.name == "two_room" else 0
    seen, held = (np.sort(world.layouts(kind, uniform(0, 4000, 2))[:, column]) for kind in ("random", "held_out"))
    assert not np.any((held[:, None] > seen[:-1]) & (held[:, None] < seen[1:]) & (np.diff(seen) < 0.005))
    assert seen.min() < held.min() < held.max() < seen.max()  # they interpolate


@pytest.mark.parametrize(("name", "least"), [("two_room", 0.99), ("push", 0.9)])
@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_the_expert_reaches_its_goal(name: str, least: float, kind):
    world, count = WORLDS[name], 200
    layouts = world.layouts(kind, uniform(0, count, 2))
    state, goals = (world.starts(layouts, uniform(seed, count, 4)) for seed in (1, 2))
    is_reached = np.zeros(count, dtype=bool)
    for _ in range(80):
        state = world.step(state, world.expert(state, goals, layouts), layouts)
        is_reached |= world.distance(state, goals) < world.goal_distance
    assert is_reached.mean() >= least


def test_a_mixed_corpus_crosses_the_door_more_than_wandering():
    def crossings(policy) -> float:
        found = simulate(TwoRoom(), policy=policy, layout="fixed", seed=0, episodes=range(128), frames=33)
        side = np.sign(found.states[..., 0] - found.layouts[:, None, 0])
        return float((np.diff(side, axis=1) != 0).any(axis=1).mean())

    assert crossings("wander") < crossings("mixed") < crossings("expert")


@pytest.mark.parametrize("px", [48, 64, 224])
@pytest.mark.parametrize("world", WORLDS.values(), ids=list(WORLDS))
def test_pixels_show_the_state(world: World, px: int):
    found = simulate(world, policy="mixed", layout="random", seed=0, episodes=range(8), frames=4)
    states, layouts = found.states[:, -1], found.layouts
    frames = world.render(states, layouts, px).astype(float)
    red, blue = frames[..., 0] - frames[..., 2], frames[..., 2] - frames[..., 0]
    for weight, centres in ((red, states[:, :2]), (blue, states[:, 2:])):
        if not centres.size:
            continue
        weight = np.where(weight > 60, weight, 0)
        places = (np.arange(px) + 0.5) / px
        x, y = (np.einsum(f"bij,{letter}->b", weight, places) / weight.sum((1, 2)) for letter in "ji")
        assert np.abs(np.stack((x, y), axis=1) - centres).max() < 1 / px


def test_a_written_world_becomes_batches_with_its_actions(tmp_path: Path):
    """From the folder to the batch, states belong to their frames, and actions add up between them."""
    paths = write_episodes(TwoRoom(), tmp_path / "in", episodes=4, seed=0, px=48, frames=16)
    again = write_episodes(TwoRoom(), tmp_path / "again", episodes=2, seed=0, px=48, frames=16)
    for a, b in zip(again, paths, strict=False):
        assert a.read_bytes() == b.read_bytes()
        assert a.with_suffix(".action.npy").read_bytes() == b.with_suffix(".action.npy").read_bytes()
    labels = json.loads(paths[0].with_suffix(".json").read_text())
    assert labels == {"world": "two_room", "policy": "mixed", "layout": "fixed"} | {
        "wall_x": 0.5,
        "door_y": 0.3,
        "half_door": 0.125,
    }
    with av.open(str(paths[0])) as video:
        assert sum(1 for _ in video.decode(video=0)) == 16
    spec = Spec.model_validate(yaml.safe_load((tmp_path / "in" / "spec.yaml").read_text()))
    shard([str(tmp_path / "in")], tmp_path / "corpus", spec=spec, workers=1)
    data = Data(
        sources=(Source(shards=str(tmp_path / "corpus")),),
        clip=Clip(frames=4, fps=5),
        crop=Crop(px=48, scale=(1, 1), aspect=(1, 1), flip=0),
        signals=("action", "state"),
    )
    (clips,) = next(iter(ClipLoader(data, seed=0, batch_size=4, loader=Loader(workers=0)))).groups
    truth = simulate(TwoRoom(), policy="mixed", layout="fixed", seed=0, episodes=range(4), frames=16)
    read = {name: signal.values.numpy() for name, signal in clips.signals.items()}
    for row, start_s in enumerate(clips.start_s):
        first = round(start_s * 10)
        episode = int(np.abs(truth.states[:, first] - read["state"][row, 0]).sum(-1).argmin())
        assert np.allclose(read["state"][row], truth.states[episode, first : first + 7 : 2], atol=1e-6)
        pairs = truth.actions[episode, first : first + 6].reshape(3, 2, 2).sum(1)
        assert np.allclose(read["action"][row], pairs, atol=1e-6)
    assert clips.signals["action"].valid.all()


def test_bad_sizes_are_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"px \(47\) must be even"):
        write_episodes(TwoRoom(), tmp_path, episodes=1, seed=0, px=47)
    with pytest.raises(BadInput, match=r"frames \(1\) must be at least 2"):
        write_episodes(TwoRoom(), tmp_path, episodes=1, seed=0, frames=1)


def test_the_command_writes_a_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["synthesize", "push", "--out", str(tmp_path / "push"), "--videos", "2", "--px", "32", "--frames", "5"]
    assert main([*words, "--policy", "expert", "--layout", "held_out"]) == 0
    assert "vjepa shard" in capsys.readouterr().out
    assert np.load(tmp_path / "push" / "push_000001.action.npy").shape == (4, 2)


def test_physics_refuses_the_options_of_worlds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["synthesize", "--out", str(tmp_path), "--policy", "expert"]) == 2
    assert "--policy is for two_room and push" in capsys.readouterr().err

"""Labels of generated scenes match their pixels, and a video is a function of seed and number."""

import json
from pathlib import Path

import av
import numpy as np
import pytest

from vjepa_data.settings import BadInput
from vjepa_data.synthetic import violations
from vjepa_data.synthetic.maps import CLASSES, draw_maps
from vjepa_data.synthetic.physics import COLOURS, Rules, describe, draw_frames, draw_scene, write_corpus

ALONE = Rules(objects=(1, 1), pillar_share=0)


def decoded(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def painted(frames: np.ndarray, colour: str) -> np.ndarray:
    """Return a mask of the pixels that have nearly the given colour."""
    return np.abs(frames / 255 - np.array(COLOURS[colour])).max(-1) < 0.1


def middle(mask: np.ndarray) -> np.ndarray:
    """Return the centre of mass, x and y, in sides of the frame."""
    y, x = np.nonzero(mask)
    return (np.array([x.mean(), y.mean()]) + 0.5) / mask.shape[1]


def test_a_video_is_a_function_of_its_seed_and_number(tmp_path):
    long = write_corpus(tmp_path / "long", videos=3, seed=5, px=32, seconds=1)
    short = write_corpus(tmp_path / "short", videos=2, seed=5, px=32, seconds=1)
    other = write_corpus(tmp_path / "other", videos=1, seed=6, px=32, seconds=1)
    for a, b in zip(short, long, strict=False):
        assert a.read_bytes() == b.read_bytes()
        assert a.with_suffix(".json").read_bytes() == b.with_suffix(".json").read_bytes()
    assert not np.array_equal(decoded(short[0]), decoded(short[1]))
    assert not np.array_equal(decoded(short[0]), decoded(other[0]))


def test_an_object_is_where_its_track_says(tmp_path):
    for path in write_corpus(tmp_path, videos=8, seed=0, px=64, seconds=1, rules=ALONE):
        labels, frames = json.loads(path.with_suffix(".json").read_text()), decoded(path)
        (track,) = labels["tracks"]
        assert frames.shape == (12, 64, 64, 3)
        assert len(track["x"]) == 12
        for frame, x, y in zip(frames, track["x"], track["y"], strict=True):
            assert np.abs(middle(painted(frame, track["colour"])) - (x, y)).max() < 0.03


def test_each_object_has_its_own_colour_and_track():
    scene = draw_scene(3, 1, frames=24, fps=12, rules=Rules(objects=(3, 3), size=(0.1, 0.15), pillar_share=0))
    frames = draw_frames(scene, 64)
    for k, colour in enumerate(scene.colours):
        for frame, centre in zip(frames, scene.centres[:, k], strict=True):
            assert np.abs(middle(painted(frame, colour)) - centre).max() < 0.03


def test_objects_behind_the_pillar_are_not_visible():
    seen, hidden = 0, 0
    for number in range(20):
        scene = draw_scene(0, number, frames=24, fps=12, rules=Rules(pillar_share=1))
        assert scene.pillar is not None
        for frame, centres, visible in zip(draw_frames(scene, 96), scene.centres, scene.visible, strict=True):
            for (x, y), colour, is_visible, shape in zip(centres, scene.colours, visible, scene.shapes, strict=True):
                edge = min(abs(x - end) for end in scene.pillar)
                if shape == "ring" or edge < 0.02:
                    continue
                assert painted(frame, colour)[int(y * 96), int(x * 96)] == is_visible
                seen, hidden = seen + is_visible, hidden + (not is_visible)
    assert seen > 100
    assert hidden > 50


def test_speed_and_direction_match_the_first_track():
    for number in range(20):
        labels = describe(draw_scene(1, number, frames=24, fps=240, rules=Rules(gravity_share=0, objects=(1, 1))))
        track = labels["tracks"][0]
        velocity = np.array([track["x"][1] - track["x"][0], track["y"][1] - track["y"][0]]) * 240
        expected = labels["speed"] * np.array([np.cos(labels["direction"]), np.sin(labels["direction"])])
        bounced = (
            min(track["x"][0], track["y"][0], 1 - track["x"][0], 1 - track["y"][0]) < labels["tracks"][0]["size"] + 0.01
        )
        assert bounced or np.abs(velocity - expected).max() < 0.05


def test_objects_stay_in_the_box_and_do_not_overlap():
    for number in range(20):
        scene = draw_scene(2, number, frames=60, fps=12, rules=Rules(objects=(2, 2)))
        assert (scene.centres >= scene.sizes[:, None] - 0.02).all()
        assert (scene.centres <= 1 - scene.sizes[:, None] + 0.02).all()
        apart = np.hypot(*(scene.centres[:, 0] - scene.centres[:, 1]).T)
        assert (apart > scene.sizes.sum() - 0.03).all()


def test_bounces_conserve_energy_without_gravity():
    for number in range(10):
        scene = draw_scene(4, number, frames=600, fps=100, rules=Rules(gravity_share=0, objects=(2, 2)))
        speed2 = (np.diff(scene.centres, axis=0) ** 2).sum(-1) * 100**2
        energy = (speed2 * scene.sizes**2).sum(-1)
        assert np.median(abs(energy / energy[0] - 1)) < 0.02


def test_colours_come_in_pairs_around_mid_grey():
    values = np.array(list(COLOURS.values()))
    np.testing.assert_allclose(values[0::2] + values[1::2], 1)


@pytest.mark.parametrize(("videos", "px"), [(0, 64), (1, 63), (1, 8)])
def test_an_impossible_corpus_is_an_error(tmp_path, videos, px):
    with pytest.raises(BadInput, match="must be"):
        write_corpus(tmp_path / "out", videos=videos, seed=0, px=px)
    assert not (tmp_path / "out").exists()


def test_maps_agree_with_the_pixels() -> None:
    """A pixel in the colour of an object is in its map, and the plain background is in no object."""
    for number in range(12):
        scene = draw_scene(0, number, frames=6, fps=2, rules=Rules(pillar_share=0.5))
        frames, maps = draw_frames(scene, 48), draw_maps(describe(scene), range(6), 48)
        for shape, colour in zip(scene.shapes, scene.colours, strict=True):
            exact = (frames == np.rint(np.array(COLOURS[colour], np.float32) * 255)).all(-1)
            assert exact.any()
            assert (maps.objects[exact] == CLASSES.index(shape)).all()
            assert (maps.depth[exact] == 2).all()
        background = maps.objects == 0
        assert np.abs(frames[background].astype(int) - 128).mean() < 3
        assert (maps.objects == CLASSES.index("screen")).any() == (scene.pillar is not None)


def test_maps_of_films_agree_with_the_pixels() -> None:
    for number in range(7):
        scene = violations.draw_quadruplet(0, number)
        for name, frames in violations.draw_films(scene).items():
            maps = draw_maps(violations.describe(scene, name), range(48), 64)
            for half, part in zip(name, (slice(0, 24), slice(24, 48)), strict=True):
                thing = getattr(scene, half).object
                exact = (frames[part] == np.rint(np.array(COLOURS[thing.colour], np.float32) * 255)).all(-1)
                assert (maps.objects[part][exact] == CLASSES.index(thing.shape)).all()
            assert np.abs(frames[maps.objects == 0].astype(int) - 128).mean() < 2


def test_flow_moves_a_frame_onto_the_next() -> None:
    """A pixel of an object was in the object in the frame before, where its flow says."""
    for number in range(6):
        scene = draw_scene(0, number, frames=4, fps=4, rules=ALONE)
        maps = draw_maps(describe(scene), range(4), 64)
        assert np.isnan(maps.flow[0]).all()
        for frame in range(1, 4):
            y, x = np.nonzero(maps.objects[frame])
            flow = maps.flow[frame, y, x] * 64
            before = np.rint(np.stack((y, x), 1) - flow[:, ::-1]).astype(int).clip(0, 63)
            assert (maps.objects[frame - 1][before[:, 0], before[:, 1]] > 0).mean() > 0.93
            centre = scene.centres[frame, 0] - scene.centres[frame - 1, 0]
            assert np.abs(flow.mean(0) / 64 - centre).max() < 0.01

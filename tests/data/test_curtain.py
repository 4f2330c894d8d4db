"""Curtain scenes: the labels agree with the frames, and a closed curtain hides everything."""

import json
from pathlib import Path

import numpy as np
import pytest

from vjepa_data.settings import BadInput
from vjepa_data.synthetic.curtain import (
    BACKDROP,
    BRIGHT,
    GAPS_S,
    SIZE,
    describe,
    draw_acts,
    draw_frames,
    place,
    write_curtains,
)
from vjepa_data.synthetic.physics import COLOURS

FPS, PX = 6, 48


def test_each_gap_comes_first_in_every_fourth_video() -> None:
    acts = [draw_acts(0, number, seconds=48, fps=FPS)[0] for number in range(8)]
    assert [act.gap_s for act in acts] == [*GAPS_S, *GAPS_S]
    assert [act.open - act.closed for act in acts] == [round(gap * FPS) for gap in (*GAPS_S, *GAPS_S)]


@pytest.mark.parametrize("number", range(4))
def test_only_the_open_stage_shows_the_object(number: int) -> None:
    acts = draw_acts(1, number, seconds=48, fps=FPS)
    frames = draw_frames(acts, PX, fps=FPS)
    empty = draw_frames(
        [act.__class__(**{**vars(act), "colour": "white", "shape": "disc"}) for act in acts], PX, fps=FPS
    )
    labels = describe(acts, fps=FPS)
    for act, facts, track in zip(acts, labels["acts"], labels["tracks"], strict=True):
        closed = slice(act.closed, act.open + 1)
        assert (frames[closed] == empty[closed]).all()  # another object leaves no trace
        assert facts["place"] == [track["x"][act.open], track["y"][act.open]]
        for frame in (act.start, act.close, act.opened, act.end - 1):
            x, y = track["x"][frame], track["y"][frame]
            ring = SIZE * 0.72 if act.shape == "ring" else 0.0  # a ring has no colour in its middle
            seen = frames[frame, int(y * PX), min(PX - 1, int((x + ring) * PX))] / 255
            assert np.allclose(seen, COLOURS[act.colour], atol=0.02)
            assert act.colour in BRIGHT
            assert np.mean(seen) > 2 * BACKDROP
            assert track["visible"][frame] == (frame < act.close or frame >= act.opened)


def test_distractors_pass_and_are_counted() -> None:
    acts = [draw_acts(0, number, seconds=1, fps=FPS)[0] for number in range(2, 162, 4)]
    assert {len(act.distractors) for act in acts} == {0, 1, 2, 3}
    for act in acts[:6]:
        frames = draw_frames([act], PX, fps=FPS)
        changes = frames[act.closed : act.open] != frames[act.closed][None]
        assert changes.any() == bool(act.distractors)
        assert describe([act], fps=FPS)["acts"][0]["order"] == [one.shape for one in act.distractors]


def test_half_of_the_objects_go_on_behind_the_curtain() -> None:
    acts = [draw_acts(0, number, seconds=1, fps=FPS)[0] for number in range(400)]
    assert 0.4 < np.mean([act.moves for act in acts]) < 0.6
    for act in acts[:40]:
        way = place(act, np.arange(act.start, act.end, dtype=float), FPS)
        assert ((way >= SIZE - 1e-9) & (way <= 1 - SIZE + 1e-9)).all()
        assert (np.ptp(way, axis=0).max() > 0.1) == act.moves


def test_a_video_is_a_function_of_seed_and_number(tmp_path: Path) -> None:
    few = write_curtains(tmp_path / "few", videos=1, seed=3, seconds=8)
    more = write_curtains(tmp_path / "more", videos=2, seed=3, seconds=8)
    assert few[0].read_bytes() == more[0].read_bytes()
    labels = json.loads(more[1].with_suffix(".json").read_text())
    assert labels["gap_s"] == 4
    with pytest.raises(BadInput, match="must be even and at least 32"):
        write_curtains(tmp_path, videos=1, seed=0, px=31)

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vjepa_data.corpus.index import Index
from vjepa_data.reader import pipeline
from vjepa_data.reader.clip_times import EligibleSamples, Pace, can_serve, choose, offsets
from vjepa_data.settings import BadInput, Clip, Crop, Data, Source


@given(
    st.integers(1, 64), st.sampled_from([1.0, 4.0, 5.0, 7.5, 10.0]), st.sampled_from([12.0, 24.0, 25.0, 29.97, 60.0])
)
def test_each_frame_is_the_nearest_to_its_exact_time(frames: int, fps: float, file_fps: float):
    for k, i in enumerate(offsets(frames=frames, fps=fps, file_fps=file_fps)):
        error_s = abs(Fraction(int(i)) / Fraction(file_fps) - Fraction(k) / Fraction(fps))
        assert error_s <= Fraction(1, 2) / Fraction(file_fps) + Fraction(1, 10**9)


def test_fractional_steps_keep_the_speed_of_the_video():
    assert offsets(frames=5, fps=4, file_fps=30).tolist() == [0, 8, 15, 23, 30]
    assert offsets(frames=16, fps=4, file_fps=30000 / 1001)[-1] == 112  # 3.75 s, where steps of 7 frames reach 105


@given(st.integers(1, 200), st.sampled_from([8.0, 24.0, 30.0]), st.integers(1, 16), st.integers(0, 1000))
def test_a_clip_lies_inside_its_video(file_frames: int, file_fps: float, frames: int, slot: int):
    ask = {"frames": frames, "fps": 4.0}
    if can_serve(np.array([file_frames]), np.array([file_fps]), **ask)[0]:
        times = choose(file_frames=file_frames, file_fps=file_fps, **ask, seed=0, step=1, slot=slot)
        assert 0 <= times.frames[0] <= times.frames[-1] < file_frames
        assert len(times.frames) == frames
        assert times.start_s == (times.frames[0] / file_fps,)
    else:
        assert offsets(**ask, file_fps=file_fps)[-1] >= file_frames


def test_every_start_is_equally_likely():
    ask = {"file_frames": 20, "file_fps": 10.0, "frames": 4, "fps": 2.0}
    starts = Counter(choose(**ask, seed=0, step=0, slot=slot).frames[0] for slot in range(5000))
    assert sorted(starts) == [0, 1, 2, 3, 4]
    assert max(starts.values()) - min(starts.values()) < 200  # standard deviation of each: 28


@pytest.mark.parametrize(("file_fps", "good"), [(8.0, True), (29.97, True), (3.0, False), (3.999, True)])
def test_a_video_slower_than_the_rate_is_refused(file_fps: float, good: bool):
    assert can_serve(np.array([1000]), np.array([file_fps]), frames=16, fps=4)[0] == good


def test_any_video_has_a_clip_of_one_frame():
    assert can_serve(np.array([1]), np.array([1.0]), frames=1, fps=30.0)[0]


def test_ineligible_samples_are_left_out_and_counted(videos, make_corpus, tmp_path: Path):
    facts = {"fps": 12.0, "width": 96, "height": 64, "video": videos[0]}
    lengths = [48, 10, 48, 12, 13, 48]  # 4 frames at 3 fps reach 12 frames ahead, so take 13
    samples = [{"key": f"k{i}", "frames": n, **facts} for i, n in enumerate(lengths)]
    index = Index(make_corpus(tmp_path / "c", [samples[:2], samples[2:4], samples[4:]]))
    eligible = EligibleSamples(index, frames=4, pace=Pace(fps=3))
    assert eligible.left_out == 2
    assert eligible.counts.tolist() == [1, 1, 2]
    assert [eligible.members(s).tolist() for s in range(3)] == [[0], [2], [4, 5]]


def test_a_corpus_without_eligible_samples_is_refused(corpus: Path):
    """The error states the lengths and rates."""
    with pytest.raises(BadInput, match=r"none of the 26 train .* 64 frames at 4 fps \(15.75 s\); .* has 4.00 s"):
        EligibleSamples(Index(corpus), frames=64, pace=Pace(fps=4))


def test_frame_steps_durations_and_rates_set_the_pace(videos, make_corpus, tmp_path: Path):
    """`frame_step` ignores the rate of the file, and `duration_s` is spread evenly."""
    facts = {"width": 96, "height": 64, "video": videos[0], "frames": 48}
    folder = make_corpus(tmp_path / "c", [[{"key": f"k{i}", "fps": fps, **facts} for i, fps in enumerate((12.0, 6.0))]])
    ahead = {}
    for name, pace in [("step", {"frame_step": 3}), ("duration", {"duration_s": 2.0}), ("fps", {"fps": 2.0})]:
        source = Source(shards=str(folder), **pace)
        plan = pipeline.open_plan(Data(sources=(source,), clip=Clip(frames=4)), seed=0, batch_size=2)
        draws = [plan.draw(0, slot) for slot in (0, 1)]
        chosen = {d.sample: pipeline.choose(plan, Crop(), d, step=0, slot=slot).times for slot, d in enumerate(draws)}
        ahead[name] = [[f - chosen[i].frames[0] for f in chosen[i].frames] for i in (0, 1)]
    assert ahead == {
        "step": [[0, 3, 6, 9], [0, 3, 6, 9]],
        "duration": [[0, 6, 12, 18], [0, 3, 6, 9]],  # 4 frames in 2 s of videos at 12 and 6 fps
        "fps": [[0, 6, 12, 18], [0, 3, 6, 9]],
    }
    assert len({EligibleSamples(Index(folder), frames=4, pace=p).name for p in (Pace(fps=3), Pace(frame_step=3))}) == 2


def test_two_settings_of_the_rate_are_refused():
    with pytest.raises(ValidationError, match="fps and frame_step all set the frame rate of a clip; keep one"):
        Source(shards="x", fps=4, frame_step=2)

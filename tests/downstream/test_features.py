"""Evaluation clips are the same every time, and token labels are at the positions of the objects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vjepa.config import Model
from vjepa.evals.base import EvaluationContext
from vjepa.evals.features import LabelledClips, PixelEncoder, encode, read_features
from vjepa.evals.object_labels import mean_velocity, token_labels
from vjepa.nn.grid import Grid
from vjepa.weights.load import load_encoder
from vjepa.weights.weights import random_encoder
from vjepa_data.evaluation.clips import EvalClip, EvalClips, centre_view
from vjepa_data.settings import BadInput

MODEL = Model.model_validate(
    {"encoder": {"name": "custom", "width": 48, "depth": 2, "heads": 3}, "patch_px": 8, "tubelet_frames": 2}
)


def open_scenes(folder: Path, **options) -> EvalClips:
    return EvalClips(folder, **{"split": "val", "px": 32, "frames": 4, "fps": 8.0, "per_video": 3, **options})


def test_clips_are_evenly_spaced_and_come_out_the_same_twice(scenes: Path) -> None:
    clips = open_scenes(scenes)
    first, second = list(clips), list(clips)
    assert len(first) == len(clips) == 24 * 3
    assert [clip.numbers for clip in first[:3]] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)]
    assert all(torch.equal(one.frames, other.frames) for one, other in zip(first, second, strict=True))
    assert next(iter(open_scenes(scenes, per_video=1, frames=3, fps=4.0))).numbers == (3, 5, 7)
    assert open_scenes(scenes, max_videos=5).chosen == open_scenes(scenes, max_videos=5).chosen
    assert open_scenes(scenes, max_videos=5).videos == 5


def test_the_whole_frame_is_seen(scenes: Path) -> None:
    clip = next(iter(open_scenes(scenes, px=64)))
    track = clip.labels["tracks"][0]
    x, y = round(track["x"][0] * 64), round(track["y"][0] * 64)
    ground = clip.frames[0, 2, 2].float()
    assert (ground - 60).abs().max() < 12
    assert (clip.frames[0, y, x].float() - ground).abs().max() > 40


def test_a_damaged_sample_is_left_out_and_counted(scenes: Path, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(scenes, tmp_path / "copy")
    clips = open_scenes(folder)
    at = int(clips.index.video_offset[2]) + 200
    path = next((folder / "shards").glob("*-val-*.tar"))
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)
    assert len(list(clips)) == 23 * 3
    assert clips.skipped == 3


def test_too_short_videos_are_refused(scenes: Path) -> None:
    with pytest.raises(BadInput, match="none of the 24 videos of split 'val' has 64 frames"):
        open_scenes(scenes, frames=64)
    with pytest.raises(BadInput, match="has no split 'test'"):
        open_scenes(scenes, split="test")


def make_clip(tracks: list[dict], frames: int = 4) -> EvalClip:
    numbers = tuple(range(frames))
    return EvalClip("k", 0, torch.zeros(frames, 32, 32, 3, dtype=torch.uint8), numbers, 8.0, {"tracks": tracks})


def still(shape: str, x: float, y: float, size: float, frames: int = 4, **more) -> dict:
    track = {"shape": shape, "size": size, "x": [x] * frames, "y": [y] * frames, "visible": [True] * frames}
    return {**track, **more}


def test_tokens_belong_to_the_nearest_object_in_its_own_size() -> None:
    # A grid of 4 x 4: token centres at 1/8, 3/8, 5/8, 7/8.
    clip = make_clip([still("disc", 0.375, 0.125, 0.1), still("ring", 0.8, 0.8, 0.3)])
    labels = token_labels(clip, Grid(2, 4, 4), MODEL, clip_number=5)
    first = labels.token < 16
    assert labels.token[first].tolist() == [1, 10, 11, 14, 15]
    assert labels.shape[first].tolist() == ["disc", "ring", "ring", "ring", "ring"]
    assert set(labels.clip.tolist()) == {5}
    np.testing.assert_allclose(labels.centre[first][0], [0, 0], atol=1e-12)
    np.testing.assert_allclose(labels.centre[first][1], [0.8 - 0.625, 0.8 - 0.625])
    assert np.array_equal(labels.token[first] + 16, labels.token[~first])


def test_velocity_and_direction_are_those_of_the_tracks() -> None:
    # To the right 0.01 a frame at 8 frames per second, then down.
    moving = {**still("disc", 0, 0, 0.2), "x": [0.30, 0.31, 0.32, 0.32], "y": [0.4, 0.4, 0.4, 0.41]}
    labels = token_labels(make_clip([moving]), Grid(2, 4, 4), MODEL, clip_number=0)
    early = labels.token < 16
    np.testing.assert_allclose(labels.velocity[early], [[0.08, 0]] * early.sum(), atol=1e-9)
    np.testing.assert_allclose(labels.velocity[~early], [[0, 0.08]] * (~early).sum(), atol=1e-9)
    assert set(labels.direction[early].tolist()) == {0}
    assert set(labels.direction[~early].tolist()) == {2}


def test_the_velocity_of_a_clip_is_that_of_its_objects() -> None:
    # 0.03 to the right in three frames at 8 a second, and an object that falls 0.06.
    one = {**still("disc", 0, 0, 0.2), "x": [0.30, 0.33, 0.34, 0.33], "y": [0.4] * 4}
    other = {**still("ring", 0.7, 0, 0.2), "y": [0.40, 0.42, 0.44, 0.46]}
    np.testing.assert_allclose(mean_velocity(make_clip([one, other])), [0.04, 0.08], atol=1e-9)
    hidden = {**other, "visible": [True, False, True, True]}
    for unknown in (make_clip([one, hidden]), make_clip([]), make_clip([one], frames=1)):
        assert np.isnan(mean_velocity(unknown)).all()


def test_an_object_hidden_in_a_tubelet_labels_nothing_there() -> None:
    clip = make_clip([still("disc", 0.5, 0.5, 0.3, visible=[True, True, True, False])])
    labels = token_labels(clip, Grid(2, 4, 4), MODEL, clip_number=0)
    assert len(labels.token) > 0
    assert labels.token.max() < 16
    assert len(token_labels(make_clip([]), Grid(2, 4, 4), MODEL, clip_number=0).token) == 0


def test_features_of_labelled_tokens_are_at_their_positions(
    scenes: Path, trained: Path, context: EvaluationContext
) -> None:
    encoder = load_encoder(trained)
    clips = open_scenes(scenes, max_videos=3)
    encoders = {"encoder": encoder, "pixels": PixelEncoder(encoder)}
    read = read_features(encoders, scenes, clips, context)
    in_order = list(clips)
    row = len(read.labels.clip) // 2
    clip, token = in_order[read.labels.clip[row]], int(read.labels.token[row])
    t, y, x = token // 16, token // 4 % 4, token % 4
    expected = encoder(clip.frames[None])[0, t, y, x]
    torch.testing.assert_close(read.features["encoder"].tokens[row], expected)
    pixels = clip.frames[t * 2 : t * 2 + 2, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8].float() / 255
    assert torch.equal(read.features["pixels"].tokens[row], pixels.flatten())
    assert read.features["encoder"].pooled.shape == (9, 2 * 48)
    assert json.dumps(dict(read.scalars[0]))
    assert "tracks" not in read.scalars[0]


def test_cached_features_depend_on_everything_that_decides_them(
    scenes: Path, trained: Path, context: EvaluationContext
) -> None:
    encoder = load_encoder(trained)
    for number, (clips, options) in enumerate(
        [
            (open_scenes(scenes, max_videos=3), {}),
            (open_scenes(scenes, max_videos=2), {}),
            (open_scenes(scenes, max_videos=2, per_video=1), {}),
            (open_scenes(scenes, max_videos=2, per_video=1), {"pooling": "clip"}),
            (open_scenes(scenes, max_videos=2, per_video=1, split="train"), {"pooling": "clip"}),
        ]
    ):
        for _ in range(2):
            read_features({"encoder": encoder}, scenes, clips, context, **options)
            assert len(list(context.cache.iterdir())) == number + 1
    read_features({"encoder": random_encoder(encoder, 0)}, scenes, open_scenes(scenes, max_videos=2), context)
    assert len(list(context.cache.iterdir())) == 6


def test_saved_clips_load_equal(scenes: Path, trained: Path, context: EvaluationContext, tmp_path: Path) -> None:
    encoder = load_encoder(trained)
    read = read_features({"encoder": encoder}, scenes, open_scenes(scenes, max_videos=2), context)
    read.save(tmp_path / "read.npz")
    again = LabelledClips.load(tmp_path / "read.npz")
    assert (again.keys, again.scalars) == (read.keys, read.scalars)
    assert torch.equal(again.features["encoder"].pooled, read.features["encoder"].pooled)
    assert np.array_equal(again.labels.shape, read.labels.shape)
    LabelledClips.join([]).save(tmp_path / "none.npz")
    assert LabelledClips.join([LabelledClips.load(tmp_path / "none.npz"), again]).keys == read.keys


def test_pixels_are_pooled_to_one_pixel_per_token(trained: Path) -> None:
    pixels = PixelEncoder(load_encoder(trained))
    frames = torch.zeros(1, 4, 32, 32, 3, dtype=torch.uint8)
    frames[0, 1, :8, :8] = 255
    pooled = encode(pixels, frames, "clip").pooled.view(4, 3, 4, 4)
    assert pooled.sum() == 3
    assert (pooled[1, :, 0, 0] == 1).all()


def test_random_encoders_differ_by_seed_and_repeat(trained: Path) -> None:
    encoder = load_encoder(trained)
    frames = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    one, again, other = (random_encoder(encoder, seed)(frames) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert (one - other).abs().max() > 0.1
    assert (one - encoder(frames)).abs().max() > 0.1


def test_the_centre_view_is_hugging_faces(trained: Path) -> None:
    frames = torch.randint(0, 256, (2, 90, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert centre_view(frames, 32).shape == (2, 32, 32, 3)
    flat = torch.full((1, 50, 70, 3), 77, dtype=torch.uint8)
    assert (centre_view(flat, 32) == 77).all()

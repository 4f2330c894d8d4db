"""All decoders return the requested frames and reject damaged or unexpected videos."""

import io
from typing import get_args

import av
import numpy as np
import pytest
from PIL import Image

from vjepa_data.decoding.backends import BACKENDS, Expect, decode
from vjepa_data.errors import Unreadable

EXPECT = Expect(frames=48, width=96, height=64)
FRAMES = [0, 5, 11, 12, 23, 40, 47]


@pytest.fixture(params=["decord", "pyav", "torchcodec"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "torchcodec":
        pytest.importorskip("torchcodec")
    return request.param


def test_the_requested_frames_are_returned(videos: list[bytes], read_number, backend: str):
    rng = np.random.default_rng(0)
    for video in videos[:2]:
        for _ in range(20):
            wanted = np.sort(rng.choice(48, size=6, replace=False)).tolist()
            got = decode(video, wanted, backend=backend, expect=EXPECT)
            assert [read_number(f) for f in got] == wanted


def test_all_decoders_return_the_same_pixels(videos: list[bytes], backend: str):
    for video in videos:
        want = decode(video, FRAMES, backend="decord", expect=EXPECT)
        assert np.array_equal(decode(video, FRAMES, backend=backend, expect=EXPECT), want)


def test_a_frame_may_be_requested_twice(videos: list[bytes], read_number, backend: str):
    got = decode(videos[0], [3, 3, 9, 47, 47], backend=backend, expect=EXPECT)
    assert [read_number(f) for f in got] == [3, 3, 9, 47, 47]


def test_a_video_unlike_its_index_entry_is_rejected(videos: list[bytes], backend: str):
    for wrong in (Expect(47, 96, 64), Expect(49, 96, 64), Expect(48, 64, 96)):
        with pytest.raises(Unreadable) as e:
            decode(videos[0], [0, 1], backend=backend, expect=wrong)
        assert e.value.reason == "frames"


@pytest.mark.parametrize("damage", ["empty", "html", "no moov", "half", "noise"])
def test_damaged_bytes_are_rejected(videos: list[bytes], backend: str, damage: str):
    video = videos[0]
    noise = np.random.default_rng(0).bytes(len(video) // 2)
    bad = {
        "empty": b"",
        "html": b"<html><body>503 Slow Down</body></html>" * 30,
        "no moov": video.replace(b"moov", b"xxxx", 1),
        "half": video[: len(video) // 2],
        "noise": video[: len(video) // 2] + noise,
    }[damage]
    with pytest.raises(Unreadable):
        decode(bad, list(range(48)), backend=backend, expect=EXPECT)


@pytest.mark.parametrize("frames", [[-1, 2], [47, 48], []])
def test_frames_outside_the_video_are_rejected(videos: list[bytes], frames: list[int]):
    with pytest.raises(Unreadable, match="of a video of 48 frames"):
        decode(videos[0], frames, backend="decord", expect=EXPECT)


def test_a_picture_is_a_video_of_one_frame():
    picture = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    got = decode(out.getvalue(), [0], backend="image", expect=Expect(1, 96, 64))
    assert np.array_equal(got[0], picture)
    with pytest.raises(Unreadable, match="pillow"):
        decode(out.getvalue()[:100], [0], backend="image", expect=Expect(1, 96, 64))


def test_every_backend_of_the_settings_exists():
    from vjepa_data.settings import Loader

    names = get_args(Loader.model_fields["decoder"].annotation)
    assert names
    assert set(names) - {"auto"} <= set(BACKENDS)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "libvpx-vp9", "libsvtav1"])
def test_pyav_seeks_to_the_same_frames_as_full_decoding(codec: str):
    """This includes codecs whose packets contain frames of several times."""
    file, noise = io.BytesIO(), np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=12, options={"g": "12"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(24):
            picture = np.roll(noise, 3 * number, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(io.BytesIO(file.getvalue()), "r") as whole:
        every = [frame.to_ndarray(format="rgb24") for frame in whole.decode(video=0)]
    for first in range(21):
        frames = [first, first + 1, first + 3]
        some = decode(file.getvalue(), frames, backend="pyav", expect=Expect(24, 96, 64))
        assert np.array_equal(some, [every[frame] for frame in frames])

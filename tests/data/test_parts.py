"""Virtual parts: one stored video, drawn and read in parts, against the same video cut into clips."""

import itertools
import math
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from object_store import ObjectStore

from vjepa_data.builder import shard
from vjepa_data.builder.verify import verify
from vjepa_data.corpus import index as index_module
from vjepa_data.corpus import sample_table
from vjepa_data.corpus.cache import Cache
from vjepa_data.corpus.format import read_manifest
from vjepa_data.corpus.index import Index
from vjepa_data.corpus.parts import parts_of
from vjepa_data.decoding.backends import Expect, decode
from vjepa_data.errors import BadInput, Unreadable
from vjepa_data.evaluation.clips import EvalClips
from vjepa_data.evaluation.frame_stream import CorpusFrames
from vjepa_data.media.gop_table import gop_table
from vjepa_data.media.video import Refused
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.reader.show import stream
from vjepa_data.settings import Clip, Crop, Data, Loader, Source
from vjepa_data.signal_spec import SignalSpec
from vjepa_data.spec import Cut, Encode, Spec

FRAMES, FPS, GOP = 240, 12, 12
STATE = SignalSpec(columns=("n",), units=("1",), kind="state")


def build(films: Path, out: Path, cut: Cut, **more) -> Path:
    encode = Encode(short_side_px=64, preset="ultrafast", crf=18)
    shard([str(films)], out, spec=Spec(encode=encode, cut=cut, signals={"number": STATE}, **more), workers=1)
    return out


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory, make_video) -> Path:
    """Two videos whose frames say their number, of 20 s and of 9.5 s, with their numbers as a signal."""
    folder = tmp_path_factory.mktemp("long") / "films"
    folder.mkdir()
    for look, frames in enumerate((FRAMES, 114)):
        (folder / f"{look}.mp4").write_bytes(make_video(frames=frames, fps=FPS, look=look))
        np.save(folder / f"{look}.number.npy", np.arange(frames, dtype=np.float32)[:, None])
        (folder / f"{look}.json").write_text(f'{{"look": {look}}}')
    return folder


@pytest.fixture(scope="module")
def whole(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of the two videos with virtual parts of 4 s."""
    return build(films, tmp_path_factory.mktemp("whole") / "corpus", Cut(part_s=4.0))


def settings(folder: Path, *, frames: int = 4, **more) -> Data:
    source = Source(shards=str(folder), part_s=more.pop("part_s", None))
    clip = Clip(frames=frames, fps=more.pop("fps", 6), **more)
    return Data(
        sources=(source,), clip=clip, crop=Crop(px=96, scale=(1, 1), aspect=(1.5, 1.5), flip=0.0), signals=("number",)
    )


def batches(data: Data, steps: int, *, start: int = 0, workers: int = 0):
    with ClipLoader(data, Loader(workers=workers), seed=5, batch_size=4, step=start) as loader:
        return list(itertools.islice(loader, steps))


@pytest.mark.parametrize(
    ("frames", "fps", "part_s", "lengths"),
    [
        (240, 12.0, 4.0, [48] * 5),
        (250, 12.0, 4.0, [48, 48, 48, 48, 58]),  # a rest below half a part belongs to the last
        (220, 12.0, 4.0, [48, 48, 48, 48, 28]),
        (100, 12.0, 0.01, [12] * 7 + [16]),  # never below a GOP
        (30, 12.0, 1e9, [30]),
        (5, 30.0, 10.0, [5]),
        (301, 30000 / 1001, 5.0, [144, 157]),
    ],
)
def test_parts_are_whole_gops_and_cover_a_video(frames: int, fps: float, part_s: float, lengths: list[int]):
    video, first = parts_of(np.array([7, frames]), np.array([fps, fps]), part_s=part_s, gop=GOP)
    assert first[video == 0].tolist() == [0]
    assert np.diff([*first[video == 1], frames]).tolist() == lengths
    assert not (first % GOP).any()


@pytest.mark.parametrize("decoder", ["decord", "pyav"])
@pytest.mark.parametrize("part_s", [None, 1.0, 7.5, 1e6])
def test_a_part_has_the_pixels_of_its_video(whole: Path, decoder: str, part_s: float | None, read_number):
    index = Index(whole, part_s=part_s)
    table = pq.read_table(whole / "samples.parquet").to_pylist()
    tar = (whole / read_manifest(whole).shards[0].file).read_bytes()
    videos = {row["key"]: tar[row["video_offset"] :][: row["video_size"]] for row in table}
    frames = {row["key"]: row["frames"] for row in table}
    for sample in range(len(index)):
        length, first, key = int(index.frames[sample]), index.first_frame(sample), index.video_key(sample)
        numbers = sorted({0, 1, length // 2, length - 1})
        own = decode(index.read(sample).video, numbers, backend=decoder, expect=Expect(length, 96, 64))
        same = decode(videos[key], [first + n for n in numbers], backend=decoder, expect=Expect(frames[key], 96, 64))
        assert np.array_equal(own, same)
        assert [read_number(frame) for frame in own] == [first + n for n in numbers]


def test_only_the_bytes_of_a_part_are_read(whole: Path, monkeypatch: pytest.MonkeyPatch):
    index, read = Index(whole, part_s=1.0), []

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        read.append(size)
        return actual(descriptor, size, offset)

    actual = index_module._pread
    monkeypatch.setattr(index_module, "_pread", pread)
    sample = max(range(len(index)), key=index.first_frame)
    video = index.read(sample).video
    assert sum(read) < len(video) + int(index.json_size[sample]) + 4096
    assert len(video) < int(index.video_size[sample]) / 10


def test_only_the_bytes_of_a_part_are_fetched(
    store: ObjectStore, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store.take(whole)
    monkeypatch.setattr(Cache, "want", lambda *_: None)
    remote, local = Index(f"{store.url}/{whole.name}", cache=Cache(tmp_path, 1), part_s=1.0), Index(whole, part_s=1.0)
    before = store.bytes_sent
    assert remote.read(3) == local.read(3)
    assert store.bytes_sent - before < len(local.read(3).video) + int(local.json_size[3]) + 4096


def test_clips_lie_inside_their_parts(whole: Path, read_number):
    index, seen = Index(whole), set()
    for batch in batches(settings(whole), 12):
        (clips,) = batch.groups
        for row, (key, start_s) in enumerate(zip(clips.keys, clips.start_s, strict=True)):
            sample = int(index.find([key])[0])
            first, length = index.first_frame(sample), int(index.frames[sample])
            numbers = [read_number(frame.numpy()) for frame in clips.frames[row]]
            assert numbers == [round(start_s * FPS) + 2 * k for k in range(4)]
            assert first <= numbers[0]
            assert numbers[-1] < first + length
            assert clips.signals["number"].values[row, :, 0].tolist() == numbers
            assert clips.signals["number"].valid[row].all()
            seen.add(key)
    assert len(seen) == len(index)  # 48 draws of 7 parts


def test_every_part_is_drawn_once_an_epoch(whole: Path):
    keys = [key for batch in batches(settings(whole), 7) for key in batch.groups[0].keys]
    assert sorted(keys) == sorted(4 * [Index(whole).key(i) for i in range(7)])


def test_a_resumed_loader_draws_the_same_parts(whole: Path):
    through, after = batches(settings(whole), 4)[3], batches(settings(whole), 1, start=3)[0]
    assert through.groups[0].keys == after.groups[0].keys
    assert torch.equal(through.groups[0].frames, after.groups[0].frames)


def test_a_run_may_ask_for_longer_parts(whole: Path, read_number):
    sequence = {"sequence": 3, "sequence_gap_s": 4.0, "part_s": 20.0}
    (batch,) = batches(settings(whole, **sequence), 1)
    frames = batch.groups[0].frames.unflatten(0, (-1, 3))[:, :, 0]
    numbers = [[read_number(frame.numpy()) for frame in clips] for clips in frames]
    assert all(np.diff(row).tolist() == [56, 56] for row in numbers)
    with pytest.raises(BadInput, match="longest has 5\\.50 s"):
        batches(settings(whole, sequence=3, sequence_gap_s=4.0), 1)


def test_parts_of_another_length_are_another_plan(whole: Path):
    own, other = (stream(settings(whole, part_s=s), seed=0, batch_size=4) for s in (4.0, 8.0))
    assert own.splitlines()[0] != other.splitlines()[0]
    assert own == stream(settings(whole), seed=0, batch_size=4)


def test_show_gives_times_and_frames_of_the_video(whole: Path):
    text = stream(settings(whole), seed=5, batch_size=4, slots=4)
    clips = batches(settings(whole), 1)[0].groups[0]
    assert all(f"from {start_s:.3f} s, frames {round(start_s * FPS)} " in text for start_s in clips.start_s)


def test_labels_and_exclusions_count_for_all_parts_of_a_video(whole: Path, tmp_path: Path):
    index = Index(whole)
    of_first = [i for i in range(len(index)) if index.read_labels(i) == {"look": 0}]
    assert len(of_first) == 5
    key = index.video_key(of_first[0])
    assert index.find([key]).tolist() == of_first
    assert index.find([index.key(of_first[2])]).tolist() == of_first[2:3]


def test_streams_join_the_parts_of_a_video(whole: Path, read_number):
    reader = CorpusFrames(whole, split="train", px=96, fps=6)
    assert len(reader.keys) == len(set(reader.keys)) == 2
    lengths = []
    for video in range(2):
        chunks = list(reader.frames(video, skip=3))
        assert [len(chunk) for chunk in chunks[:-1]] == [16] * (len(chunks) - 1)
        numbers = [read_number(frame.numpy()) for chunk in chunks for frame in chunk]
        assert numbers == list(range(6, 6 + 2 * len(numbers), 2))
        lengths.append(len(numbers))
    assert sorted(lengths) == [54, 117]


def test_clips_of_evaluations_count_frames_of_the_video(whole: Path, read_number):
    clips = list(EvalClips(whole, split="train", px=96, frames=4, fps=6))
    assert len({clip.key for clip in clips}) == 7
    assert all([read_number(frame.numpy()) for frame in clip.frames] == list(clip.numbers) for clip in clips)
    assert max(clip.start_s for clip in clips) > 16


def test_a_damaged_part_costs_itself(whole: Path, tmp_path: Path):
    index, copy = Index(whole), tmp_path / "copy"
    file = read_manifest(whole).shards[0].file
    (copy / "shards").mkdir(parents=True)
    for name in ("manifest.json", "samples.parquet"):
        (copy / name).write_bytes((whole / name).read_bytes())
    sample = next(i for i in range(len(index)) if index.first_frame(i) == 96)
    data = bytearray((whole / file).read_bytes())
    at = data.index(index.read(sample).video[-4000:-3900])
    data[at] ^= 1
    (copy / file).write_bytes(data)
    damaged = Index(copy)
    for number in range(len(damaged)):
        if number == sample:
            with pytest.raises(Unreadable, match="other bytes than were stored"):
                damaged.read(number)
        else:
            assert damaged.read(number) == index.read(number)
    assert any("xxh64" in problem for problem in verify(copy).problems)


def test_the_table_of_gops_is_part_of_what_is_verified(whole: Path):
    assert verify(whole, deep=True).problems == ()
    assert verify(whole).samples == 2
    with tarfile.open(whole / read_manifest(whole).shards[0].file) as tar:
        assert [name.partition(".")[2] for name in tar.getnames()] == ["json", "mp4", "gops.bin", "number.npy"] * 2


def test_a_corpus_without_parts_is_read_whole(corpus: Path):
    assert "part_s" not in Spec().model_dump(mode="json")["cut"]
    index = Index(corpus)
    assert (index.first_frame(1), index.start_s(1), index.video_key(1)) == (0, 0.0, index.key(1))
    with pytest.raises(BadInput, match=r"built without cut\.part_s.*remove data\.sources\[\]\.part_s"):
        Index(corpus, part_s=2.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cut": {"kind": "fixed", "part_s": 4}}, "kind is fixed; set kind=none"),
        ({"cut": {"part_s": 4}, "media": "images"}, "media is images; remove cut.part_s"),
        ({"cut": {"part_s": 0}}, "greater than 0"),
    ],
)
def test_parts_that_make_no_sense_are_refused(change: dict, reason: str):
    with pytest.raises(ValueError, match=reason):
        Spec.model_validate(change)


def test_files_with_uneven_gops_are_encoded_not_copied(films: Path, tmp_path: Path, make_video):
    video = make_video(frames=48)
    assert len(gop_table(video, gop=GOP)) == 4 * (16 + 5 * GOP)
    with pytest.raises(Refused, match="not every GOP has 48 frames"):
        gop_table(video, gop=48)


def test_large_tables_of_parts_are_mapped(whole: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    expected = {s: [Index(whole, part_s=s).key(i) for i in range(len(Index(whole, part_s=s)))] for s in (1.0, 4.0)}
    monkeypatch.setattr(sample_table, "MAPPED_FROM", 3)
    for part_s, keys in expected.items():
        for _ in range(2):
            index = Index(whole, part_s=part_s)
            assert [index.key(i) for i in range(len(index))] == keys
    names = {path.name.partition("-")[2] for path in (whole / ".index").iterdir()}
    assert names == {"train.arrow", "train-1.0s.arrow"}
    assert math.isclose(Index(whole, part_s=1.0).start_s(1), 1.0)

"""Signals and texts: cut by the clip times, exact in any world, refused with a reason."""

import hashlib
import itertools
import json
import re
import shutil
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from vjepa_data.builder import shard
from vjepa_data.builder.index_foreign import index_shards
from vjepa_data.builder.signals import read_rows
from vjepa_data.builder.verify import verify
from vjepa_data.corpus import signal_statistics
from vjepa_data.corpus.format import Manifest
from vjepa_data.corpus.index import Index
from vjepa_data.errors import BadInput, Unreadable
from vjepa_data.media.video import Refused
from vjepa_data.reader import show
from vjepa_data.reader import signals as module
from vjepa_data.reader.batch import Batch, Signal
from vjepa_data.reader.clip_times import choose
from vjepa_data.reader.loader import ClipLoader, open_plan
from vjepa_data.reader.signals import combine_actions, sample_states
from vjepa_data.reader.signals import read_rows as read_member
from vjepa_data.settings import Clip, Crop, Data, Loader, Source
from vjepa_data.signal_spec import SignalSpec
from vjepa_data.spec import Cut, Encode, Spec

FPS_PAIRS = [(30.0, 4.0), (30000 / 1001, 4.0), (30.0, 5.0), (10.0, 10.0), (50.0, 5.0), (25.0, 4.0)]

# Row i of "number" is i, and the frames show their own number. "move" has one unit per frame.
STATE = SignalSpec(columns=("number",), units=("1",), kind="state", flip=(1,))
MOVE = SignalSpec(columns=("unit", "side"), units=("1", "m"), kind="action", combine="sum", flip=(1, -1))


def times_of(file_fps: float, fps: float, *, frames: int = 8, slot: int = 0, file_frames: int = 300) -> np.ndarray:
    """Draw the frame times of a clip."""
    ask = {"file_frames": file_frames, "file_fps": file_fps, "frames": frames, "fps": fps}
    return choose(**ask, seed=0, step=0, slot=slot).times_s[0]


# Pure functions


@given(st.sampled_from(FPS_PAIRS), st.integers(0, 1000), st.integers(2, 16))
def test_sums_count_every_source_frame_once(fps_pair: tuple[float, float], slot: int, frames: int):
    """A row of 1 per source frame: the sum between two frames is the number of frames between them."""
    file_fps, fps = fps_pair
    times = times_of(file_fps, fps, frames=frames, slot=slot)
    numbers = np.round(times * file_fps)
    rows = np.ones((300, 1), dtype=np.float32)
    values, valid = combine_actions(rows, times, rate_hz=file_fps, start_s=0.0, combine="sum")
    assert values[:, 0].tolist() == np.diff(numbers).tolist()
    assert valid.all()


@given(st.sampled_from(FPS_PAIRS), st.floats(0.5, 200), st.floats(-0.02, 0.02), st.integers(0, 10_000))
def test_sums_over_intervals_add_up_to_the_whole(
    fps_pair: tuple[float, float], rate_hz: float, start_s: float, seed: int
):
    """Also for rows at any rate and phase, of which an interval holds fractions."""
    times = times_of(*fps_pair, slot=seed)
    rows = np.random.default_rng(seed).normal(size=(int(rate_hz * 12) + 2, 3)).astype(np.float32)
    clock = {"rate_hz": rate_hz, "start_s": start_s, "combine": "sum"}
    parts, _ = combine_actions(rows, times, **clock)
    total, _ = combine_actions(rows, times[[0, -1]], **clock)
    assert np.allclose(parts.sum(axis=0), total[0], atol=1e-3)


@given(st.sampled_from(FPS_PAIRS), st.integers(0, 1000), st.sampled_from(["sum", "mean", "last"]), st.data())
def test_a_changed_row_changes_only_its_own_interval(fps_pair, slot: int, combine: str, data):
    times = times_of(*fps_pair, slot=slot)
    rate = fps_pair[0]
    changed = data.draw(st.integers(0, 299))
    rows = np.random.default_rng(slot).normal(size=(300, 2)).astype(np.float32)
    other = rows.copy()
    other[changed] += 1000
    clock = {"rate_hz": rate, "start_s": 0.0, "combine": combine}
    (before, _), (after, _) = combine_actions(rows, times, **clock), combine_actions(other, times, **clock)
    numbers = np.round(times * rate)
    for k in np.flatnonzero((before != after).any(axis=1)):
        assert numbers[k] <= changed < numbers[k + 1]


@given(st.sampled_from(FPS_PAIRS), st.integers(0, 1000))
def test_a_state_is_the_row_of_its_frame(fps_pair: tuple[float, float], slot: int):
    times = times_of(*fps_pair, slot=slot)
    rows = np.arange(300, dtype=np.float32)[:, None]
    values, valid = sample_states(rows, times, rate_hz=fps_pair[0], start_s=0.0)
    assert values[:, 0].tolist() == np.round(times * fps_pair[0]).tolist()
    assert valid.all()


def test_a_retimed_video_keeps_its_actions():
    """Rows at 60 Hz, video stored at 30 fps, sampled at 5 fps: 12 rows per interval."""
    rows = np.arange(240, dtype=np.float32)[:, None]
    times = np.arange(4) / 5
    values, _ = combine_actions(rows, times, rate_hz=60, start_s=0.0, combine="stack", stack=12)
    assert values.shape == (3, 12, 1)
    assert values.reshape(-1).tolist() == list(range(36))
    assert combine_actions(rows, times, rate_hz=60, start_s=0.0, combine="last")[0][:, 0].tolist() == [11, 23, 35]
    assert combine_actions(rows, times, rate_hz=60, start_s=0.0, combine="mean")[0][:, 0].tolist() == [5.5, 17.5, 29.5]


def test_rows_slower_than_the_clip_are_divided():
    rows = np.array([[4.0], [8.0]], dtype=np.float32)
    times = np.arange(5) / 4  # rows at 2 Hz, so an interval is half a row
    assert combine_actions(rows, times, rate_hz=2, start_s=0, combine="sum")[0][:, 0].tolist() == [2, 2, 4, 4]
    assert combine_actions(rows, times, rate_hz=2, start_s=0, combine="mean")[0][:, 0].tolist() == [4, 4, 8, 8]


def test_held_frames_have_zero_actions_and_are_not_valid():
    rows = np.ones((4, 1), dtype=np.float32)
    times = np.array([0, 0.1, 0.3, 0.3, 0.3])
    for combine in ("sum", "mean", "last", "stack"):
        values, valid = combine_actions(rows, times, rate_hz=10, start_s=0.0, combine=combine, stack=1)
        assert valid.tolist() == [True, True, False, False]
        assert not values[2:].any()
    assert sample_states(rows, times, rate_hz=10, start_s=0.0)[1].tolist() == [True, True, True, False, False]


def test_a_shift_moves_rows_against_frames():
    """`shift_rows: -1`: row t is the action that led to frame t, so interval k holds row k + 1."""
    spec = MOVE.model_copy(update={"shift_rows": -1})
    rows, times = np.arange(5, dtype=np.float32)[:, None], np.arange(5) / 10
    clock = {"rate_hz": 10, "start_s": spec.first_row_s(10), "combine": "sum"}
    assert combine_actions(rows, times, **clock)[0][:, 0].tolist() == [1, 2, 3, 4]
    late = {**clock, "start_s": MOVE.model_copy(update={"shift_s": 0.1}).first_row_s(10)}
    values, valid = combine_actions(rows, times, **late)
    assert values[:, 0].tolist() == [0, 0, 1, 2]
    assert valid.tolist() == [False, True, True, True]


@given(st.integers(1, 5), st.integers(1, 50), st.sampled_from([10.0, 30.0, 30000 / 1001]))
def test_parts_of_a_source_share_no_row(episodes: int, length: int, rate_hz: float):
    """Several episodes share a file. Their parts are disjoint and complete."""
    rows = episodes * length
    for spec in (STATE, MOVE):
        spans = [
            spec.span(e * length / rate_hz, (e + 1) * length / rate_hz, rate_hz=rate_hz, rows=rows)
            for e in range(episodes)
        ]
        assert [i for span in spans for i in span] == list(range(rows))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"units": ()}, "units has 0 entries for 2 columns"),
        ({"flip": (1,)}, "flip has 1 entries for 2 columns"),
        ({"combine": None}, "combine is missing for a signal of kind action"),
        ({"kind": "state"}, "combine is sum for a signal of kind state"),
    ],
)
def test_inconsistent_descriptions_are_refused(change: dict, error: str):
    with pytest.raises(ValidationError, match=error):
        SignalSpec(**{**MOVE.model_dump(), **change})


# From files to batches


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory, make_video: Callable[..., bytes]) -> Path:
    """Five videos that show their frame numbers, at 12, 60 and 29.97 fps, with sidecars."""
    folder = tmp_path_factory.mktemp("signals") / "films"  # whose name is a part of the keys
    folder.mkdir()
    for i, fps in enumerate([Fraction(12), Fraction(12), Fraction(60), Fraction(30000, 1001), Fraction(12)]):
        frames = int(fps * 4)
        (folder / f"f{i}.mp4").write_bytes(make_video(frames=frames, fps=fps, look=40 * i))
        np.save(folder / f"f{i}.number.npy", np.arange(frames)[:, None])
        lines = [f"0,{n + 1},1" for n in range(frames - 1)]  # no action follows the last frame
        (folder / f"f{i}.move.csv").write_text("\n".join(["other,side,unit", *lines]))
        (folder / f"f{i}.caption.txt").write_text(f"film {i}, é")
    return folder


def build(films: Path, out: Path, **more) -> Manifest:
    spec = {"signals": {"number": STATE, "move": MOVE}, "texts": ("caption",), "shard_samples": 3, **more}
    return shard([str(films)], out, spec=Spec(encode=Encode(short_side_px=64), **spec), workers=1)


@pytest.fixture(scope="session")
def robots(films: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus with signals and texts, of clips of 2 seconds."""
    out = tmp_path_factory.mktemp("robots") / "corpus"
    build(films, out, cut=Cut(kind="fixed", length_s=2.0))
    return out


def settings(folder: Path, *, flip: float = 0.0, **more) -> Data:
    clip = more.pop("clip", Clip(frames=4, fps=4))
    crop = Crop(px=96, scale=(1, 1), aspect=(1.5, 1.5), flip=flip)
    wanted = {"signals": ("number", "move"), "texts": ("caption",), **more}
    return Data(sources=(Source(shards=str(folder)),), clip=clip, crop=crop, **wanted)


def first_batch(data: Data, **more) -> Batch:
    with ClipLoader(data, Loader(workers=0), **{"seed": 3, "batch_size": 10, **more}) as loader:
        return next(loader)


def test_signals_agree_with_the_frames_that_are_shown(robots: Path, read_number):
    """The frames show their number, so states and actions are checked against pixels, also after 60 -> 30 fps."""
    numbers = set()
    for step in range(4):
        (clips,) = first_batch(settings(robots), step=step).groups
        state, move = clips.signals["number"], clips.signals["move"]
        assert state.values.shape == (10, 4, 1)
        assert move.values.shape == (10, 3, 2)
        assert (move.columns, move.units) == (("unit", "side"), ("1", "m"))
        for i in range(len(clips)):
            shown = [read_number(frame.numpy()) for frame in clips.frames[i]]
            numbers |= set(shown)
            assert state.values[i, :, 0].tolist() == shown
            assert move.values[i, :, 0].tolist() == np.diff(shown).tolist()
            sides = [sum(range(a + 1, b + 1)) for a, b in itertools.pairwise(shown)]
            assert move.values[i, :, 1].tolist() == sides
        assert state.valid.all()
        assert move.valid.all()
        assert set(clips.texts["caption"]) <= {f"film {i}, é" for i in range(5)}
    assert max(numbers) > 150  # the second half of the fast film was drawn


def test_a_derived_signal_is_read_from_its_state(films: Path, tmp_path: Path, read_number):
    step = SignalSpec(
        columns=("frames",), units=("1",), kind="action", combine="sum", flip=(1,), difference_of="number"
    )
    build(films, tmp_path / "c", signals={"number": STATE, "step": step}, texts=())
    index = Index(tmp_path / "c")
    assert not [name for name in index._table.column_names if name.startswith("step")]
    assert index.statistics["step"].mean == index.statistics["step"].max == (1.0,)
    (clips,) = first_batch(settings(tmp_path / "c", signals=("step",), texts=(), flip=1.0)).groups
    assert clips.signals["step"].valid.all()
    for i in range(len(clips)):
        shown = [read_number(frame.numpy()[:, ::-1]) for frame in clips.frames[i]]
        assert clips.signals["step"].values[i, :, 0].tolist() == np.diff(shown).tolist()
    assert verify(tmp_path / "c").problems == ()


def test_shards_with_signals_are_ordinary_webdataset_shards(robots: Path):
    url = str(min((robots / "shards").glob("*.tar")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        sample = next(iter(wds.WebDataset(url, shardshuffle=False)))  # pyright: ignore[reportAttributeAccessIssue]
    assert {"json", "mp4", "number.npy", "move.npy", "caption.txt"} <= sample.keys()
    clock = json.loads(sample["json"])["signals"]["move"]
    assert read_member(sample["move.npy"], columns=2, name="move").shape == (clock["rows"], 2)
    assert verify(robots).problems == ()


def test_foreign_shards_with_extra_members_are_indexed_without_them(robots: Path, tmp_path: Path):
    index_shards(robots / "shards", out=tmp_path / "foreign")
    index = Index(tmp_path / "foreign")
    assert len(index) == len(Index(robots))
    assert not index.signals
    assert first_batch(settings(tmp_path / "foreign", signals=(), texts=())).groups[0].signals == {}


def test_a_corpus_without_signals_has_the_same_bytes_as_before(films: Path, tmp_path: Path):
    plain = build(films, tmp_path / "plain", signals={}, texts=())
    assert {"signals", "texts"}.isdisjoint(plain.spec)
    names = Index(tmp_path / "plain")._table.column_names
    assert not [name for name in names if "." in name]
    assert "signals" not in (tmp_path / "plain" / "manifest.json").read_text()


def digest(batch: Batch) -> dict[int, str]:
    """Return a hash of everything that belongs to each slot."""
    found = {}
    for clips in batch.groups:
        for i, slot in enumerate(clips.slots):
            tensors = [t[i].numpy().tobytes() for t in clips.tensors]
            facts = [clips.keys[i], clips.start_s[i], *(t[i] for t in clips.texts.values())]
            found[slot] = hashlib.sha256(repr(facts).encode() + b"".join(tensors)).hexdigest()[:8]
    return found


def read(data: Data, steps: range, *, world: int = 1, workers: int = 0) -> list[dict[int, str]]:
    seen: list[dict[int, str]] = [{} for _ in steps]
    for rank in range(world):
        with ClipLoader(
            data, Loader(workers=workers), seed=3, batch_size=8, rank=rank, world=world, step=steps.start
        ) as loader:
            for into, _ in zip(seen, steps, strict=True):
                into |= digest(next(loader))
    return seen


@pytest.mark.parametrize(("world", "workers", "start"), [(1, 2, 0), (2, 0, 0), (2, 1, 2)])
def test_signals_are_the_same_for_any_world_workers_and_start(robots: Path, world: int, workers: int, start: int):
    data = settings(robots, flip=0.5, clip=Clip(frames=3, fps=6, sequence=2, short="hold"))
    expected = read(data, range(4))
    assert read(data, range(start, 4), world=world, workers=workers) == expected[start:]


def test_the_signals_of_a_seed_never_change(robots: Path):
    """A recording: another cut, order of columns or rounding would change it."""
    hasher = hashlib.sha256()
    for step in range(3):
        (clips,) = first_batch(settings(robots, flip=0.5), step=step).groups
        for signal in clips.signals.values():
            hasher.update(signal.values.numpy().tobytes() + signal.valid.numpy().tobytes())
    assert hasher.hexdigest()[:16] == "1cd0f68e59bb3153"


def test_a_mirrored_clip_has_mirrored_signals(robots: Path):
    (plain,) = first_batch(settings(robots)).groups
    (mirrored,) = first_batch(settings(robots, flip=1.0)).groups
    assert plain.keys == mirrored.keys
    factor = torch.tensor([1.0, -1.0])
    assert torch.equal(mirrored.signals["move"].values, plain.signals["move"].values * factor)
    assert torch.equal(mirrored.signals["number"].values, plain.signals["number"].values)


def test_flips_are_refused_unless_the_signal_declares_them(films: Path, tmp_path: Path):
    build(films, tmp_path / "c", signals={"number": STATE.model_copy(update={"flip": None})}, texts=())
    data = settings(tmp_path / "c", flip=0.5, signals=("number",), texts=())
    with pytest.raises(BadInput, match=r"data.crop.flip is 0.5, but signal 'number' .* Set data.crop.flip=0"):
        open_plan(data, seed=0, batch_size=4)
    open_plan(data.model_copy(update={"crop": Crop(flip=0)}), seed=0, batch_size=4)


def test_missing_signals_are_refused_with_a_list_of_existing_names(robots: Path, corpus: Path):
    with pytest.raises(BadInput, match=r"has no signal 'pose', only move, number\. Remove it from data.signals"):
        open_plan(settings(robots, signals=("pose",)), seed=0, batch_size=4)
    with pytest.raises(BadInput, match=r"has no text 'caption', only none\. Remove it from data.texts"):
        open_plan(settings(corpus, signals=()), seed=0, batch_size=4)


def test_stacked_rows_need_a_whole_number_per_interval(films: Path, tmp_path: Path):
    stacked = MOVE.model_copy(update={"combine": "stack"})
    build(films, tmp_path / "c", signals={"move": stacked}, texts=())
    data = settings(tmp_path / "c", signals=("move",), texts=())
    with pytest.raises(BadInput, match=r"'move' .* is stacked, but 4 fps of a 29.97 fps video leave 7 or 8 rows .*=7,"):
        open_plan(data, seed=0, batch_size=4)
    for folder, count in (("slow", 3), ("fast", 14)):
        names = {"slow": ("f0", "f1", "f4"), "fast": ("f2",)}[folder]
        (tmp_path / folder).mkdir()
        for file in films.iterdir():
            if file.name.startswith(names):
                shutil.copy(file, tmp_path / folder)
        build(tmp_path / folder, tmp_path / f"{folder} corpus", signals={"move": stacked}, texts=())
        source = Source(shards=str(tmp_path / f"{folder} corpus"), frame_step=count if folder == "slow" else 7)
        (clips,) = first_batch(data.model_copy(update={"sources": (source,)})).groups
        move = clips.signals["move"].values
        assert move.shape == (10, 3, count, 2)
        assert (move[..., 0] == 1).all()


def test_signals_survive_a_batch_in_parts_and_in_other_memory(robots: Path):
    batch = first_batch(settings(robots, clip=Clip(frames=4, fps=4, per_video=1)))
    (clips,) = batch.groups
    parts = batch.on(torch.device("cpu")).split(5)
    values = torch.cat([part.groups[0].signals["move"].values for part in parts])
    assert torch.equal(values, clips.signals["move"].values)
    assert sum((part.groups[0].texts["caption"] for part in parts), ()) == clips.texts["caption"]
    few = clips.rows({1, 7})
    assert torch.equal(few.signals["number"].values, clips.signals["number"].values[[1, 7]])


def test_uncropped_clips_carry_their_signals(robots: Path):
    with ClipLoader(settings(robots), Loader(workers=1, crop_on="device"), seed=3, batch_size=10) as loader:
        uncropped = next(loader)
    assert digest(uncropped.on(torch.device("cpu"))) == digest(first_batch(settings(robots)))


def test_a_signal_travels_between_processes_as_bytes():
    signal = Signal(torch.rand(2, 3, 4), torch.ones(2, 3, dtype=torch.bool), tuple("abcd"), ("m",) * 4)
    rebuild, arguments = signal.__reduce__()
    again = rebuild(*arguments)
    assert torch.equal(again.values, signal.values)
    assert again.columns == signal.columns


def test_show_prints_the_signals_of_each_clip(robots: Path):
    text = show.stream(settings(robots, clip=Clip(frames=3, fps=6, sequence=2)), seed=3, batch_size=8, slots=2)
    assert text.count("    move     unit [1], side [m]: sum of all rows between two frames") == 4
    assert text.count("    number   number [1]: the nearest row to each frame") == 4
    assert text.count("    caption  'film ") == 2


# Refused sidecar files


def damage_nan(folder: Path) -> None:
    rows = np.arange(48.0)[:, None]
    rows[7] = np.nan
    np.save(folder / "f0.number.npy", rows)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda f: (f / "f0.number.npy").unlink(), r"no f0.number.npy or f0.number.csv next to the video"),
    "twice": (lambda f: (f / "f0.number.csv").write_text("number\n1"), "both f0.number.npy or f0.number.csv"),
    "nan": (damage_nan, r"f0.number.npy: row 7 is not finite \(1 such rows\)"),
    "columns": (lambda f: np.save(f / "f0.number.npy", np.zeros((48, 2))), r"float64 \[48, 2\], expected numbers"),
    "short": (lambda f: np.save(f / "f0.number.npy", np.zeros((47, 1))), r"47 rows at 12 Hz end after 3.917 s"),
    "long": (lambda f: np.save(f / "f0.number.npy", np.zeros((49, 1))), "49 rows for 48 frames"),
    "pickle": (lambda f: np.save(f / "f0.number.npy", np.array([[{}]])), "f0.number.npy: "),
    "cut off": (lambda f: (f / "f0.number.npy").write_bytes((f / "f0.number.npy").read_bytes()[:-8]), "f0.number.npy"),
    "empty": (lambda f: (f / "f0.number.npy").write_bytes(b""), "f0.number.npy: "),
    "csv column": (lambda f: (f / "f0.move.csv").write_text("unit\n1\n"), "f0.move.csv: "),
    "csv text": (lambda f: (f / "f0.move.csv").write_text("unit,side\n1,x\n"), "f0.move.csv: "),
    "csv gap": (lambda f: (f / "f0.move.csv").write_text("unit,side\n" + "1,\n" * 48), "row 0 is not finite"),
    "text": (lambda f: (f / "f0.caption.txt").write_bytes(b"\xff\xfe\x00"), "f0.caption.txt: not UTF-8 at byte 0"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_source_with_a_bad_sidecar_is_refused_with_a_reason(films: Path, tmp_path: Path, name: str):
    for file in films.glob("f[01].*"):
        shutil.copy(file, tmp_path)
    damage, detail = DAMAGE[name]
    damage(tmp_path)
    build(tmp_path, tmp_path / "corpus")
    rejects = pq_rows(tmp_path / "corpus" / "rejects.parquet")
    assert [(r["stage"], r["reason"]) for r in rejects] == [("filter", "bad_signal")]
    assert rejects[0]["source"].endswith("f0.mp4")
    assert re.search(detail, rejects[0]["detail"])
    assert len(Index(tmp_path / "corpus")) == 1


def pq_rows(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_a_false_header_allocates_no_memory(tmp_path: Path):
    np.save(tmp_path / "a.npy", np.zeros((8, 1)))
    data = (tmp_path / "a.npy").read_bytes().replace(b"(8, 1), }          ", b"(80000000000, 1), }")
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(Refused, match="bad_signal"):
        read_rows(tmp_path / "a.npy", STATE)


def test_a_flipped_bit_in_a_signal_is_noticed(robots: Path, tmp_path: Path):
    shutil.copytree(robots, tmp_path / "copy")
    index = Index(tmp_path / "copy")
    path = Path(index.url(0))
    data = bytearray(path.read_bytes())
    data[int(index._members["move.npy"][0][0]) + 130] ^= 1
    path.write_bytes(data)
    assert index.read(0).key
    with pytest.raises(Unreadable, match="holds other bytes"):
        index.read(0, ["move.npy"])
    assert any("move.npy has changed" in problem for problem in verify(tmp_path / "copy").problems)


def test_a_member_that_is_not_the_described_array_is_unreadable():
    for data, found in [(b"junk", "signal 'a': "), (module.np.zeros(3).tobytes(), "signal 'a': ")]:
        with pytest.raises(Unreadable, match=found):
            read_member(data, columns=1, name="a")


# Statistics


@given(st.integers(0, 10_000), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.floats(-1e4, 1e4))
def test_merged_moments_are_those_of_all_rows(seed: int, lengths: list[int], offset: float):
    parts = [np.random.default_rng((seed, i)).normal(offset, 1, (n, 2)).astype("f4") for i, n in enumerate(lengths)]
    records = [{"split": "train", "signals": {"move": signal_statistics.measure(part)}} for part in parts]
    found = signal_statistics.read_statistics(signal_statistics.merge_records(records))["move"]
    everything = np.concatenate(parts).astype(np.float64)
    assert found.rows == len(everything)
    for name in ("mean", "std", "min", "max"):
        assert np.allclose(getattr(found, name), getattr(everything, name)(axis=0), rtol=1e-9, atol=1e-7)
    pooled = signal_statistics.pool(
        [
            signal_statistics.read_statistics({"x": signal_statistics.finish(m)})["x"]
            for m in (r["signals"]["move"] for r in records)
        ]
    )
    assert np.allclose(pooled.std, found.std, rtol=1e-9, atol=1e-7)


def test_the_manifest_has_statistics_of_the_train_split(films: Path, tmp_path: Path):
    build(films, tmp_path / "c", split={"val_share": 0.4}, shard_samples=2)
    index = Index(tmp_path / "c")
    rows = np.concatenate(
        [
            read_member(index.read(i, ["move.npy"]).members["move.npy"], columns=2, name="move")
            for i in range(len(index))
        ]
    )
    found = index.statistics["move"]
    assert found.rows == len(rows) > 0
    assert np.allclose(found.mean, rows.astype(np.float64).mean(0), atol=1e-9)
    assert np.allclose(found.std, rows.astype(np.float64).std(0), atol=1e-9)
    assert Index(tmp_path / "c", "val").statistics == index.statistics


def test_sums_are_scaled_by_the_rows_of_an_interval():
    rows = signal_statistics.SignalStatistics(9, (1.0,), (2.0,), (-3.0,), (4.0,))
    assert rows.of_intervals(combine="sum", rows_per_interval=3).std == (6.0,)
    assert rows.of_intervals(combine="mean", rows_per_interval=3) == rows

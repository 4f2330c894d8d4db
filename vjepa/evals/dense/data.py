"""Clips with maps: generated scenes, whose maps are drawn from their labels, and tables of pictures and maps.

    image,map,split
    kitchen/0001.jpg,kitchen/0001.png,train

A map belongs to the last frame of a tubelet. Its kinds, and their files in tables:

    objects   a class number for each pixel: PNG of one channel, where 255 is unknown
    depth     a number for each pixel: PNG of one channel, where 0 is unknown, or NPY, where NaN is unknown
    flow      movement (x, y) of each pixel of the picture since the picture in the column `before`: NPY [H W 2] in
              pixels, where NaN is unknown, or .flo (Middlebury)

Letters: t tubelets of a clip, T frames, P height and width in pixels, k numbers of a pixel (flow: 2, else 1), H W the
size of a map's file.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from vjepa.evals.features import CorpusVideos, clips_for
from vjepa.weights.world_model import WorldModel
from vjepa_data.corpus.format import read_manifest
from vjepa_data.errors import Unreadable
from vjepa_data.evaluation.clips import EvalClip, Short
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput
from vjepa_data.synthetic.maps import CLASSES, draw_maps

MapKind = Literal["objects", "depth", "flow"]

UNKNOWN_CLASS = 255
FLO_MAGIC = 202021.25  # first number of a .flo file


@dataclass(frozen=True)
class MappedClip:
    """A clip and the maps of the last frame of each of its tubelets."""

    video: int
    start: int
    """Number of its first frame."""
    frames: UInt8[Tensor, "T P P 3"]
    maps: Float[ndarray, "t P P k"]
    """Class numbers, depths, or movements in sides of the frame. NaN is unknown."""


@runtime_checkable
class MappedVideos(Protocol):
    """Videos or pictures with maps."""

    keys: Sequence[str]
    classes: Sequence[str]
    """Names of the classes of a map of objects."""
    identity: str
    """Text that differs if the content differs."""

    def read(self, videos: Sequence[int]) -> Iterator[list[MappedClip] | Unreadable]:
        """Yield the clips of each video in order, or the reason why there are none."""
        ...


# ---- generated scenes


class CorpusMaps:
    """A split of a corpus of generated scenes."""

    def __init__(
        self, model: WorldModel, shards: Path, kind: MapKind, *, split: str, per_video: int, max_videos: int | None,
        short: Short | None,
    ) -> None:  # fmt: skip
        form = {"split": split, "per_video": per_video, "max_videos": max_videos, "short": short}
        clips = clips_for(model, shards, **form)
        self.videos, self.kind, self.tubelet = CorpusVideos.chosen(clips), kind, model.model.tubelet_frames
        self.keys: Sequence[str] = self.videos.keys
        self.classes: Sequence[str] = CLASSES
        form |= {"px": clips.px, "frames": clips.frames, "fps": clips.rate, "short": clips.short}
        self.identity = json.dumps([read_manifest(shards).hash, form, kind])

    def read(self, videos: Sequence[int]) -> Iterator[list[MappedClip] | Unreadable]:
        for video, clips in zip(videos, self.videos.read(videos), strict=True):
            yield clips if isinstance(clips, Unreadable) else [self._with_maps(video, clip) for clip in clips]

    def _with_maps(self, video: int, clip: EvalClip) -> MappedClip:
        try:
            maps = getattr(draw_maps(clip.labels, clip.numbers, clip.frames.shape[1]), self.kind)
        except BadInput as error:
            raise BadInput(f"{clip.key}: {error}") from None
        last = maps[self.tubelet - 1 :: self.tubelet].astype(np.float32)
        return MappedClip(video, clip.numbers[0], clip.frames, last.reshape(*last.shape[:3], -1))


# ---- tables


class TableMaps:
    """Some rows of a table of pictures and maps."""

    def __init__(self, model: WorldModel, table: Path, rows: Sequence[dict[str, str]], kind: MapKind) -> None:
        """Args:
        model: the model, for the size of its pictures.
        table: the file, from whose folder paths start.
        rows: the rows.
        kind: of the maps.
        """
        self.folder, self.rows, self.px = table.parent, rows, model.px
        self.kind: MapKind = kind
        self.still = model.model.still_tokens and kind != "flow"
        self.tubelet = model.model.tubelet_frames
        self.keys: Sequence[str] = [row["image"] for row in rows]
        self.classes: Sequence[str] = ()
        facts = [[name, *_facts(table.parent / name)] for row in rows for name in _files(row, kind)]
        self.identity = json.dumps([hashlib.sha256(json.dumps(facts).encode()).hexdigest(), self.px, kind])

    def read(self, videos: Sequence[int]) -> Iterator[list[MappedClip] | Unreadable]:
        for video in videos:
            row = self.rows[video]
            pictures = [self._picture(row[name]) for name in (["before"] if self.kind == "flow" else []) + ["image"]]
            # A picture is repeated to fill a tubelet. Two pictures share a tubelet, or have one each if it is a frame.
            steps = 1 if self.still else max(self.tubelet, len(pictures))
            frames = torch.from_numpy(np.stack([pictures[len(pictures) * step // steps] for step in range(steps)]))
            found = self._map(row["map"])
            maps = np.full((max(1, steps // self.tubelet), *found.shape), np.nan, np.float32)
            maps[-1] = found
            yield [MappedClip(video, 0, frames, maps)]

    def _picture(self, name: str) -> UInt8[ndarray, "P P 3"]:
        with _open(self.folder / name) as picture:
            shown = picture.convert("RGB").resize((self.px, self.px), Image.Resampling.BICUBIC)
        return np.asarray(shown)

    def _map(self, name: str) -> Float[ndarray, "P P k"]:
        values = read_map(self.folder / name, self.kind)
        return values[_nearest(len(values), self.px)][:, _nearest(values.shape[1], self.px)]

    def find_classes(self) -> int:
        """Return the largest class number of all maps, plus one."""
        return 1 + int(max(np.nanmax(read_map(self.folder / row["map"], "objects"), initial=0) for row in self.rows))


def read_table(table: Path, kind: MapKind) -> list[dict[str, str]]:
    """Read the rows of a table, and check that their files exist.

    Raises:
        BadInput: a column or a file is missing.
    """
    try:
        with open(table, newline="", encoding="utf-8-sig") as text:
            rows = list(csv.DictReader(text))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{table} cannot be read ({error}); give a CSV file with the columns image and map") from None
    wanted = ("image", "map", *(["before"] if kind == "flow" else []))
    lacking = [name for name in wanted if not rows or not rows[0].get(name)]
    if lacking:
        found = ", ".join(rows[0]) if rows else "no rows"
        raise BadInput(
            f"{table} lacks the column {lacking[0]!r} (it has {found}); maps of {kind} need {', '.join(wanted)}"
        )
    for number, row in enumerate(rows, 2):
        for name in _files(row, kind):
            if not (table.parent / name).is_file():
                raise BadInput(f"{table}, line {number}: {name or 'an empty path'} does not exist in {table.parent}")
    return rows


def split_table(
    rows: Sequence[dict[str, str]], *, train_split: str, split: str, seed: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the rows to fit on and to report on: by the column `split`, or else two thirds and a third, drawn.

    Raises:
        BadInput: a split has no rows, or there are too few rows.
    """
    if "split" in rows[0]:
        parts = tuple([row for row in rows if row["split"] == name] for name in (train_split, split))
        for name, part in zip((train_split, split), parts, strict=True):
            if len(part) < 2:
                known = ", ".join(sorted({row["split"] for row in rows}))
                raise BadInput(
                    f"split {name!r} of the table has {len(part)} rows, at least 2 are needed; it has {known}"
                )
        return parts[0], parts[1]
    if len(rows) < 6:
        raise BadInput(f"the table has {len(rows)} rows; a probe needs at least 6")
    order = generator(seed, "dense split").permutation(len(rows))
    cut = len(rows) * 2 // 3
    return [rows[n] for n in sorted(order[:cut])], [rows[n] for n in sorted(order[cut:])]


def read_map(path: Path, kind: MapKind) -> Float[ndarray, "H W k"]:
    """Read the file of a map. NaN is unknown, and flow is in sides of the picture.

    Raises:
        BadInput: the file is not such a map.
    """
    values: Shaped[ndarray, ...]
    if path.suffix == ".npy":
        try:
            values = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise BadInput(f"{path} is not a NPY file of numbers ({error})") from None
    elif path.suffix == ".flo":
        values = _read_flo(path)
    else:
        with _open(path) as picture:
            values = np.asarray(picture)
    values = values.squeeze(-1) if values.ndim == 3 and values.shape[-1] == 1 else values
    wanted = "[H W 2]" if kind == "flow" else "[H W]"
    if values.ndim != (3 if kind == "flow" else 2) or (kind == "flow" and values.shape[-1] != 2):
        raise BadInput(f"{path} has the shape {list(values.shape)}; a map of {kind} is {wanted}")
    found = values.astype(np.float32).reshape(*values.shape[:2], -1)
    match kind:
        case "objects":
            known = found[(found != UNKNOWN_CLASS) & np.isfinite(found)]
            if ((known < 0) | (known > UNKNOWN_CLASS) | (known != np.rint(known))).any():
                raise BadInput(f"{path}: class numbers are 0 to 254, and 255 is unknown; it has {known.min():g} to "
                               f"{known.max():g}")  # fmt: skip
            return np.where(found == UNKNOWN_CLASS, np.nan, found)
        case "depth":
            return found if path.suffix == ".npy" else np.where(found == 0, np.nan, found)
        case "flow":
            return found / np.array(found.shape[1::-1], np.float32)


def _read_flo(path: Path) -> Float[ndarray, "H W 2"]:
    """Read a .flo file, whose numbers above 1e9 are unknown."""
    data = path.read_bytes()
    head = np.frombuffer(data[:4], "<f4"), np.frombuffer(data[4:12], "<i4")
    if len(data) < 12 or head[0][0] != FLO_MAGIC or len(data) != 12 + 8 * int(head[1][0]) * int(head[1][1]):
        raise BadInput(f"{path} is not a complete .flo file; write it again, or give a NPY file [H W 2] in pixels")
    width, height = map(int, head[1])
    values = np.frombuffer(data[12:], "<f4").reshape(height, width, 2)
    return np.where(np.abs(values) > 1e9, np.nan, values)


def _open(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except OSError as error:
        raise BadInput(f"{path} is not a picture that can be read ({error})") from None
    return picture


def _files(row: dict[str, str], kind: MapKind) -> list[str]:
    return [row[name] or "" for name in ("image", "map", *(["before"] if kind == "flow" else []))]


def _facts(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _nearest(size: int, px: int) -> ndarray:
    """Return the rows of a picture that are nearest to the rows of one of `px`."""
    return ((np.arange(px) + 0.5) * size / px).astype(int)

"""Benchmarks of physical violations, read from the folders that their users have.

    ours          violations.json and the films that `vjepa synthesize violations` wrote
    IntPhys       O1|O2|O3/SCENE/{1,2,3,4}/scene/*.png and status.json, as in its dev split
    GRASP         P_PROPERTY/NAME.mp4 and IP_PROPERTY/NAME.mp4, as in its level 2
    InfLevel-lab  continuity|gravity|solidity/*.mp4, and continuity.csv, gravity.csv, solidity.csv with the pairs
    IntPhys 2     metadata.csv and Videos/*.mp4 (or *.mp4 beside it), as in its splits Debug, Main and HeldOut

A pair is a possible and an impossible film that are equal at first. The films of IntPhys are paired by the time of the
first difference, as its authors do.

Letters: F frames.
"""

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image

from vjepa_data.decoding.orientation import orientation
from vjepa_data.evaluation.clips import whole_view
from vjepa_data.media.frames import read_frames
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.probe import probe
from vjepa_data.media.video import Reason, Refused
from vjepa_data.settings import BadInput
from vjepa_data.synthetic import violations as synthetic

TIMEOUT_S = 600.0

PICTURES = frozenset((".png", ".jpg", ".jpeg"))


@dataclass(frozen=True)
class Film:
    """A film of a benchmark."""

    name: str
    """Its path in the benchmark's folder."""
    path: Path
    """A video file, or a folder of pictures."""
    condition: str
    """Law or property that is tested."""
    group: str
    """Films of a group show the same scene: a pair, or a quadruplet."""
    possible: bool | None
    """Whether the film obeys physics, or None if the benchmark keeps it secret."""
    first: int = 0
    """Number of the first frame that is used."""
    dose: int | None = None
    """Frames for which the violation is hidden, if that is known."""


@dataclass(frozen=True)
class ViolationSet:
    """The films of a benchmark, and which are compared."""

    name: str
    films: Sequence[Film]
    pairs: Sequence[tuple[int, int]]
    """Places in `films` of a possible and an impossible film that are equal at first."""
    frame_step: int | None = None
    """Every so many frames are shown to a model, as published. By default the model's frame rate decides."""
    clip_frames: int | None = None
    """Frames of a window, as published. By default as many as in the model's training."""


def read_violations(folder: Path) -> ViolationSet:
    """Read a benchmark, whose kind its layout tells.

    Raises:
        BadInput: the layout is unknown, or a film that it names is missing.
    """
    for is_of, read in LAYOUTS:
        if is_of(folder):
            found = read(folder)
            missing = [film.name for film in found.films if not film.path.exists()]
            if missing:
                raise BadInput(f"{folder}: {len(missing)} films of {found.name} are missing, for instance {missing[0]}")
            if not found.films:
                raise BadInput(f"{folder}: this folder of {found.name} has no films")
            return found
    raise BadInput(
        f"{folder}: no benchmark of violations. Give a folder of `vjepa synthesize violations`, or of IntPhys "
        "(with O1, O2 or O3), GRASP (with P_... and IP_...), InfLevel-lab (with continuity.csv) or IntPhys 2 (with "
        "metadata.csv)."
    )


def draw_violations(
    seed: int, quadruplets: int, *, px: int, fps: float
) -> tuple[ViolationSet, list[UInt8[ndarray, "F px px 3"]]]:
    """Draw the films of `vjepa synthesize violations` without writing them.

    Returns:
        The set, as `read_violations` gives it for the folder, and the frames of its films, as `read_films` does but
        for the losses of compression.
    """
    entries, shown = [], []
    step = max(1, round(synthetic.FPS / fps))
    for number in range(quadruplets):
        scene = synthetic.draw_quadruplet(seed, number)
        films = synthetic.draw_films(scene)
        shown += [whole_view(frames[::step], px).numpy() for frames in films.values()]
        entries.append(synthetic.describe_quadruplet(scene, number, {name: name for name in films}))
    return _ours(Path(), entries), shown


# ---- layouts


def _read_ours(folder: Path) -> ViolationSet:
    try:
        return _ours(folder, json.loads((folder / "violations.json").read_text())["quadruplets"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder / 'violations.json'} cannot be read ({error}); write it again") from None


def _ours(folder: Path, entries: Sequence[Mapping[str, Any]]) -> ViolationSet:
    films: list[Film] = []
    pairs: list[tuple[int, int]] = []
    for entry in entries:
        group, law, dose = f"{entry['number']:06d}", entry["law"], int(entry["hidden_frames"])
        place = {}
        for kind, name in entry["films"].items():
            place[kind] = len(films)
            films.append(Film(name, folder / name, law, group, kind[0] == kind[1], dose=dose))
        pairs += [(place["aa"], place["ab"]), (place["bb"], place["ba"])]
    return ViolationSet("violations", films, pairs)


def _read_intphys(folder: Path) -> ViolationSet:
    films: list[Film] = []
    pairs: list[tuple[int, int]] = []
    blocks = [folder] if folder.name in ("O1", "O2", "O3") else [folder / block for block in ("O1", "O2", "O3")]
    for block in (block for block in blocks if block.is_dir()):
        for scene in sorted(path for path in block.iterdir() if path.is_dir()):
            first = len(films)
            for number in "1234":
                status = scene / number / "status.json"
                try:
                    possible = bool(json.loads(status.read_text())["header"]["is_possible"])
                except (OSError, ValueError, KeyError, TypeError):
                    raise BadInput(
                        f"{status} does not say whether the film is possible; IntPhys tells only for its dev split"
                    ) from None
                name = f"{block.name}/{scene.name}/{number}"
                films.append(Film(name, scene / number / "scene", block.name, name.rpartition("/")[0], possible))
            pairs += _match([(place, films[place]) for place in range(first, len(films))])
    return ViolationSet("IntPhys", films, pairs, frame_step=2, clip_frames=16)


def _match(films: Sequence[tuple[int, Film]]) -> list[tuple[int, int]]:
    """Pair possible with impossible films, so that the first differences come as late as possible."""
    possible = [entry for entry in films if entry[1].possible]
    impossible = [entry for entry in films if not entry[1].possible]
    if len(possible) != len(impossible):
        raise BadInput(f"{films[0][1].path}: {len(possible)} films of this scene are possible, half of them should be")
    together = {(a, b): _frames_in_common(one.path, other.path) for a, one in possible for b, other in impossible}
    matches = (
        [(a, b) for (a, _), (b, _) in zip(possible, order, strict=True)] for order in itertools.permutations(impossible)
    )
    return max(matches, key=lambda match: sum(together[pair] for pair in match))


def _frames_in_common(one: Path, other: Path) -> int:
    """Count the pictures before the first that differs."""
    count = 0
    for a, b in zip(_pictures_in(one), _pictures_in(other), strict=False):
        if a.read_bytes() != b.read_bytes() and not np.array_equal(_read_picture(a), _read_picture(b)):
            break
        count += 1
    return count


def _read_grasp(folder: Path) -> ViolationSet:
    films: list[Film] = []
    pairs: list[tuple[int, int]] = []
    for possible in sorted(folder.glob("P_*")):
        for path in sorted(possible.glob("*.mp4")):
            law = possible.name.removeprefix("P_")
            other, group = folder / f"IP_{law}" / path.name, f"{law}/{path.stem}"
            pairs.append((len(films), len(films) + 1))
            films.append(Film(f"{possible.name}/{path.name}", path, law, group, possible=True))
            films.append(Film(f"{other.parent.name}/{path.name}", other, law, group, possible=False))
    return ViolationSet("GRASP", films, pairs, frame_step=10, clip_frames=16)


INFLEVEL = ("continuity", "gravity", "solidity")
INFLEVEL_COLUMNS = {f"{side}_{column}" for side in ("vid1", "vid2") for column in ("path", "label", "end_priming_2")}


def _read_inflevel(folder: Path) -> ViolationSet:
    """Read pairs whose films start after the second priming, cut so that both have the same length after it."""
    films: list[Film] = []
    pairs: list[tuple[int, int]] = []
    for law in INFLEVEL:
        file = folder / f"{law}.csv"
        if not file.exists():
            continue
        for number, row in enumerate(_read_csv(file, INFLEVEL_COLUMNS)):
            names = [row["vid1_path"], row["vid2_path"]]
            starts = [int(row[f"{side}_end_priming_2"]) + 1 for side in ("vid1", "vid2")]
            rest = [_count_frames(folder / name) - start for name, start in zip(names, starts, strict=True)]
            starts = [start + max(0, own - min(rest)) for start, own in zip(starts, rest, strict=True)]
            truth = [row[f"{side}_label"] == "possible" for side in ("vid1", "vid2")]
            pairs.append((len(films) + truth.index(True), len(films) + truth.index(False)))
            films += [
                Film(name, folder / name, law, f"{law}/{number}", possible, first=first)
                for name, possible, first in zip(names, truth, starts, strict=True)
            ]
    return ViolationSet("InfLevel-lab", films, pairs, frame_step=5, clip_frames=32)


def _count_frames(path: Path) -> int:
    try:
        return probe(path).frames
    except Refused as refusal:
        raise BadInput(f"{path}: {refusal}; take the film that the authors of InfLevel publish") from None


def _read_intphys2(folder: Path) -> ViolationSet:
    films: list[Film] = []
    pairs: list[tuple[int, int]] = []
    scenes: dict[str, dict[str, int]] = {}
    videos = folder / "Videos" if (folder / "Videos").is_dir() else folder
    for row in _read_csv(folder / "metadata.csv", set()):
        name = (row.get("filename") or row.get("name") or row.get("file_name") or "").removesuffix(".mp4")
        if not name:
            raise BadInput(f"{folder / 'metadata.csv'} has no column filename or name; it has {', '.join(row)}")
        kind, scene = row.get("type") or "", str(row.get("SceneIndex") or name)
        possible = None if not kind else "Impossible" not in kind
        condition = (row.get("condition") or "held out").partition("_")[0].lower()
        scenes.setdefault(scene, {})[kind] = len(films)
        films.append(Film(f"{name}.mp4", videos / f"{name}.mp4", condition, scene, possible))
    for kinds in scenes.values():
        pairs += [
            (kinds[f"{side}_Possible"], kinds[f"{side}_Impossible"])
            for side in "12"
            if f"{side}_Possible" in kinds and f"{side}_Impossible" in kinds
        ]
    return ViolationSet("IntPhys 2", films, pairs, frame_step=10)


def _read_csv(file: Path, columns: set[str]) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8-sig") as text:
        rows = list(csv.DictReader(text))
    missing = columns - set(rows[0] if rows else columns)
    if missing:
        raise BadInput(f"{file} lacks the columns {', '.join(sorted(missing))}; take the file that its authors publish")
    return rows


LAYOUTS: tuple[tuple[Callable[[Path], bool], Callable[[Path], ViolationSet]], ...] = (
    (lambda folder: (folder / "violations.json").is_file(), _read_ours),
    (lambda folder: any((folder / block).is_dir() for block in ("O1", "O2", "O3")), _read_intphys),
    (lambda folder: folder.name in ("O1", "O2", "O3") and folder.is_dir(), _read_intphys),
    (lambda folder: any(folder.glob("IP_*")), _read_grasp),
    (lambda folder: any((folder / f"{law}.csv").is_file() for law in INFLEVEL), _read_inflevel),
    (lambda folder: (folder / "metadata.csv").is_file(), _read_intphys2),
)


# ---- films


@dataclass(frozen=True)
class FilmRequest:
    """Arguments of `read_film`, sent to a child process."""

    path: Path
    first: int
    frame_step: int | None
    fps: float
    px: int


def work(request: FilmRequest) -> UInt8[ndarray, "F px px 3"]:
    """Decode a film in a child process."""
    return read_film(request)


def read_film(request: FilmRequest) -> UInt8[ndarray, "F px px 3"]:
    """Decode every so many frames of a film, each scaled as a whole to a square.

    Without a `frame_step` the step is chosen to come nearest to `fps`, and pictures count as that rate.

    Raises:
        Refused: the film cannot be decoded.
    """
    if request.path.is_dir():
        step = request.frame_step or 1
        frames = [_read_picture(path) for path in _pictures_in(request.path)[request.first :: step]]
    else:
        info = probe(request.path)
        step = request.frame_step or max(1, round(info.fps / request.fps))
        timed = itertools.islice(read_frames(request.path, info), request.first, None, step)
        frames = [
            np.ascontiguousarray(orientation(frame).apply(frame.to_ndarray(format="rgb24"))) for _, frame in timed
        ]
    if not frames:
        raise Refused(Reason.TOO_SHORT, f"no frame from number {request.first} on")
    return whole_view(np.stack(frames), request.px).numpy()


def read_films(
    films: Sequence[Film], *, px: int, fps: float, frame_step: int | None, workers: int = 2
) -> Iterator[UInt8[ndarray, "F px px 3"] | Refused]:
    """Decode films in order, in child processes. A film that hangs or crashes its decoder gives a `Refused`."""
    requests = [FilmRequest(film.path, film.first, frame_step, fps, px) for film in films]
    with WorkerPool[FilmRequest, ndarray](__name__, workers=workers, timeout_s=TIMEOUT_S) as pool:
        for _, answer in pool.map(requests):
            yield answer


def _pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def _read_picture(path: Path) -> UInt8[ndarray, "H W 3"]:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise Refused(Reason.DAMAGED, f"{path.name}: {error}") from None

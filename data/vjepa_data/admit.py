"""Shards of others: WebDataset tars that this project did not write get a table and a manifest, and can be trained on.

Nothing is copied and nothing in the tars is changed. Members other than one video or image and one json a sample are
never looked at. What is stored in another form than ours still trains where the decoder can read it, but slower, and
with less certainty: the report says how much of it there is.
"""

import fnmatch
import hashlib
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from vjepa_data.fetch import Place
from vjepa_data.labels import MAX_BYTES, read_labels
from vjepa_data.pool import Pool
from vjepa_data.settings import BadInput
from vjepa_data.shards import Manifest, Reject, canonical_json, write_manifest
from vjepa_data.spec import Encode
from vjepa_data.video import Refused
from vjepa_data.work import Examine, Examined

SUFFIXES = ("mp4", "jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Admission:
    """What was admitted."""

    manifest: Manifest
    flaws: dict[str, int]
    """Samples that are not of the canonical form, by what is wrong; they were admitted."""
    rejects: dict[str, int]
    """Samples that cannot be decoded, by reason; they were left out."""


@dataclass(frozen=True)
class Member:
    """One sample in a tar: where its data lies."""

    key: str
    suffix: str
    video: tuple[int, int]
    """Offset and size in bytes."""
    json: tuple[int, int]
    """Of size 0 if it has none."""


def admit(
    folder: Path,
    *,
    out: Path | None = None,
    name: str | None = None,
    splits: Mapping[str, str] | None = None,
    labels: Sequence[str] | None = None,
    deep: bool = False,
    workers: int = 1,
    timeout_s: float = 120.0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Admission:
    """Index WebDataset tars of any origin.

    Args:
        folder: holds the tars, at any depth.
        out: where to write the table and the manifest, with links to the tars; by default `folder` itself.
        name: of the corpus; by default the folder's.
        splits: pattern of a tar's name to split, e.g. {"*val*": "val"}; what fits none is `train`.
        labels: fields of a sample's json to keep in the table; by default those that are texts, numbers or truths.
        deep: decode every clip from first to last frame; otherwise the first frame, and the form of the rest.
        workers: processes that open clips.
        timeout_s: after which a clip counts as one that cannot be read.
        advance: called with the tars that are done, and the tars that there are.

    Raises:
        BadInput: there are no tars, they are damaged, or a manifest is there already.
    """
    paths = sorted(path for path in folder.rglob("*.tar") if path.is_file()) if folder.is_dir() else []
    if not paths:
        raise BadInput(f"{folder}: no tars below it; give a folder of WebDataset shards")
    target = out or folder
    if (target / "manifest.json").exists():
        raise BadInput(f"{target} has a manifest already; remove it, or give another --out")
    files = _names(folder, paths, out)
    records, flaws, rejects = [], Counter[str](), Counter[str]()
    seen: Counter[str] = Counter()
    with Pool[Examine, Examined]("vjepa_data.work", workers=workers, timeout_s=timeout_s) as pool:
        for done, path in enumerate(paths, start=1):
            split = next((s for pattern, s in (splits or {}).items() if fnmatch.fnmatch(path.name, pattern)), "train")
            record = _examine(path, files[path], split, pool, flaws, labels, deep=deep)
            rejects.update(reject["reason"] for reject in record["rejects"])
            seen.update(row["key"] for row in record["samples"])
            records.append(record)
            advance(done, len(paths))
    for record in records:
        for row in record["samples"]:
            if seen[row["key"]] > 1:  # keys are often unique in their tar only
                row["key"] = f"{Path(record['file']).stem}/{row['key']}"
            row["group"] = row["group"] or row["key"]
        if not record["samples"]:
            record["file"] = None
    if not any(record["samples"] for record in records):
        raise BadInput(f"{folder}: no sample of {len(paths)} tars can be used ({_text(rejects)}); expected KEY.mp4")
    if out is not None:
        _link(out, files)
    spec = {"foreign": True, "splits": dict(splits or {}), "deep": deep}
    manifest = write_manifest(target, records, [], name=name or folder.resolve().name, spec=spec, tools={})
    return Admission(manifest, dict(flaws), dict(rejects))


def _names(folder: Path, paths: Sequence[Path], out: Path | None) -> dict[Path, str]:
    """What the manifest calls each tar: its path below the folder, or that of its link."""
    if out is None:
        return {path: path.relative_to(folder).as_posix() for path in paths}
    return {path: "shards/" + path.relative_to(folder).as_posix().replace("/", "-") for path in paths}


def _link(out: Path, files: Mapping[Path, str]) -> None:
    for path, name in files.items():
        link = out / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(path.resolve())


def members(path: Path) -> Iterator[Member]:
    """The samples of a tar: neighbouring files of one key, as WebDataset groups them.

    Raises:
        BadInput: the tar is damaged or cut off.
    """
    key, found = None, {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise BadInput(f"{path}: {member.name} goes on after the end of the tar; copy it again")
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isreg() or not dot:
                    continue
                if key != f"{folder}{slash}{stem}":
                    yield from _member(key, found)
                    key, found = f"{folder}{slash}{stem}", {}
                found.setdefault(suffix.lower(), (member.offset_data, member.size))
            yield from _member(key, found)
    except tarfile.TarError as error:
        raise BadInput(f"{path}: is not a whole tar ({error}); copy it again") from None


def _member(key: str | None, found: Mapping[str, tuple[int, int]]) -> Iterator[Member]:
    suffix = next((suffix for suffix in SUFFIXES if suffix in found), None)
    if key is not None and suffix is not None:
        yield Member(key, suffix, found[suffix], found.get("json", (found[suffix][0], 0)))


def _examine(
    path: Path,
    file: str,
    split: str,
    pool: Pool[Examine, Examined],
    flaws: Counter[str],
    labels: Sequence[str] | None,
    *,
    deep: bool,
) -> dict[str, Any]:
    """The commit record that the builder would have written for this tar."""
    rows: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    own = list(members(path))
    gop = Encode().gop
    tasks = (Examine(n, Place(str(path), *one.video), one.suffix, gop, deep) for n, one in enumerate(own))
    with path.open("rb") as tar:
        sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
        for task, answer in pool.map(tasks):
            one = own[task.number]
            if isinstance(answer, Refused):
                reject = Reject(f"{file}/{one.key}", None, None, "index", answer.reason, answer.detail)
                rejects.append(reject.__dict__)
                continue
            if answer.flaw:
                flaws[answer.flaw.partition(" (")[0].partition(":")[0]] += 1
            facts = _facts(tar, one)
            rows.append(_row(tar, one, answer, facts, labels))
    return {
        "file": file,
        "split": split,
        "bytes": path.stat().st_size,
        "sha256": sha256,
        "samples": rows,
        "rejects": rejects,
    }


def _facts(tar: Any, one: Member) -> dict[str, Any]:
    """A sample's json if it is an object, else nothing."""
    tar.seek(one.json[0])
    try:
        return read_labels(tar.read(min(one.json[1], MAX_BYTES + 1))) if one.json[1] else {}
    except ValueError:
        return {}


def _row(tar: Any, one: Member, seen: Examined, facts: dict[str, Any], labels: Sequence[str] | None) -> dict[str, Any]:
    tar.seek(one.video[0])
    is_ours = isinstance(facts.get("labels"), dict) and isinstance(facts.get("group"), str)
    kept = facts["labels"] if is_ours else facts
    plain = {name: value for name, value in kept.items() if isinstance(value, (str, int, float, bool))}
    if labels is not None:
        plain = {name: kept[name] for name in labels if name in kept}
    stored = seen.stored
    is_video = one.suffix == "mp4"
    return {
        "key": one.key,
        "video_offset": one.video[0],
        "video_size": one.video[1],
        "json_offset": one.json[0],
        "json_size": one.json[1],
        "suffix": one.suffix if is_video else "jpg",
        "frames": stored.frames,
        "fps": stored.fps,
        "width": stored.width,
        "height": stored.height,
        "duration_s": round(stored.frames / stored.fps, 6) if is_video else 0.0,
        "group": facts["group"] if is_ours else "",
        "labels": canonical_json(plain).decode(),
        "xxh64": xxhash.xxh64_hexdigest(tar.read(one.video[1])),
    }


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])) or "none"

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

from vjepa_data.builder.labels import MAX_BYTES, read_labels
from vjepa_data.builder.tars import find_tars, local_tar
from vjepa_data.corpus.format import Manifest, RejectRecord, canonical_json, is_ours, write_manifest
from vjepa_data.corpus.index import prepare
from vjepa_data.corpus.remote import is_remote
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import Examined, ExamineTask
from vjepa_data.media.video import SUFFIXES as VIDEOS
from vjepa_data.media.video import Reason, Refused
from vjepa_data.settings import BadInput
from vjepa_data.spec import Encode

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
    place: str | Path,
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
        place: folder that holds the tars, at any depth, or their addresses (`find_tars`). Remote tars are read once,
            one after another, and stay where they are: a run reads samples from there through its cache.
        out: where to write the table and the manifest, with links to local tars; by default the folder itself.
        name: of the corpus; by default the place's.
        splits: pattern of a tar's name to split, e.g. {"*val*": "val"}; what fits none is `train`.
        labels: fields of a sample's json to keep in the table; by default those that are texts, numbers or truths.
        deep: decode every clip from first to last frame; otherwise the first frame, and the form of the rest.
        workers: processes that open clips.
        timeout_s: after which a clip counts as one that cannot be read.
        advance: called with the tars that are done, and the tars that there are.

    Raises:
        BadInput: there are no tars, they are damaged or out of reach, or a manifest is there already.
    """
    place = str(place)
    if is_remote(place) and out is None:
        raise BadInput(f"{place}: an index is written here, not there; give --out a folder")
    target = out or Path(place)
    if (target / "manifest.json").exists():
        raise BadInput(f"{target} has a manifest already; remove it, or give another --out")
    tars = find_tars(place)
    is_linked = out is not None and not is_remote(place)
    if is_linked:
        _refuse_equal_links(tars.files)
    target.mkdir(parents=True, exist_ok=True)
    records, flaws, rejects = [], Counter[str](), Counter[str]()
    seen: Counter[str] = Counter()
    with WorkerPool[ExamineTask, Examined]("vjepa_data.media.tasks", workers=workers, timeout_s=timeout_s) as pool:
        for done, file in enumerate(tars.files, start=1):
            base = file.rpartition("/")[2]
            split = next((s for pattern, s in (splits or {}).items() if fnmatch.fnmatch(base, pattern)), "train")
            with local_tar(tars.root, file, scratch=target) as path:
                if path is None:
                    raise BadInput(f"{tars.root}/{file}: cannot be read; check the address and the keys")
                record = _examine(path, file, split, pool, flaws, labels, deep=deep)
            record["file"] = _link_name(file) if is_linked else file
            rejects.update(reject["reason"] for reject in record["rejects"])
            seen.update(row["key"] for row in record["samples"])
            records.append(record)
            advance(done, len(tars.files))
    for record, file in zip(records, tars.files, strict=True):
        for row in record["samples"]:
            if seen[row["key"]] > 1:  # keys are often unique in their tar only
                row["key"] = f"{file.removesuffix('.tar')}/{row['key']}"
            row["group"] = row["group"] or row["key"]
        if not record["samples"]:
            record["file"] = None
    if not any(record["samples"] for record in records):
        raise BadInput(
            f"{place}: no sample of {len(records)} tars can be used ({_text(rejects)}); expected KEY.mp4 or KEY.jpg, "
            "of other videos `vjepa shard` makes such tars"
        )
    if is_linked:
        _link(target, [(record["file"], Path(place, file)) for record, file in zip(records, tars.files, strict=True)])
    spec = {"foreign": True, "splits": dict(splits or {}), "deep": deep}
    if is_remote(place):
        spec["root"] = tars.root
    called = name or Path(tars.root.rstrip("/")).resolve().name
    manifest = write_manifest(target, records, [], name=called, spec=spec, tools={})
    prepare(target, manifest)
    return Admission(manifest, dict(flaws), dict(rejects))


def _link_name(file: str) -> str:
    """Where the link to a tar lies in the corpus's folder."""
    return f"shards/{file.replace('/', '-')}"


def _refuse_equal_links(files: Sequence[str]) -> None:
    names: dict[str, str] = {}
    for file in files:
        other = names.setdefault(_link_name(file), file)
        if other != file:
            raise BadInput(f"{other} and {file} would both be linked as {_link_name(file)}; rename one of them")


def _link(out: Path, tars: Sequence[tuple[str | None, Path]]) -> None:
    for name, path in tars:
        if name is None:
            continue
        link = out / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        link.symlink_to(path.resolve())


def members(path: Path, file: str) -> Iterator[Member | RejectRecord]:
    """The samples of a tar, called `file` in messages, and what is left out: all files of one key, wherever they lie.

    WebDataset groups neighbours only, and makes two halves of a sample whose files were not packed side by side.

    Raises:
        BadInput: the tar is damaged or cut off.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > size:
                    raise BadInput(f"{file}: {member.name} goes on after the end of the tar; copy it again")
                folder, slash, name = member.name.rpartition("/")
                stem, dot, suffix = name.partition(".")
                if not member.isreg() or not dot:
                    continue
                found = samples.setdefault(f"{folder}{slash}{stem}", {})
                if suffix.lower() in found:
                    yield _left_out(f"{file}/{member.name}", Reason.DUPLICATE, "a file of this name comes before it")
                found.setdefault(suffix.lower(), (member.offset_data, member.size))
    except tarfile.TarError as error:
        raise BadInput(f"{file}: is not a whole tar ({error}); copy it again") from None
    for key, found in samples.items():
        suffix = next((suffix for suffix in SUFFIXES if suffix in found), None)
        if suffix is not None:
            yield Member(key, suffix, found[suffix], found.get("json", (found[suffix][0], 0)))
        for other in found if suffix is None else ():
            if f".{other.rpartition('.')[2]}" in VIDEOS:
                detail = "after its first dot comes no mp4; `vjepa shard` takes such files"
                yield _left_out(f"{file}/{key}.{other}", Reason.NOT_CANONICAL, detail)


def _left_out(name: str, reason: Reason, detail: str) -> RejectRecord:
    return RejectRecord(name, None, None, "index", reason, detail)


def _examine(
    path: Path,
    file: str,
    split: str,
    pool: WorkerPool[ExamineTask, Examined],
    flaws: Counter[str],
    labels: Sequence[str] | None,
    *,
    deep: bool,
) -> dict[str, Any]:
    """The commit record that the builder would have written for this tar."""
    rows: list[dict[str, Any]] = []
    found = list(members(path, file))
    own = [one for one in found if isinstance(one, Member)]
    rejects = [one.__dict__ for one in found if isinstance(one, RejectRecord)]
    gop = Encode().gop
    tasks = (ExamineTask(n, FileRef(str(path), *one.video), one.suffix, gop, deep) for n, one in enumerate(own))
    with path.open("rb") as tar:
        sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
        for task, answer in pool.map(tasks):
            one = own[task.number]
            if isinstance(answer, Refused):
                rejects.append(_left_out(f"{file}/{one.key}", answer.reason, answer.detail).__dict__)
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
    kept = facts["labels"] if is_ours(facts) else facts
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
        "group": facts["group"] if is_ours(facts) else "",
        "labels": canonical_json(plain).decode(),
        "xxh64": xxhash.xxh64_hexdigest(tar.read(one.video[1])),
    }


def _text(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1])) or "none"

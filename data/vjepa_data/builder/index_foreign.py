"""Index foreign shards: write a sample table and a manifest for WebDataset tars that another tool wrote.

Nothing is copied, and the tars are not changed. Of each sample only its video or image and its json are read. Clips
that do not have our canonical form can still train if the decoder reads them, but decode slower and less reliably. The
result counts them.
"""

import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from vjepa_data.atomic import atomic_write
from vjepa_data.builder.labels import MAX_FILE_BYTES, read_labels
from vjepa_data.builder.source import readable
from vjepa_data.builder.tar_members import Span, read_tar, video_suffixes
from vjepa_data.builder.tars import find_tars, local_tar
from vjepa_data.corpus.format import (
    Manifest,
    RejectRecord,
    canonical_json,
    is_ours,
    is_plain_path,
    write_manifest,
)
from vjepa_data.corpus.http_client import public_url
from vjepa_data.corpus.remote import is_remote
from vjepa_data.corpus.sample_table import prepare
from vjepa_data.media.fetch import FileRef
from vjepa_data.media.pool import WorkerPool
from vjepa_data.media.tasks import Examined, ExamineTask
from vjepa_data.media.video import SUFFIXES as VIDEOS
from vjepa_data.media.video import Reason, Refused
from vjepa_data.settings import BadInput
from vjepa_data.spec import Encode

PARTS = ".index"
"""Folder in a new corpus for the samples found in remote tars so far."""

SUFFIXES = ("mp4", "jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class IndexResult:
    """Outcome of indexing foreign shards."""

    manifest: Manifest
    flaws: dict[str, int]
    """Indexed samples by difference from the canonical form. A sample may have several."""
    rejects: dict[str, int]
    """Omitted samples, counted by reason."""


@dataclass(frozen=True)
class Member:
    """Byte ranges of a sample in a tar."""

    key: str
    suffix: str
    video: tuple[int, int]
    """Offset and size in bytes."""
    json: tuple[int, int]
    """Offset and size in bytes. The size is 0 if the sample has no json."""


@dataclass(frozen=True)
class _Tar:
    """Everything that the manifest records about a tar."""

    file: str
    bytes: int
    sha256: str
    samples: list[dict[str, Any]] = field(default_factory=list)
    rejects: list[RejectRecord] = field(default_factory=list)
    flaws: Counter[str] = field(default_factory=Counter)


def index_shards(
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
) -> IndexResult:
    """Index WebDataset tars of any origin.

    Args:
        place: folder of the tars, searched recursively, or their URL (`find_tars`). Remote tars are read once, in
            order, and are not kept: a run reads samples from the URL through its cache. The samples found in each are
            kept until all are read, so that the same call continues after an outage.
        out: folder for the table and the manifest, with links to local tars (default: `place` itself).
        name: name of the corpus (default: that of `place`).
        splits: split for each pattern of tar names, e.g. {"*val*": "val"} (default: `train`).
        labels: fields of a sample's json to keep in the table (default: all strings, numbers and booleans).
        deep: decode every frame of every clip, otherwise decode the first frame and check the form of the rest.
        workers: number of processes that open clips.
        timeout_s: seconds after which a clip is rejected.
        advance: called with the number of finished tars and the number of all tars.

    Raises:
        BadInput: there are no tars, none can be used, or a manifest exists already.
    """
    place, splits = str(place), dict(splits or {})
    if is_remote(place) and out is None:
        raise BadInput(f"{public_url(place)}: an index cannot be written to a URL; give a local folder with --out")
    target = out or Path(place)
    if (target / "manifest.json").exists():
        raise BadInput(f"{target} already has a manifest; remove it or give another --out")
    found = find_tars(place)
    links = _link_names(found.files) if out is not None and not is_remote(place) else {}
    target.mkdir(parents=True, exist_ok=True)
    tars: list[_Tar] = []
    with WorkerPool[ExamineTask, Examined]("vjepa_data.media.tasks", workers=workers, timeout_s=timeout_s) as pool:
        for file in found.files:
            part = _part(target, found.root, file, labels, deep=deep) if is_remote(place) else None
            tar = _read_part(part) if part else None
            if tar is None:
                with local_tar(found.root, file, scratch=target) as path:
                    tar = _refused_tar(path, file, links.get(file, file))
                    tar = tar or _examine_tar(path or Path(file), file, pool, labels, deep=deep)
                if part and tar.bytes:
                    _write_part(part, tar)
            tars.append(tar)
            advance(len(tars), len(found.files))
    if found.rejects:
        omitted = [_reject(readable(name), Reason.SKIPPED, detail) for name, detail in found.rejects]
        tars.append(_Tar("", 0, "", rejects=omitted))
    rejects = Counter(str(reject.reason) for tar in tars for reject in tar.rejects)
    if not any(tar.samples for tar in tars):
        raise BadInput(
            f"{public_url(place)}: none of the samples in {len(found.files)} tars can be used "
            f"({_format_counts(rejects)}){_example(tars)}. Expected KEY.mp4 or KEY.jpg, and `vjepa shard` converts "
            "other videos."
        )
    _complete_rows(tars)
    for tar in tars:
        if tar.samples and links:
            _link(target / links[tar.file], Path(place, tar.file))
    records = [_commit_record(tar, links.get(tar.file, tar.file), splits) for tar in tars]
    spec = {"foreign": True, "splits": splits, "deep": deep} | ({"root": found.root} if is_remote(place) else {})
    title = name or Path(found.root.rstrip("/")).resolve().name
    manifest = write_manifest(target, records, [], name=title, spec=spec, tools={})
    prepare(target, manifest)
    shutil.rmtree(target / PARTS, ignore_errors=True)
    return IndexResult(manifest, dict(sum((tar.flaws for tar in tars), Counter())), dict(rejects))


def _part(folder: Path, root: str, file: str, labels: Sequence[str] | None, *, deep: bool) -> Path:
    """Return the file that keeps the examination of a remote tar until all tars are examined."""
    call = json.dumps([root, file, labels, deep])
    return folder / PARTS / f"{hashlib.sha256(call.encode()).hexdigest()[:32]}.json"


def _write_part(part: Path, tar: _Tar) -> None:
    part.parent.mkdir(exist_ok=True)
    kept = vars(tar) | {"rejects": [asdict(reject) for reject in tar.rejects]}
    atomic_write(part, json.dumps(kept).encode())


def _read_part(part: Path) -> _Tar | None:
    if not part.is_file():
        return None
    kept = json.loads(part.read_bytes())
    rejects = [RejectRecord(**reject) for reject in kept.pop("rejects")]
    return _Tar(**kept | {"rejects": rejects, "flaws": Counter(kept["flaws"])})


def _example(tars: Sequence[_Tar]) -> str:
    first = next((reject for tar in tars for reject in tar.rejects), None)
    return f", for example {first.source}: {first.reason}, {first.detail}" if first else ""


def _refused_tar(path: Path | None, file: str, name: str) -> _Tar | None:
    """Return a tar without samples if the tar is missing, or if the loader would refuse its name in the index."""
    if path is None:
        refusal = Reason.MISSING, "no such file, or no permission; check the address and the credentials"
    elif not is_plain_path(name) or readable(file) != file:
        refusal = Reason.SKIPPED, "its name is not text in UTF-8, or reads like a command or URL; rename it"
    else:
        return None
    return _Tar(readable(file), 0, "", rejects=[_reject(readable(file), *refusal)])


def _complete_rows(tars: Sequence[_Tar]) -> None:
    """Make keys unique over all tars, and let every sample without a group form its own."""
    counts = Counter(row["key"] for tar in tars for row in tar.samples)
    for tar in tars:
        for row in tar.samples:
            if counts[row["key"]] > 1:  # keys are often unique only within their tar
                row["key"] = f"{tar.file.removesuffix('.tar')}/{row['key']}"
            row["group"] = row["group"] or row["key"]


def _commit_record(tar: _Tar, file: str, splits: Mapping[str, str]) -> dict[str, Any]:
    """Return the commit record that the builder would have written for this tar."""
    base = tar.file.rpartition("/")[2]
    return {
        "file": file if tar.samples else None,
        "split": next((split for pattern, split in splits.items() if fnmatch.fnmatch(base, pattern)), "train"),
        "bytes": tar.bytes,
        "sha256": tar.sha256,
        "samples": tar.samples,
        "rejects": [asdict(reject) for reject in tar.rejects],
    }


def _link_names(files: Sequence[str]) -> dict[str, str]:
    """Choose a path in the corpus for the link to each tar.

    Raises:
        BadInput: two links would have the same name.
    """
    links = {file: f"shards/{_safe_name(file)}" for file in files}
    first: dict[str, str] = {}
    for file, link in links.items():
        if first.setdefault(link, file) != file:
            raise BadInput(f"{first[link]} and {file} would both be linked as {link}; rename either")
    return links


def _safe_name(file: str) -> str:
    """Return a name that means the same in a shell, in a URL and in a brace pattern."""
    return re.sub(r"[^\w.,=+@ ()-]", "-", os.fsencode(file).decode(errors="replace"))


def _link(link: Path, path: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.is_symlink():
        link.unlink()
    link.symlink_to(path.resolve())


def list_members(path: Path, file: str) -> Iterator[Member | RejectRecord]:
    """Yield the samples of a tar, called `file` in messages, and the omitted files.

    All files with the same key form a sample, wherever they lie (`read_tar`). WebDataset groups only adjacent files,
    and so splits a sample whose files are apart.
    """
    contents = read_tar(path)
    for skipped in contents.skipped:
        yield _reject(readable(f"{file}/{skipped.name}".rstrip("/")), skipped.reason, skipped.detail)
    for sample in contents.samples:
        key, found = readable(sample.key), sample.members
        suffix = next((suffix for suffix in SUFFIXES if suffix in found), None)
        if suffix is not None:
            json = found.get("json", Span(found[suffix].offset, 0))
            video = found[suffix]
            yield Member(key, suffix, (video.offset, video.size), (json.offset, json.size))
        for other in video_suffixes(found, VIDEOS):
            if other != suffix:
                detail = "not KEY.mp4, the only video of a sample that is read; use `vjepa shard` for such files"
                yield _reject(f"{file}/{key}.{other}", Reason.NOT_CANONICAL, detail)


def _reject(name: str, reason: Reason, detail: str) -> RejectRecord:
    return RejectRecord(name, None, None, "index", reason, detail)


def _examine_tar(
    path: Path, file: str, pool: WorkerPool[ExamineTask, Examined], labels: Sequence[str] | None, *, deep: bool
) -> _Tar:
    """Hash a tar and examine its clips."""
    found = list(list_members(path, file))
    members = [member for member in found if isinstance(member, Member)]
    gop = Encode().gop
    tasks = (ExamineTask(n, FileRef(str(path), *m.video), m.suffix, gop, deep) for n, m in enumerate(members))
    with path.open("rb") as data:
        tar = _Tar(file, path.stat().st_size, hashlib.file_digest(data, "sha256").hexdigest())
        tar.rejects.extend(reject for reject in found if isinstance(reject, RejectRecord))
        for task, answer in pool.map(tasks):
            member = members[task.number]
            if isinstance(answer, Refused):
                tar.rejects.append(_reject(f"{file}/{member.key}", answer.reason, answer.detail))
                continue
            tar.flaws.update(flaw.partition(" (")[0].partition(":")[0] for flaw in answer.flaws)
            facts = _read_facts(data, member)
            if facts is None:
                tar.flaws["its json is not a JSON object, so it has no labels"] += 1
            tar.samples.append(_row(data, member, facts or {}, answer, labels))
    return tar


def _read_facts(tar: BinaryIO, member: Member) -> dict[str, Any] | None:
    """Read a sample's json. Return an empty dictionary if it is missing, and None if it is invalid."""
    tar.seek(member.json[0])
    try:
        return read_labels(tar.read(min(member.json[1], MAX_FILE_BYTES + 1))) if member.json[1] else {}
    except ValueError:
        return None


def _row(
    tar: BinaryIO, member: Member, facts: dict[str, Any], examined: Examined, labels: Sequence[str] | None
) -> dict[str, Any]:
    """Return a sample's row of the table."""
    known = facts["labels"] if is_ours(facts) else facts
    if labels is None:
        kept = {name: value for name, value in known.items() if isinstance(value, (str, int, float, bool))}
    else:
        kept = {name: known[name] for name in labels if name in known}
    stored = examined.stored
    is_video = member.suffix == "mp4"
    tar.seek(member.video[0])
    return {
        "key": member.key,
        "video_offset": member.video[0],
        "video_size": member.video[1],
        "json_offset": member.json[0],
        "json_size": member.json[1],
        "suffix": member.suffix if is_video else "jpg",
        "frames": stored.frames,
        "fps": stored.fps,
        "width": stored.width,
        "height": stored.height,
        "duration_s": round(stored.frames / stored.fps, 6) if is_video else 0.0,
        "group": facts["group"] if is_ours(facts) else "",
        "labels": canonical_json(kept).decode(),
        "xxh64": xxhash.xxh64_hexdigest(tar.read(member.video[1])),
    }


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common()) or "no samples"

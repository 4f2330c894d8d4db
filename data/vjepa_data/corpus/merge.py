"""Combine several corpora into a stream: write the `data.sources` of a run from their manifests.

The corpora themselves stay separate. Each keeps its licence and origin, and can be replaced or left out alone.
"""

import itertools
import math
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from vjepa_data.atomic import atomic_write
from vjepa_data.corpus.format import read_manifest
from vjepa_data.corpus.http_client import public_url
from vjepa_data.corpus.remote import is_remote
from vjepa_data.corpus.sample_table import mirror, user_cache
from vjepa_data.settings import BadInput, Source

RARE = 1e-7
"""Share of a corpus below which most runs draw none of its clips."""


@dataclass(frozen=True)
class Part:
    """A corpus of a mixture."""

    source: Source
    name: str
    samples: int
    hours: float
    hashes: dict[str, np.ndarray]
    """Sorted hashes of the bytes of all clips, as hexadecimal bytes, by split."""


@dataclass(frozen=True)
class MergedCorpora:
    """Several corpora and their shares of a stream."""

    parts: tuple[Part, ...]
    warnings: tuple[str, ...]
    """A line per pair of corpora that share clips."""

    def text(self, base: str | None = None) -> str:
        """Return YAML for a run, or for the base of a run: `data.sources` with comments about each corpus."""
        total = sum(part.samples for part in self.parts), sum(part.hours for part in self.parts)
        lines = [f"# {len(self.parts)} corpora, {total[0]:,} clips, {total[1]:,.2f} hours; written by `vjepa merge`."]
        lines += [f"# {warning}" for warning in self.warnings]
        lines += [f"base: {base}"] if base else []
        lines += ["data:", "  sources:"]
        for part in self.parts:
            lines.append(f"    # {part.name}: {part.samples:,} clips, {part.hours:,.2f} hours")
            values = part.source.model_dump(exclude_defaults=True)
            text = yaml.safe_dump([values], sort_keys=False, allow_unicode=True, width=1000)
            lines.append(textwrap.indent(text.rstrip(), "    "))
        return "\n".join(lines) + "\n"


def merge(
    places: Sequence[str],
    *,
    split: str = "train",
    by: Literal["clips", "hours", "equal"] = "clips",
    weights: Sequence[float] | None = None,
) -> MergedCorpora:
    """Describe a mixture of corpora.

    Args:
        places: folders or URLs of corpora.
        split: the split to use of each corpus.
        by: quantity to which the share of a corpus is proportional.
        weights: an explicit share per corpus, instead of `by`.

    Raises:
        BadInput: a place is not a corpus, lacks the split or is given twice, or the weights are invalid.
    """
    if weights is not None and (len(weights) != len(places) or not all(0 < w < math.inf for w in weights)):
        raise BadInput(f"{len(weights)} weights {list(weights)} for {len(places)} corpora; give each a weight above 0")
    parts = [_read(place, split) for place in places]
    names = {part.source.corpus: part.source.shards for part in parts}
    if len(names) < len(parts):
        raise BadInput(f"{len(parts)} paths are {len(names)} corpora ({', '.join(names.values())}); give each once")
    shares = weights or [{"clips": part.samples, "hours": part.hours, "equal": 1}[by] for part in parts]
    total = sum(shares)
    if not min(shares) > 0:
        raise BadInput(f"a corpus has 0 {by}, hence a share of 0; give --by equal or --weights")
    weighed = [
        replace(part, source=part.source.model_copy(update={"weight": float(f"{share / total:.6g}")}))
        for part, share in zip(parts, shares, strict=True)
    ]
    rare = [
        f"{part.name} has a share of {part.source.weight:g}, less than one clip in {1 / RARE:,.0f}; check --weights"
        for part in weighed
        if part.source.weight < RARE
    ]
    return MergedCorpora(tuple(weighed), (*_shared(weighed), *rare))


def _read(place: str, split: str) -> Part:
    if is_remote(place) and "@" in place.split("/")[2]:
        raise BadInput(f"{public_url(place)}: a mixture would keep the password; put it into ~/.netrc")
    folder = mirror(place, user_cache()) if is_remote(place) else Path(place)
    manifest = read_manifest(folder)
    if split not in manifest.splits:
        raise BadInput(f"{place} has no split {split!r}, only {', '.join(sorted(manifest.splits))}; give --split")
    path = folder / "samples.parquet"
    try:
        table = pq.read_table(path, columns=["split", "xxh64"])
    except (OSError, pa.ArrowInvalid) as error:
        raise BadInput(f"{path}: cannot be read ({error}); build the corpus again") from None
    hashes = {
        name: np.unique(table.filter(pc.field("split") == name)["xxh64"].to_numpy().astype("S16"))
        for name in manifest.splits
    }
    licence, origin = (str(manifest.spec.get(name, "")) for name in ("licence", "origin"))
    source = Source(shards=place, split=split, corpus=manifest.hash, licence=licence, origin=origin)
    totals = manifest.splits[split]
    return Part(source, manifest.name, int(totals["samples"]), totals["seconds"] / 3600, hashes)


def _shared(parts: Sequence[Part]) -> list[str]:
    """Describe clips that two corpora share byte for byte: drawn too often, or used for training and testing."""
    lines = []
    for part, other in itertools.combinations(parts, 2):
        for own, theirs in itertools.product(sorted(part.hashes), sorted(other.hashes)):
            count = len(np.intersect1d(part.hashes[own], other.hashes[theirs], assume_unique=True))
            if count:
                lines.append(f"{count:,} clips of {part.name} ({own}) are also in {other.name} ({theirs})")
    return lines


def _beside(part: Part, folder: Path) -> Part:
    """Let a relative path of a corpus count from the folder of the mixture, which may be read from anywhere."""
    place = part.source.shards
    if is_remote(place) or os.path.isabs(place):
        return part
    return replace(part, source=part.source.model_copy(update={"shards": os.path.relpath(place, folder)}))


def write_mixture(mixture: MergedCorpora, out: Path, *, base: Path | None = None) -> None:
    """Write the YAML file of a run, or of the base of a run.

    Raises:
        BadInput: the file exists or cannot be written.
    """
    if out.exists():
        raise BadInput(f"{out} exists already; remove it or give another --out")
    mixture = replace(mixture, parts=tuple(_beside(part, out.parent) for part in mixture.parts))
    try:
        atomic_write(out, mixture.text(os.path.relpath(base, out.parent) if base else None).encode())
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror}); give another --out") from None

"""Several corpora as one stream: the `data.sources` of a run, written from what their manifests say.

Corpora are never poured together: each keeps its licence and origin, and can be replaced or left out alone.
"""

import itertools
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

from vjepa_data.corpus.format import read_manifest
from vjepa_data.corpus.index import mirror, user_cache
from vjepa_data.corpus.remote import is_remote
from vjepa_data.settings import BadInput, Source


@dataclass(frozen=True)
class Part:
    """One corpus of a mixture."""

    source: Source
    name: str
    samples: int
    hours: float
    hashes: dict[str, np.ndarray]
    """Of the bytes of all clips, by split: sorted, bytes of hexadecimal."""


@dataclass(frozen=True)
class MergedCorpora:
    """Corpora and their shares of a stream."""

    parts: tuple[Part, ...]
    warnings: tuple[str, ...]
    """Clips that are in two of the corpora, one line a pair."""

    def text(self, base: str | None = None) -> str:
        """The file of a run, or the base of one: `data.sources`, with what is known of each."""
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
        places: folders or addresses of corpora.
        split: which split of each.
        by: what a corpus's share is proportional to.
        weights: shares by hand, one for each corpus, in place of `by`.

    Raises:
        BadInput: one is no corpus, has no such split, or is given twice; the weights do not fit.
    """
    if weights is not None and (len(weights) != len(places) or min(weights, default=0) <= 0):
        raise BadInput(f"{len(weights)} weights for {len(places)} corpora, {list(weights)}; give one above 0 for each")
    parts = [_read(place, split) for place in places]
    names = {part.source.corpus: part.source.shards for part in parts}
    if len(names) < len(parts):
        raise BadInput(f"{len(parts)} places hold {len(names)} corpora ({', '.join(names.values())}); give each once")
    shares = weights or [{"clips": part.samples, "hours": part.hours, "equal": 1}[by] for part in parts]
    total = sum(shares)
    if not min(shares) > 0:
        raise BadInput(f"a corpus without any {by} can have no share; give --by equal, or --weights")
    weighed = [
        replace(part, source=part.source.model_copy(update={"weight": float(f"{share / total:.6g}")}))
        for part, share in zip(parts, shares, strict=True)
    ]
    return MergedCorpora(tuple(weighed), tuple(_shared(weighed)))


def _read(place: str, split: str) -> Part:
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
        one: np.unique(table.filter(pc.field("split") == one)["xxh64"].to_numpy().astype("S16"))
        for one in manifest.splits
    }
    licence, origin = (str(manifest.spec.get(name, "")) for name in ("licence", "origin"))
    source = Source(shards=place, split=split, corpus=manifest.hash, licence=licence, origin=origin)
    totals = manifest.splits[split]
    return Part(source, manifest.name, int(totals["samples"]), totals["seconds"] / 3600, hashes)


def _shared(parts: Sequence[Part]) -> list[str]:
    """What is in two corpora byte for byte: drawn too often, or trained on and tested with."""
    lines = []
    for one, other in itertools.combinations(parts, 2):
        for own, theirs in itertools.product(sorted(one.hashes), sorted(other.hashes)):
            count = len(np.intersect1d(one.hashes[own], other.hashes[theirs], assume_unique=True))
            if count:
                lines.append(f"{count:,} clips of {one.name} ({own}) are in {other.name} ({theirs}) as well")
    return lines


def write_mixture(mixture: MergedCorpora, out: Path, *, base: Path | None = None) -> None:
    """Write the file of a run, or the base of one.

    Raises:
        BadInput: it is there already, or cannot be written.
    """
    if out.exists():
        raise BadInput(f"{out} is there already; remove it, or give another --out")
    try:
        out.write_text(mixture.text(os.path.relpath(base, out.parent) if base else None))
    except OSError as error:
        raise BadInput(f"{out}: cannot be written ({error.strerror}); give another --out") from None

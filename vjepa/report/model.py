"""The page of a model: what it is, where it came from, what its features look like and are worth."""

import json
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from vjepa.evals.results import find_results, read_result
from vjepa.export.model_card import card_rows, parameters_m
from vjepa.report.features import clips_of, features_section
from vjepa.report.results import results_section
from vjepa.weights.load import read_weights
from vjepa.weights.weights import Weights
from vjepa_data import html
from vjepa_data.html import Section


def model_page(path: Path, *, clips: Sequence[Path] = (), results: Sequence[Path] = ()) -> str:
    """The page of an export or a checkpoint, as HTML.

    Args:
        path: its folder.
        clips: videos, folders of videos, or one corpus to show features of.
        results: files that evaluations of it wrote, besides those in its folder.

    Raises:
        BadInput: there is no model, no such video, or no such result.
    """
    weights = read_weights(path)
    where, encoder = weights.provenance, weights.model.encoder
    facts = [
        ("encoder", encoder.name),
        ("parameters", f"{parameters_m(weights):.1f} M"),
        ("frames", f"{weights.frames} at {weights.fps:g} per second"),
        ("pixels", f"{weights.px} x {weights.px}"),
    ]
    if "step" in where:
        facts.append(("steps of training", f"{where['step']:,}"))
    rows = [("", ""), *((escape(name), _code(value)) for name, value in card_rows(weights, where))]
    found = [*find_results(path), *map(read_result, results)]
    how = "No results here: vjepa eval probe MODEL SHARDS --out probe.json, then --results probe.json"
    sections = [
        Section("What it is", "", html.table(rows)),
        *_features(weights, clips),
        results_section(found, how=how),
        _provenance(weights),
    ]
    return html.render(where.get("run", path.name), f"{encoder.name}, in {path}", facts, sections)


def _features(weights: Weights, clips: Sequence[Path]) -> Iterator[Section]:
    if not clips:
        yield html.note("What its features look like", "Give videos with --clips to see.")
        return
    encoder = weights.encoder()
    yield features_section(encoder, clips_of(clips, encoder))


def _provenance(weights: Weights) -> Section:
    if not weights.provenance:
        return html.note("Where it came from", "Nothing is recorded: it was not exported by this program.")
    text = escape(json.dumps(weights.provenance, indent=1))
    return Section(
        "Where it came from",
        "All that was recorded of it, settings of the run included.",
        f"<details><summary>Provenance</summary><pre>{text}</pre></details>",
    )


def _code(value: str) -> str:
    """Text with `words` of a model card as HTML."""
    parts = escape(value).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))

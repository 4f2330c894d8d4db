"""The page of a model: sizes, provenance, features and evaluations."""

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
    """Return the page of an export or a checkpoint as HTML.

    Args:
        path: folder of the model.
        clips: videos, folders of videos, or a corpus whose features are shown.
        results: files that evaluations of the model wrote, in addition to the results in its folder.

    Raises:
        BadInput: the model, a video or a result is missing or damaged.
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
        facts.append(("training steps", f"{where['step']:,}"))
    rows = [("", ""), *((escape(name), _code(value)) for name, value in card_rows(weights, where))]
    found = [*find_results(path), *map(read_result, results)]
    how = "No results. Make some with `vjepa eval probe MODEL SHARDS --out probe.json`, and give --results probe.json."
    sections = [
        Section("Model", "", html.table(rows)),
        *_features(weights, clips),
        results_section(found, how=how),
        _provenance(weights),
    ]
    return html.render(where.get("run", path.name), f"{encoder.name}, in {path}", facts, sections)


def _features(weights: Weights, clips: Sequence[Path]) -> Iterator[Section]:
    if not clips:
        yield html.note("Features", "Give videos with --clips to see their features.")
        return
    encoder = weights.encoder()
    yield features_section(encoder, clips_of(clips, encoder))


def _provenance(weights: Weights) -> Section:
    if not weights.provenance:
        return html.note("Provenance", "Unknown: the model was not exported by this program.")
    text = escape(json.dumps(weights.provenance, indent=1))
    return Section(
        "Provenance",
        "The record of the model, with the settings of its run.",
        f"<details><summary>Provenance</summary><pre>{text}</pre></details>",
    )


def _code(value: str) -> str:
    """Turn the `code` of a model card into HTML."""
    parts = escape(value).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))

"""The page of a dense probe: scores beside their baselines, and maps of some videos.

Letters: t tubelets, P height and width in pixels, k numbers of a pixel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from jaxtyping import Float, UInt8
from numpy import ndarray

from vjepa.evals.base import Result
from vjepa.viz import plots
from vjepa_data import html
from vjepa_data.html import Section

HEIGHT = 64  # of a map on the page, in pixels


@dataclass(frozen=True)
class Shown:
    """The last frames of the tubelets of a clip, and its maps by name: the truth and predictions."""

    key: str
    frames: UInt8[ndarray, "t P P 3"]
    maps: Mapping[str, Float[ndarray, "t P P _k"]]


def dense_page(result: Result, kind: str, classes: Sequence[str], shown: Sequence[Shown]) -> str:
    """Return the page of a result, as HTML.

    Args:
        result: the scores.
        kind: of the maps: objects, depth or flow.
        classes: names of the classes of objects.
        shown: maps of some videos.
    """
    (_, metric), cells = next(iter(result.tasks.items()))
    facts = [(f"{metric}, {name}", f"{row.value:.3f}") for name, row in cells.items()]
    protocol = escape("; ".join(f"{name}: {value}" for name, value in result.protocol.items()))
    sections = [Section("Scores", protocol, _score_table(result))]
    if ious := result.details.get("iou"):
        sections.append(Section("Classes", "Intersection over union of each class.", _class_table(ious, classes)))
    figures = [
        html.strips(
            one.key, [(name, _strip(found)) for name, found in {"frames": one.frames, **_paint(one, kind)}.items()]
        )
        for one in shown
    ]
    text = "Maps of the last frame of each tubelet. All rows of a video have the same colours."
    sections.append(Section("Maps", text, "".join(figures)))
    return html.render(f"Dense probe of {kind}", str(result.protocol["data"]), facts, sections)


def _score_table(result: Result) -> str:
    lines = [["score", *map(escape, result.columns)]]
    for (_, metric), cells in result.tasks.items():
        found = [cells.get(name) for name in result.columns]
        texts = ["" if one is None else f"{one.value:.3f} <small>{one.uncertainty}</small>" for one in found]
        lines.append([escape(metric), *texts])
    return html.table(lines)


def _class_table(ious: Mapping[str, Mapping[str, float]], classes: Sequence[str]) -> str:
    found = [name for name in classes if any(name in of for of in ious.values())]
    lines = [["", *map(escape, found)]]
    lines += [[escape(name), *(f"{of[one]:.2f}" if one in of else "" for one in found)] for name, of in ious.items()]
    return html.table(lines)


def _strip(frames: UInt8[ndarray, "t P P 3"]) -> str:
    return plots.jpeg(plots.strip(frames[plots.evenly(len(frames))], height=HEIGHT))


def _paint(one: Shown, kind: str) -> dict[str, UInt8[ndarray, "t P P 3"]]:
    """Return all maps of a clip as pictures, by name."""
    truth = one.maps["truth"]
    if kind == "objects":
        numbers = {name: found if name == "truth" else found.argmax(-1)[..., None] for name, found in one.maps.items()}
        return {name: _class_colours(found) for name, found in numbers.items()}
    if kind == "depth":
        known = truth[np.isfinite(truth)]
        low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
        return {name: _greys((found - low) / max(high - low, 1e-9)) for name, found in one.maps.items()}
    longest = float(np.nanmax(np.linalg.norm(truth, axis=-1), initial=1e-3))
    return {name: _flow_colours(found / longest) for name, found in one.maps.items()}


def _class_colours(numbers: Float[ndarray, "t P P 1"] | ndarray) -> UInt8[ndarray, "t P P 3"]:
    """Colour class 0 grey, the others by hue, and unknown pixels black."""
    known = np.isfinite(numbers[..., 0])
    number = np.where(known, numbers[..., 0], 0).astype(int)
    shown = _hues(number * 0.381966 % 1)  # the golden ratio keeps neighbouring classes apart
    shown[number == 0] = 128
    shown[~known] = 0
    return shown


def _greys(values: Float[ndarray, "t P P 1"]) -> UInt8[ndarray, "t P P 3"]:
    grey = np.nan_to_num(np.clip(values, 0, 1)) * 255
    return np.repeat(np.rint(grey).astype(np.uint8), 3, axis=-1)


def _flow_colours(flow: Float[ndarray, "t P P 2"]) -> UInt8[ndarray, "t P P 3"]:
    """Colour the direction by hue and the speed by saturation. Still and unknown pixels are white."""
    flow = np.nan_to_num(flow)
    speed = np.clip(np.linalg.norm(flow, axis=-1), 0, 1)[..., None]
    hue = _hues(np.arctan2(flow[..., 1], flow[..., 0]) / (2 * np.pi) % 1)
    return np.rint(255 - speed * (255.0 - hue)).astype(np.uint8)


def _hues(hue: Float[ndarray, "t P P"]) -> UInt8[ndarray, "t P P 3"]:
    """Return the full colours of hues in [0, 1)."""
    offset = np.array([0.0, 2 / 3, 1 / 3])
    distance = np.abs((hue[..., None] + offset) % 1 - 0.5) * 6  # 3 at the colour itself, 0 opposite to it
    return np.rint(np.clip(distance - 1, 0, 1) * 255).astype(np.uint8)

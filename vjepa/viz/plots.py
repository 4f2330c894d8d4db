"""Pictures of frames, masks, features and curves. Functions take arrays and return arrays or SVG text.

Letters: B clips, T frames, H W pixels, t h w the grid of tokens, D channels.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

# One palette for all pictures: blue for our model, orange for hidden tokens, greys for the rest.
INK, FAINT, GRID = "#1c2330", "#6b7585", "#e4e8ee"
COLOURS = ("#2563eb", "#ea7317", "#0f9d8a", "#b4349b", "#8a93a3")
HIDDEN = np.array([234, 115, 23], np.float32)

STRIP_FRAMES, STRIP_PX = 8, 112


def evenly(count: int) -> Int[ndarray, " n"]:
    """Return the numbers of at most 8 frames, evenly spaced."""
    return np.linspace(0, count - 1, min(count, STRIP_FRAMES)).round().astype(int)


def strip(frames: UInt8[ndarray, "T H W 3"], *, gap: int = 2, height: int | None = None) -> UInt8[ndarray, "h w 3"]:
    """Put frames side by side, from left to right in time.

    Args:
        frames: frames of a clip.
        gap: white pixels between two frames.
        height: height of the strip. Small frames are enlarged without smoothing.
    """
    if height is not None:
        frames = np.stack([resize(frame, height) for frame in frames])
    white = np.full((frames.shape[1], gap, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (white, frame)][1:]
    return np.concatenate(parts, axis=1)


def stack(rows: Sequence[UInt8[ndarray, "_H W 3"]], *, gap: int = 2) -> UInt8[ndarray, "H W 3"]:
    """Stack pictures of equal width."""
    white = np.full((gap, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([part for row in rows for part in (white, row)][1:], axis=0)


def resize(picture: UInt8[ndarray, "H W 3"], height: int) -> UInt8[ndarray, "h w 3"]:
    """Scale to a height, without smoothing when enlarging, so that a token stays a square."""
    width = round(picture.shape[1] * height / picture.shape[0])
    how = Image.Resampling.NEAREST if height >= picture.shape[0] else Image.Resampling.BOX
    return np.asarray(Image.fromarray(picture).resize((width, height), how))


def draw_masks(
    frames: UInt8[ndarray, "T H W 3"], visible: Bool[ndarray, "t h w"], hidden: Bool[ndarray, "t h w"]
) -> UInt8[ndarray, "T H W 3"]:
    """Show a clip as the encoder sees it.

    Visible tokens keep their pixels, hidden tokens are orange with a trace of their pixels, unused tokens are grey.
    """
    steps, height, width, _ = frames.shape
    t, h, w = visible.shape

    def spread(cells: Bool[ndarray, "t h w"]) -> Bool[ndarray, "T H W 1"]:
        return cells.repeat(steps // t, 0).repeat(height // h, 1).repeat(width // w, 2)[..., None]

    grey = frames.astype(np.float32).mean(-1, keepdims=True)
    orange = 0.78 * HIDDEN + 0.22 * grey
    unused = 0.25 * grey + 0.75 * 225
    return np.where(spread(visible), frames, np.where(spread(hidden), orange, unused)).astype(np.uint8)


def feature_colours(tokens: Float[Tensor, "B t h w D"]) -> UInt8[ndarray, "B t h w 3"]:
    """Return the three main directions of features as red, green and blue, the same for all clips.

    Each direction is cut at its 1 % and 99 % quantiles. The largest weight of a direction is positive, so that colours
    do not flip between runs.
    """
    flat = tokens.flatten(0, 3).double()
    centred = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    values = (centred @ axes).numpy()
    low, high = np.quantile(values, (0.01, 0.99), axis=0)
    colours = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    return (colours * 255).round().astype(np.uint8).reshape(*tokens.shape[:4], 3)


@dataclass(frozen=True)
class Curve:
    """A curve of a plot."""

    label: str
    x: Float[ndarray, " n"]
    y: Float[ndarray, " n"]
    band: Float[ndarray, "2 n"] | None = None
    """Lower and upper end of an interval at each point, drawn as a shade."""


def plot(
    curves: Sequence[Curve],
    *,
    title: str,
    marks: Sequence[float] = (),
    log: bool = False,
    across: str = "step",
    size: tuple[float, float] = (4.4, 2.3),
) -> str:
    """Plot curves as SVG text that scales to the width of the page.

    Args:
        curves: curves to draw. A long curve is drawn faint, with its running mean on top.
        title: name of the quantity, with its unit.
        marks: positions of thin vertical lines, for instance the first step of an attempt.
        log: whether the vertical axis is logarithmic.
        across: name of the horizontal axis, with its unit.
        size: size in inches.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    for curve, colour in zip(curves, COLOURS, strict=False):
        x, y = curve.x, curve.y
        window = len(x) // 40
        label = curve.label if len(curves) > 1 else None
        if window > 1:
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, running_mean(y, window), color=colour, linewidth=1.6, label=label)
        else:
            axes.plot(x, y, color=colour, linewidth=1.6, label=label, marker="." if len(x) < 30 else None)
        if curve.band is not None:
            axes.fill_between(x, *curve.band, color=colour, alpha=0.12, linewidth=0)
    for mark in marks:
        axes.axvline(mark, color=FAINT, linewidth=0.8, linestyle=(0, (3, 3)))
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    axes.set_title(title, loc="left", fontsize=9, color=INK, fontweight="bold")
    axes.set_xlabel(across, loc="right", fontsize=7, color=FAINT)
    _dress(axes)
    if across == "step":
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if len(curves) > 1:
        axes.legend(
            frameon=False, fontsize=6.5, labelcolor=INK, ncols=len(curves), handlelength=1, columnspacing=0.8,
            handletextpad=0.4, loc="lower right", bbox_to_anchor=(1.02, 0.97),
        )  # fmt: skip
    return as_svg(figure)


def bars(rows: Sequence[str], series: Mapping[str, Sequence[tuple[float, float, float]]], *, title: str) -> str:
    """Plot groups of bars with intervals as SVG text.

    Args:
        rows: name of each group.
        series: for each colour, the (value, low, high) of each group.
        title: title of the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.9, 2.6), layout="constrained")
    axes = figure.add_subplot()
    width, places = 0.8 / len(series), np.arange(len(rows))
    colours = (COLOURS[0], "#93a5c4", "#c3ccda", "#e0e4ea")
    for number, (name, values) in enumerate(series.items()):
        height, low, high = np.array(values, float).T
        where = places + (number - (len(series) - 1) / 2) * width
        axes.bar(where, height, width * 0.92, color=colours[number % len(colours)], label=name)
        axes.errorbar(where, height, [np.maximum(height - low, 0), np.maximum(high - height, 0)],
                      fmt="none", ecolor=INK, elinewidth=0.9, capsize=1.5)  # fmt: skip
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.3))  # an R2 far below 0 would flatten all other bars
    axes.set_xticks(places, rows)
    axes.set_title(title, loc="left", fontsize=9, color=INK, fontweight="bold")
    _dress(axes)
    axes.grid(axis="x", visible=False)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=len(series), loc="lower right", bbox_to_anchor=(1, 1))
    return as_svg(figure)


def running_mean(values: Float[ndarray, " n"], window: int) -> Float[ndarray, " n"]:
    """Average the values around each position, fewer at the ends. Values that are nan are left out."""
    known = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(known, values, 0), ones, "same")
    count = np.convolve(known.astype(float), ones, "same")
    return total / np.maximum(count, 1)


def _dress(axes) -> None:
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(length=0, labelsize=8, labelcolor=FAINT)


def as_svg(figure) -> str:
    """Return SVG without the XML header, the date and random ids, so that equal pictures give equal text."""
    import matplotlib as mpl

    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "vjepa", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def png(picture: UInt8[ndarray, "H W 3"]) -> str:
    """Return a picture as a `data:` URL for a page."""
    return _data_url(picture, "png", optimize=True)


def jpeg(picture: UInt8[ndarray, "H W 3"], quality: int = 85) -> str:
    """Return a photograph as a `data:` URL for a page, a tenth of the size of `png`."""
    return _data_url(picture, "jpeg", quality=quality)


def _data_url(picture: UInt8[ndarray, "H W 3"], kind: str, **options: int | bool) -> str:
    data = io.BytesIO()
    Image.fromarray(picture).save(data, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"

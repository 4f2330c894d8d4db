"""Dense probes: what a linear map reads from each frozen token about its place in the picture.

    vjepa eval dense MODEL DATA --map objects --out dense.json      writes dense.html too

DATA is a corpus of generated scenes, whose maps are exact, or a CSV table of pictures and maps (see
`vjepa.evals.dense.data`). Ridge regression maps a token to 4 x 4 means of the map within the token's cell: the share of
each class, the depth, or the movement since the frame before. Predictions are enlarged bilinearly to the pixels of the
picture and compared there, with

    objects   mIoU over the classes that occur
    depth     root of the mean squared error
    flow      end-point error, in percent of the frame's side, over all pixels and over those that move

Beside the model are untrained encoders, raw pixels, the mean map (`prior`), and the true means enlarged in the same way
(`ceiling`): no probe can do much better.

Letters: B clips, T frames, t h w the grid of tokens, P height and width in pixels, k numbers of a cell (16 times
c), c numbers of a pixel (a share for each class, else 1 or 2), D channels, n tokens, s sums; in reports, c videos.

Source: linear segmentation and depth on frozen features, DINOv2 (arXiv:2304.07193) and V-JEPA 2.1 (arXiv:2603.14482).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from pydantic import Field
from torch import Tensor

from vjepa.atomic import new_file
from vjepa.evals.base import RANDOM, Baselines, EvaluationContext, EvaluationSettings, Result, join_seeds
from vjepa.evals.dense.data import CorpusMaps, MapKind, MappedClip, MappedVideos, TableMaps, read_table, split_table
from vjepa.evals.dense.page import Shown, dense_page
from vjepa.evals.dense.scores import SUMS, UNITS, class_iou, score_rows
from vjepa.evals.features import PixelEncoder, fingerprint
from vjepa.evals.parts import Advance, read_arrays, write_arrays, write_parts
from vjepa.evals.ridge import Table, fit_linear
from vjepa.weights.video_encoder import VideoEncoder
from vjepa.weights.world_model import WorldModel
from vjepa_data.errors import Unreadable
from vjepa_data.rng import generator
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

SHOWN = 4  # videos on the page


class DenseSettings(EvaluationSettings):
    """Settings of the dense probes."""

    map: MapKind
    """What is read: `objects`, `depth` or `flow`."""

    levels: Literal["last", "four"] = "last"
    """Read the last block, or four blocks side by side: the model's own levels, or else at quarters of the depth."""

    train_split: str = "train"
    """Split to fit on."""

    clips_per_video: int = Field(default=1, ge=1)
    """Clips of each video, evenly spaced."""

    tokens_per_clip: int = Field(default=256, ge=1)
    """Tokens of a clip that are fitted on, drawn once. All tokens are reported on."""

    cell_values: int = Field(default=4, ge=1)
    """Values along each side of a token's cell that are predicted. Fewer take less memory for maps of many classes."""

    random_seeds: int = Field(default=3, ge=0)
    """Number of untrained encoders to compare with."""

    def wanted_baselines(self) -> Baselines:
        return Baselines(tuple(self.seed + number for number in range(self.random_seeds)), pixels=True)


def evaluate(model: WorldModel, data: Path, settings: DenseSettings, context: EvaluationContext) -> Result:
    """Fit dense probes and compare their maps with the truth.

    Raises:
        BadInput: the corpus has no maps, or the table or a split is invalid.
    """
    fit, report = _open_data(model, data, settings)
    encoders = context.encoders(model)
    probes = fit_probes(encoders, fit, settings, context)
    sums = _report(encoders, probes, report, settings, context, fitted_on=fit.identity)
    rows = [row for name in sums for row in score_rows(settings.map, name, sums[name], settings.seed)]
    protocol = {
        "data": str(data),
        "fit": f"{len(fit.keys)} of {settings.train_split}",
        "report": f"{len(next(iter(sums.values())))} of {settings.split}",
        "levels": settings.levels,
        "map": f"{model.px} px, of the last frame of each tubelet",
        "readout": f"ridge from a token to {settings.cell_values} x {settings.cell_values} means of its cell, enlarged",
        "unit": UNITS[settings.map],
        "interval": "2.5 % and 97.5 % over 1,000 resamplings of the videos",
        "seed": settings.seed,
    }
    details = {"iou": class_iou(sums, fit.classes)} if settings.map == "objects" else {}
    result = Result(protocol, join_seeds(rows), details)
    if context.out is not None and context.world.is_first:
        with new_file(context.out.with_suffix(".html"), overwrite=True) as page:
            page.write_text(
                dense_page(result, settings.map, fit.classes, list(_shown(encoders, probes, report, settings)))
            )
    return result


def _open_data(model: WorldModel, data: Path, settings: DenseSettings) -> tuple[MappedVideos, MappedVideos]:
    """Open the videos to fit on and to report on."""
    if data.suffix.lower() == ".csv":
        rows = read_table(data, settings.map)
        names = {"train_split": settings.train_split, "split": settings.split}
        parts = split_table(rows, **names, seed=settings.seed)
        fit, report = (TableMaps(model, data, part[: settings.max_videos], settings.map) for part in parts)
        if settings.map == "objects":
            fit.classes = report.classes = tuple(map(str, range(max(fit.find_classes(), report.find_classes()))))
        return fit, report
    if settings.split == settings.train_split:
        raise BadInput(f"split and train_split are both {settings.split!r}; give another --split to report on")
    form: dict[str, Any] = {"per_video": settings.clips_per_video, "max_videos": settings.max_videos}
    form["short"] = settings.short
    fit, report = (
        CorpusMaps(model, data, settings.map, split=split, **form) for split in (settings.train_split, settings.split)
    )
    return fit, report


# ---- tokens and cells


@torch.no_grad()
def tokens_of(
    encoder: VideoEncoder, frames: UInt8[Tensor, "B T P P 3"], levels: Literal["last", "four"]
) -> Float[Tensor, "B t h w D"]:
    """Encode clips on the device of the encoder, and return the features of their tokens on the CPU."""
    frames = frames.to(next(encoder.parameters()).device)
    if isinstance(encoder, PixelEncoder):
        return encoder(frames.expand(-1, max(frames.shape[1], encoder.model.tubelet_frames), -1, -1, -1)).cpu()
    if levels == "last":
        return encoder(frames).cpu()
    grid = encoder.grid(frames)
    found = encoder.features(frames, levels=True) if encoder.model.levels else _quarters(encoder, frames)
    return found.unflatten(1, (grid.t, grid.h, grid.w)).cpu()


def _quarters(encoder: VideoEncoder, frames: UInt8[Tensor, "B T P P 3"]) -> Float[Tensor, "B N LD"]:
    """Return the layer-normed features after each quarter of the blocks, side by side."""
    blocks, kept = encoder.encoder.blocks, {}
    numbers = sorted({max(0, len(blocks) * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})
    hooks = [
        blocks[number].register_forward_hook(lambda _module, _inputs, x, number=number: kept.update({number: x}))
        for number in numbers
    ]
    try:
        encoder.features(frames)
    finally:
        for hook in hooks:
            hook.remove()
    first = int(encoder.model.class_token)
    parts = [kept[number].unflatten(0, (len(frames), -1))[:, first:] for number in numbers]
    return torch.cat([F.layer_norm(part.float(), part.shape[-1:]) for part in parts], dim=-1)


def cells_of(
    clip: MappedClip, grid: tuple[int, int, int], kind: MapKind, classes: int, side: int
) -> Float[Tensor, "t h w k"]:
    """Return means of a clip's maps within the cell of each token. NaN where nothing is known.

    Args:
        clip: the clip.
        grid: tokens in time, height and width.
        kind: of the maps.
        classes: number of classes of `objects`.
        side: means along each side of a cell. Those of a token are in rows, each with its classes or numbers.
    """
    maps = torch.from_numpy(clip.maps)
    known = maps.isfinite().all(-1, keepdim=True)
    maps = torch.where(known, maps, 0.0)
    if kind == "objects":
        maps = F.one_hot(maps[..., 0].long(), classes).float()
    size = (grid[1] * side, grid[2] * side)
    sums, counts = (F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), size) for x in (maps * known, known.float()))
    means = (sums / counts).permute(0, 2, 3, 1)  # 0 / 0 is NaN
    return means.unflatten(1, (grid[1], side)).unflatten(3, (grid[2], side)).transpose(2, 3).flatten(3)


# ---- fit


@dataclass(frozen=True)
class _Sample:
    """Tokens that are fitted on."""

    video: Int[ndarray, " n"]
    token: Int[ndarray, " n"]
    """Position in the grid."""
    cells: Float[ndarray, "n k"]
    features: Mapping[str, Float[Tensor, "n D"]]


Probe = Callable[[Float[Tensor, "B t h w D"]], Float[Tensor, "B t h w k"]]


def fit_probes(
    encoders: Mapping[str, VideoEncoder], fit: MappedVideos, settings: DenseSettings, context: EvaluationContext
) -> dict[str, Probe]:
    """Fit a linear map for each encoder, and the mean map under `prior`, by name.

    Raises:
        BadInput: fewer than two videos have a known map.
    """
    sample = _sample_tokens(encoders, fit, settings, context)
    if len(np.unique(sample.video)) < 2:
        raise BadInput(f"fewer than 2 of {len(fit.keys)} videos to fit on can be read and have a map; give more")

    def linear(name: str) -> Probe:
        table = Table(sample.features[name], sample.cells, sample.video)
        fitted = fit_linear(table, seed=settings.seed)
        return lambda tokens: fitted(tokens.flatten(0, 3)).float().unflatten(0, tokens.shape[:4])

    probes = {name: linear(name) for name in context.track(list(encoders), "fit dense probes")}
    return {**probes, "prior": _mean_map(sample)}


def _mean_map(sample: _Sample) -> Probe:
    """Return the mean of the cells at each place of the grid, over all times."""
    overall = sample.cells.mean(0)

    def probe(tokens: Float[Tensor, "B t h w D"]) -> Float[Tensor, "B t h w k"]:
        places = tokens.shape[2] * tokens.shape[3]
        place = sample.token % places
        count = np.bincount(place, minlength=places)[:, None]
        sums = np.stack([np.bincount(place, column, places) for column in sample.cells.T], axis=1)
        mean = np.where(count > 0, sums / np.maximum(count, 1), overall)
        return torch.from_numpy(mean).float().view(1, 1, *tokens.shape[2:4], -1).expand(*tokens.shape[:2], -1, -1, -1)

    return probe


def _sample_tokens(
    encoders: Mapping[str, VideoEncoder], fit: MappedVideos, settings: DenseSettings, context: EvaluationContext
) -> _Sample:
    def write(group: range, file: Path, advance: Advance) -> None:
        parts: dict[str, list[Any]] = {name: [] for name in ("video", "token", "cells", *_keys(encoders))}
        for clip in _clips(fit, group, advance):
            tokens = {
                name: tokens_of(encoder, clip.frames[None], settings.levels)[0] for name, encoder in encoders.items()
            }
            shape = next(iter(tokens.values())).shape
            cells = (
                cells_of(clip, (shape[0], shape[1], shape[2]), settings.map, len(fit.classes), settings.cell_values)
                .flatten(0, 2)
                .numpy()
            )
            known = np.flatnonzero(np.isfinite(cells).all(1))
            draw = generator(settings.seed, "dense tokens", clip.video, clip.start)
            chosen = np.sort(draw.permutation(known)[: settings.tokens_per_clip])
            parts["video"].append(np.full(len(chosen), clip.video))
            parts["token"].append(chosen)
            parts["cells"].append(cells[chosen])
            for name, features in tokens.items():
                parts[f"features.{name}"].append(features.flatten(0, 2)[chosen].numpy())
        write_arrays(file, parts)

    folder = context.cache / f"dense-fit-{_hash(encoders, fit, settings)}"
    files = write_parts(context.world, folder, len(fit.keys), ".npz", write, text=f"encode {len(fit.keys)} to fit on")
    joined = read_arrays(files)
    if not joined:
        raise BadInput(f"none of {len(fit.keys)} videos to fit on can be decoded; see `vjepa verify`")
    features = {name: torch.from_numpy(joined[f"features.{name}"]) for name in encoders}
    return _Sample(joined["video"], joined["token"], joined["cells"], features)


def _keys(encoders: Mapping[str, VideoEncoder]) -> list[str]:
    return [f"features.{name}" for name in encoders]


def _hash(encoders: Mapping[str, VideoEncoder], videos: MappedVideos, settings: DenseSettings, *more: Any) -> str:
    """Name a cache entry by everything that its content depends on."""
    weights = {name: fingerprint(encoder) for name, encoder in encoders.items()}
    facts = [weights, videos.identity, settings.model_dump(mode="json"), *more]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def _clips(videos: MappedVideos, group: Sequence[int], advance: Advance) -> Iterator[MappedClip]:
    """Yield the clips of some videos. Videos that cannot be decoded are logged and left out."""
    for number, clips in zip(group, videos.read(group), strict=True):
        if isinstance(clips, Unreadable):
            log.warning("%s is left out: %s", videos.keys[number], clips.detail)
        else:
            yield from clips
        advance(1)


# ---- report


def _maps_of(cells: Float[Tensor, "t h w k"], px: int, side: int) -> Float[Tensor, "t P P c"]:
    """Put the predictions of all cells in their places, and enlarge them bilinearly to pixels."""
    means = cells.unflatten(3, (side, side, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    enlarged = F.interpolate(means.permute(0, 3, 1, 2), (px, px), mode="bilinear", align_corners=False)
    return enlarged.permute(0, 2, 3, 1)


def _predict(
    encoders: Mapping[str, VideoEncoder],
    probes: Mapping[str, Probe],
    clip: MappedClip,
    settings: DenseSettings,
    classes: int,
) -> Iterator[tuple[str, Float[Tensor, "t P P c"]]]:
    """Yield the predicted maps of a clip by name: those of the encoders, the prior and the ceiling."""
    px, grid, side = clip.maps.shape[1], (0, 0, 0), settings.cell_values
    for name, encoder in encoders.items():
        tokens = tokens_of(encoder, clip.frames[None], settings.levels)
        grid = (tokens.shape[1], tokens.shape[2], tokens.shape[3])
        yield name, _maps_of(probes[name](tokens)[0], px, side)
    yield "prior", _maps_of(probes["prior"](torch.zeros(1, *grid, 1))[0], px, side)
    yield "ceiling", _maps_of(cells_of(clip, grid, settings.map, classes, side).nan_to_num(), px, side)


def _report(
    encoders: Mapping[str, VideoEncoder],
    probes: Mapping[str, Probe],
    report: MappedVideos,
    settings: DenseSettings,
    context: EvaluationContext,
    *,
    fitted_on: str,
) -> dict[str, Float[ndarray, "c s"]]:
    """Return the sums that scores are computed from, of each video, by the name of the features.

    They are kept under a name that `fitted_on`, the identity of the videos fitted on, is part of.
    """
    measure = SUMS[settings.map]

    def write(group: range, file: Path, advance: Advance) -> None:
        found: dict[str, dict[int, ndarray]] = {}
        for clip in _clips(report, group, advance):
            for name, predicted in _predict(encoders, probes, clip, settings, len(report.classes)):
                own = found.setdefault(name, {})
                own[clip.video] = own.get(clip.video, 0) + measure(predicted.numpy(), clip.maps)
        write_arrays(file, {name: [np.stack(list(of.values()))] for name, of in found.items()})

    folder = context.cache / f"dense-{_hash(encoders, report, settings, fitted_on)}"
    files = write_parts(context.world, folder, len(report.keys), ".npz", write, text=f"read {len(report.keys)} maps")
    sums = read_arrays(files)
    if not sums:
        raise BadInput(f"none of {len(report.keys)} videos to report on can be decoded; see `vjepa verify`")
    return sums


def _shown(
    encoders: Mapping[str, VideoEncoder], probes: Mapping[str, Probe], report: MappedVideos, settings: DenseSettings
) -> Iterator[Shown]:
    """Predict the maps of the first videos for the page, by one untrained encoder only."""
    untrained = [name for name in encoders if name.startswith(RANDOM)]
    wanted = {name: encoder for name, encoder in encoders.items() if name not in untrained[1:]}
    for clip in _clips(report, range(min(SHOWN, len(report.keys))), lambda done: None):
        maps = {name: found.numpy() for name, found in _predict(wanted, probes, clip, settings, len(report.classes))}
        steps = len(clip.maps)
        frames = clip.frames[len(clip.frames) // steps - 1 :: len(clip.frames) // steps][:steps].numpy()
        yield Shown(report.keys[clip.video], frames, {"truth": clip.maps, **maps})

"""Views of one clip should agree, and embeddings should fill space. No predictor, and no target to follow.

    clip --> one global view, some small crops --> tokens dropped at random --> encoder --> class token, or mean
         --> projector --> e
    loss = mean over crops (e_global - e_crop)^2  +  weight * (distance of e from a normal cloud)

The gradient goes through both sides. The moving average of the encoder is kept for evaluation alone.

LeVJEPA: arXiv:2608.27395. With `model.class_token` and `model.causal` as published: attention looks back in time only,
and one token reads all others; without them attention looks both ways and an embedding is the mean of visible tokens.
Ours differs: small crops are cut on the device from the pixels of the global view, with no change of hue.

B clips, V crops, T frames, Y X pixels, D width, E width of the embedding.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vjepa.config import LeVJEPA, Run
from vjepa.methods.base import Loss, MaskedClips, Models
from vjepa.methods.masking import sample_masks
from vjepa.methods.regularizers import barlow, directions, over_ranks, sigreg, vicreg
from vjepa.nn.blocks import init_weights
from vjepa.nn.encoder import View, pixel_statistics
from vjepa.nn.grid import Grid
from vjepa_data.rng import generator


class Projector(nn.Module):
    """Features of a clip to the space where views are compared: linear, norm over clips, GELU, linear."""

    def __init__(self, width: int, hidden: int, embedding: int, *, seed: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, embedding)])
        self.norm = ClipNorm(hidden)
        if not self.norm.weight.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int = 0) -> None:
        """Draw the first weights."""
        init_weights(self, seed=seed, name="projector")

    def forward(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n E"]:
        first, last = self.blocks
        return last(F.gelu(self.norm(first(x))))


class ClipNorm(nn.Module):
    """Each channel to mean 0 and deviation 1 over all clips of the step, on all ranks; then a scale and a shift."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        wide = x.float()
        count = over_ranks(wide.new_tensor(len(wide)))
        # Centred first: where clips look alike, mean square less squared mean would be rounding alone.
        wide = wide - over_ranks(wide.sum(0)) / count
        variance = over_ranks(wide.square().sum(0)) / count
        return (wide * (variance + 1e-5).rsqrt()).to(x.dtype) * self.weight + self.bias


def views_loss(models: Models, puzzles: Sequence[MaskedClips], run: Run) -> Loss:
    """How far views of a clip are apart, and how far embeddings are from filling space.

    Args:
        models: encoder and, as `predictor`, projector; the target is not asked.
        puzzles: this rank's clips.
        run: for the number of clips in the whole step and the objective.
    """
    objective = run.objective
    assert isinstance(objective, LeVJEPA)
    views, masks = [], []
    for puzzle in puzzles:
        grid = Grid.of(puzzle.frames.shape[2], objective.local_px, objective.local_px, run.model)
        # Draws of the first kind belong to the global view.
        kinds = run.masks * (1 + objective.local_views)
        own = sample_masks(kinds, grid, seed=run.seed, step=puzzle.step, slots=puzzle.slots)[1:]
        crops = local_crops(puzzle, run)
        for frames, mask in ((puzzle.frames, puzzle.masks[0]), *zip(crops, own, strict=True)):
            mask = mask.to(frames.device)
            views.append(View(frames, mask.visible))
            masks.append(mask)
    if run.model.class_token:
        summaries = [each[:, 0] for each in models.encoder(views, class_token=True)]
    else:
        summaries = [each.float().mean(1).to(each.dtype) for each in models.encoder(views)]
    sizes = [len(each) for each in summaries]
    embeddings = _by_view(models.predictor(torch.cat(summaries)).float().split(sizes), len(puzzles))  # [1+V n E]

    first, rest = embeddings[0], embeddings[1:]
    error = (rest - first).square().mean(-1).mean(0).sum() / run.batch_size
    spread = _variety(embeddings, run, puzzles[0].step) / _world_size()  # every rank adds its part of the same number
    value = error + objective.weight * spread
    with torch.no_grad():
        middle = over_ranks(first.sum(0)) / run.batch_size
        guess = (rest - middle).square().mean(-1).mean(0).sum() / run.batch_size
    return Loss(
        value=value,
        numbers=torch.stack((value, guess + objective.weight * spread, value)).detach(),
        features=first.detach(),
        tokens=sum(mask.visible.numel() + mask.hidden.numel() for mask in masks),
        visible=sum(mask.visible.numel() for mask in masks),
        hidden=0,
    )


def local_crops(puzzle: MaskedClips, run: Run) -> list[Float[Tensor, "B C T y x"]]:
    """Small crops of the clips, mirrored and recoloured, each the same through time: functions of (seed, step, slot).

    Crops are resampled bilinearly from the pixels that the global view has.
    """
    objective, frames = run.objective, puzzle.frames
    assert isinstance(objective, LeVJEPA)
    draws = [generator(run.seed, "local crop", puzzle.step, slot) for slot in puzzle.slots]
    u = np.stack([draw.random((objective.local_views, 10), dtype=np.float32) for draw in draws])  # [B V 10]
    low, high = objective.local_scale
    area = low + u[..., 0] * (high - low)
    aspect = np.exp(np.log(3 / 4) + u[..., 1] * np.log(16 / 9))  # width / height in [3/4, 4/3]
    height, width = np.minimum(1, np.sqrt(area / aspect)), np.minimum(1, np.sqrt(area * aspect))
    # In coordinates from -1 to 1 a crop is a scale and a shift.
    middle = (1 - np.stack((width, height))) * (2 * np.stack((u[..., 2], u[..., 3])) - 1)
    side = np.where(u[..., 4] < run.data.crop.flip, -1, 1) * width
    zero = np.zeros_like(side)
    boxes = np.stack((side, zero, middle[0], zero, height, middle[1]), axis=-1).reshape(*side.shape, 2, 3)
    boxes, u = (torch.from_numpy(x.astype(np.float32)).to(frames.device, non_blocking=True) for x in (boxes, u))
    crops = []
    for view in range(objective.local_views):
        shape = [len(frames), frames.shape[1] * frames.shape[2], objective.local_px, objective.local_px]
        where = F.affine_grid(boxes[:, view], shape, align_corners=False).to(frames.dtype)
        crop = F.grid_sample(frames.flatten(1, 2), where, padding_mode="border", align_corners=False)
        crops.append(_recolour(crop.unflatten(1, frames.shape[1:3]), u[:, view, 5:], objective))
    return crops


def _recolour(crop: Float[Tensor, "B C T y x"], u: Float[Tensor, "B 5"], objective: LeVJEPA) -> Tensor:
    """Change brightness, contrast and saturation of some clips, and take the colour from a few."""
    mean, std = pixel_statistics(crop.device)
    pixels = crop * std + mean
    jitter, gray, *amounts = (each[:, None, None, None, None] for each in u.unbind(1))
    bright, contrast, colour = (1 + s * (2 * a - 1) for s, a in zip((0.4, 0.4, 0.2), amounts, strict=True))
    changed = pixels * bright
    level = changed.mean((1, 2, 3, 4), keepdim=True)
    changed = (changed - level) * contrast + level
    grey = _luma(changed)
    changed = (changed - grey) * colour + grey
    pixels = torch.where(jitter < objective.jitter, changed.clamp(0, 1), pixels)
    pixels = torch.where(gray < objective.gray, _luma(pixels), pixels)
    return (pixels - mean) / std


def _luma(pixels: Float[Tensor, "B C T y x"]) -> Float[Tensor, "B 1 T y x"]:
    red, green, blue = pixels.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601


def _variety(embeddings: Float[Tensor, "views n E"], run: Run, step: int) -> Float[Tensor, ""]:
    """The term against collapse, mean over views."""
    objective, count = run.objective, run.batch_size
    assert isinstance(objective, LeVJEPA)
    if objective.variety == "vicreg":
        return torch.stack([vicreg(z, count=count) for z in embeddings]).mean()
    if objective.variety == "barlow":
        return torch.stack([barlow(embeddings[0], z, count=count) for z in embeddings[1:]]).mean()
    width = embeddings.shape[-1]
    slices = directions(seed=run.seed, step=step, width=width, slices=objective.slices, device=embeddings.device)
    return torch.stack([sigreg(z, count=count, slices=slices, knots=objective.knots) for z in embeddings]).mean()


def _by_view(parts: Sequence[Tensor], puzzles: int) -> Float[Tensor, "views n E"]:
    """Embeddings, given group after group, each view after view, as one tensor."""
    views = len(parts) // puzzles
    return torch.stack([torch.cat([parts[group * views + view] for group in range(puzzles)]) for view in range(views)])


def _world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1

"""LeVJEPA: views of a clip agree, and embeddings fill space. The method has no predictor and follows no target.

    clip --> one global view, some small crops --> tokens dropped at random --> encoder --> class token, or mean
         --> projector --> e
    loss = mean over crops (e_global - e_crop)^2  +  weight * (distance of e from a standard normal distribution)

The gradient goes through both views. The moving average of the encoder is kept for evaluation alone.

LeVJEPA: arXiv:2608.27395. `model.class_token` and `model.causal` together are the published form: attention sees the
past only, and the class token attends to all other tokens. Without them attention goes both ways, and an embedding is
the mean of visible tokens. Two things differ here: small crops are cut on the device from the pixels of the global
view, and keep their hue.

B clips, V crops, T frames, Y X pixels, D width, E width of the embedding.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vjepa.methods.base import Average, Loss, MaskedClips, MaskingMethod, Networks, TokenCounts
from vjepa.methods.levjepa.settings import LeVJEPASettings
from vjepa.methods.masking import Mask, sample_masks
from vjepa.methods.regularizers import barlow, directions, sigreg, sum_over_ranks, vicreg, world_size
from vjepa.nn.attention import Backend
from vjepa.nn.encoder import Encoder, View, pixel_statistics
from vjepa.nn.grid import Grid
from vjepa.nn.init import init_weights
from vjepa_data.rng import generator


class Projector(nn.Module):
    """Maps features of a clip to the space where views are compared: linear, norm over clips, GELU, linear."""

    def __init__(self, width: int, hidden: int, embedding: int, *, seed: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(width, hidden), nn.Linear(hidden, embedding)])
        self.norm = ClipNorm(hidden)
        if not self.norm.weight.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int = 0) -> None:
        """Initialise the weights."""
        init_weights(self, seed=seed, name="projector")

    def forward(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n E"]:
        first, last = self.blocks
        return last(F.gelu(self.norm(first(x))))


class ClipNorm(nn.Module):
    """Normalises each channel over all clips of the step, on all ranks, to mean 0 and standard deviation 1.

    A learned scale and shift follow.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "n D"]) -> Float[Tensor, "n D"]:
        wide = x.float()
        count = sum_over_ranks(wide.new_tensor(len(wide)))
        # Centred first: where clips look alike, mean square less squared mean would be rounding alone.
        wide = wide - sum_over_ranks(wide.sum(0)) / count
        variance = sum_over_ranks(wide.square().sum(0)) / count
        return (wide * (variance + 1e-5).rsqrt()).to(x.dtype) * self.weight + self.bias


class LeVJEPA(MaskingMethod):
    """Agreement of views, with a regularizer against collapse."""

    settings: LeVJEPASettings

    def build(self, attention: Backend = "sdpa") -> Networks:
        """Return the encoder, the projector and, if the settings ask for it, the encoder's moving average."""
        run, (hidden, embedding) = self.run, self.settings.projector
        encoder = Encoder(run.model, seed=run.seed, attention=attention)
        projector = Projector(run.model.encoder.width, hidden, embedding, seed=run.seed)
        trained = {"encoder": encoder, "predictor": projector}
        if not self.settings.average:
            return Networks(trained)
        target = copy.deepcopy(encoder).requires_grad_(False)
        return Networks(trained, averages={"target": Average(target, of="encoder")}, exported="target")

    def loss(self, networks: Networks, inputs: Sequence[MaskedClips], *, step: int) -> Loss:
        """Return the distance between views of a clip plus the weighted regularizer."""
        settings, batch_size = self.settings, self.run.batch_size
        views, masks = self.draw_views(inputs)
        if self.run.model.class_token:
            summaries = [tokens[:, 0] for tokens in networks["encoder"](views, class_token=True)]
        else:
            summaries = [tokens.float().mean(1).to(tokens.dtype) for tokens in networks["encoder"](views)]
        sizes = [len(summary) for summary in summaries]
        projected = networks["predictor"](torch.cat(summaries)).float().split(sizes)
        embeddings = _by_view(projected, len(inputs))  # [1+V n E]

        first, rest = embeddings[0], embeddings[1:]
        error = (rest - first).square().mean(-1).mean(0).sum() / batch_size
        # Every rank adds its share of the same number.
        spread = self.regularizer(embeddings, inputs[0].step) / world_size()
        value = error + settings.weight * spread
        with torch.no_grad():
            middle = sum_over_ranks(first.sum(0)) / batch_size
            constant = (rest - middle).square().mean(-1).mean(0).sum() / batch_size
        return Loss(
            value=value,
            metrics={
                "prediction": value.detach(),
                "baseline": (constant + settings.weight * spread).detach(),
                "invariance": error.detach(),
                "regularizer": spread.detach(),
            },
            features=first.detach(),
            tokens=TokenCounts(
                total=sum(mask.visible.numel() + mask.hidden.numel() for mask in masks),
                visible=sum(mask.visible.numel() for mask in masks),
            ),
        )

    def draw_views(self, inputs: Sequence[MaskedClips]) -> tuple[list[View], list[Mask]]:
        """Return the global view and the small crops of each group of clips, each with its mask."""
        settings, run, views, masks = self.settings, self.run, [], []
        for clips in inputs:
            grid = Grid.of(clips.frames.shape[2], settings.local_px, settings.local_px, run.model)
            # The first draw belongs to the global view.
            kinds = settings.masks * (1 + settings.local_views)
            local_masks = sample_masks(kinds, grid, seed=run.seed, step=clips.step, slots=clips.slots)[1:]
            crops = local_crops(clips, settings, seed=run.seed, flip=run.data.crop.flip)
            for frames, mask in ((clips.frames, clips.masks[0]), *zip(crops, local_masks, strict=True)):
                mask = mask.to(frames.device)
                views.append(View(frames, mask.visible))
                masks.append(mask)
        return views, masks

    def regularizer(self, embeddings: Float[Tensor, "views n E"], step: int) -> Float[Tensor, ""]:
        """Return the term against collapse, averaged over views."""
        settings, count = self.settings, self.run.batch_size
        if settings.regularizer == "vicreg":
            return torch.stack([vicreg(z, count=count) for z in embeddings]).mean()
        if settings.regularizer == "barlow":
            return torch.stack([barlow(embeddings[0], z, count=count) for z in embeddings[1:]]).mean()
        slices = directions(
            seed=self.run.seed,
            step=step,
            width=embeddings.shape[-1],
            slices=settings.slices,
            device=embeddings.device,
        )
        return torch.stack([sigreg(z, count=count, slices=slices, knots=settings.knots) for z in embeddings]).mean()


def local_crops(
    clips: MaskedClips, settings: LeVJEPASettings, *, seed: int, flip: float
) -> list[Float[Tensor, "B C T y x"]]:
    """Return small crops of the clips, mirrored and recoloured alike through time, as functions of (seed, step, slot).

    Crops are resampled bilinearly from the pixels of the global view.

    Args:
        clips: the global views.
        settings: number, size and colours of the crops.
        seed: seed of the run.
        flip: probability of a mirror image.
    """
    frames = clips.frames
    draws = [generator(seed, "local crop", clips.step, slot) for slot in clips.slots]
    u = np.stack([draw.random((settings.local_views, 10), dtype=np.float32) for draw in draws])  # [B V 10]
    low, high = settings.local_scale
    area = low + u[..., 0] * (high - low)
    aspect = np.exp(np.log(3 / 4) + u[..., 1] * np.log(16 / 9))  # width / height in [3/4, 4/3]
    height, width = np.minimum(1, np.sqrt(area / aspect)), np.minimum(1, np.sqrt(area * aspect))
    # In coordinates from -1 to 1 a crop is a scale and a shift.
    middle = (1 - np.stack((width, height))) * (2 * np.stack((u[..., 2], u[..., 3])) - 1)
    side = np.where(u[..., 4] < flip, -1, 1) * width
    zero = np.zeros_like(side)
    boxes = np.stack((side, zero, middle[0], zero, height, middle[1]), axis=-1).reshape(*side.shape, 2, 3)
    boxes, u = (torch.from_numpy(x.astype(np.float32)).to(frames.device, non_blocking=True) for x in (boxes, u))
    crops = []
    for view in range(settings.local_views):
        shape = [len(frames), frames.shape[1] * frames.shape[2], settings.local_px, settings.local_px]
        where = F.affine_grid(boxes[:, view], shape, align_corners=False).to(frames.dtype)
        crop = F.grid_sample(frames.flatten(1, 2), where, padding_mode="border", align_corners=False)
        crops.append(_recolour(crop.unflatten(1, frames.shape[1:3]), u[:, view, 5:], settings))
    return crops


def _recolour(crop: Float[Tensor, "B C T y x"], u: Float[Tensor, "B 5"], settings: LeVJEPASettings) -> Tensor:
    """Change brightness, contrast and saturation of some clips, and turn a few to gray."""
    mean, std = pixel_statistics(crop.device)
    pixels = crop * std + mean
    jitter, gray, *amounts = (each[:, None, None, None, None] for each in u.unbind(1))
    bright, contrast, colour = (1 + s * (2 * a - 1) for s, a in zip((0.4, 0.4, 0.2), amounts, strict=True))
    changed = pixels * bright
    level = changed.mean((1, 2, 3, 4), keepdim=True)
    changed = (changed - level) * contrast + level
    grey = _luma(changed)
    changed = (changed - grey) * colour + grey
    pixels = torch.where(jitter < settings.jitter, changed.clamp(0, 1), pixels)
    pixels = torch.where(gray < settings.gray, _luma(pixels), pixels)
    return (pixels - mean) / std


def _luma(pixels: Float[Tensor, "B C T y x"]) -> Float[Tensor, "B 1 T y x"]:
    red, green, blue = pixels.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601


def _by_view(parts: Sequence[Tensor], groups: int) -> Float[Tensor, "views n E"]:
    """Stack embeddings that are ordered by group of clips and, inside a group, by view."""
    views = len(parts) // groups
    return torch.stack([torch.cat([parts[group * views + view] for group in range(groups)]) for view in range(views)])

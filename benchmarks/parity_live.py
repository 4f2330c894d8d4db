"""Hold our network, masks, training step and run files against a clone of facebookresearch/vjepa2, number by number.

    VJEPA2_REFERENCE=/somewhere python benchmarks/parity_live.py            compare, a minute on a core
    VJEPA2_REFERENCE=/somewhere python benchmarks/parity_live.py --record   write tests/numerics/fixtures

The fixtures are numbers that came out of the reference, so that `tests/numerics` compares with it where there is no
clone.
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from reference import networks, reference, sampler
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vjepa.config import Run, load
from vjepa.distributed.sharding import shard
from vjepa.distributed.world import join
from vjepa.engine.optimizer import build_optimizer, update_weights
from vjepa.engine.schedule import Rates
from vjepa.methods.base import Average, MaskedClips, Networks, create_method
from vjepa.methods.mask_settings import BalancedMask, ReferenceMask
from vjepa.methods.masking import Mask, reference_masks
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.grid import Grid
from vjepa.nn.predictor import Predictor, PredictorInput
from vjepa.nn.settings import Model
from vjepa_data.rng import generator

FIXTURES = Path(__file__).parent.parent / "tests" / "numerics" / "fixtures"

Numbers = dict[str, np.ndarray]

# (name, kind, grid, clips, first seed): the released kinds, at several sizes, and the sampler's other features.
MASK_CASES = (
    ("short-256px-16f", ReferenceMask(blocks=8, spatial_scale=(0.15, 0.15)), Grid(8, 16, 16), 24, 0),
    ("long-256px-16f", ReferenceMask(blocks=2, spatial_scale=(0.7, 0.7)), Grid(8, 16, 16), 24, 0),
    ("short-64px-8f", ReferenceMask(blocks=8, spatial_scale=(0.15, 0.15)), Grid(4, 4, 4), 4, 5),
    ("long-224px-16f", ReferenceMask(blocks=2, spatial_scale=(0.7, 0.7)), Grid(8, 14, 14), 6, 11),
    (
        "parts-of-time",
        ReferenceMask(blocks=3, spatial_scale=(0.2, 0.6), temporal_scale=(0.3, 0.9), aspect=(0.4, 2.5)),
        Grid(8, 10, 10),
        6,
        23,
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help="write the fixtures of tests/numerics")
    record = parser.parse_args().record
    torch.set_num_threads(1)
    with reference() as clone:
        theirs = {
            "reference_masks": reference_mask_sets(),
            "reference_network": reference_network(),
            "reference_steps": reference_steps(),
            "reference_settings": reference_settings(clone),
        }
    for name, (compare, tolerance) in COMPARISONS.items():
        difference = compare(theirs[name])
        print(f"{name}: largest difference {difference:.1e}, allowed {tolerance:.0e}")
        if not difference <= tolerance:
            sys.exit(f"{name} differs from the reference")
        if record:
            FIXTURES.mkdir(exist_ok=True)
            np.savez_compressed(FIXTURES / f"{name}.npz", **theirs[name])  # pyright: ignore[reportArgumentType]
            print(f"wrote {FIXTURES / name}.npz")


def reference_mask_sets() -> Numbers:
    """Return the tokens that the reference's sampler hides in three batches in a row.

    They are packed bits, [visible | hidden] x clips x tokens.
    """
    sets = {}
    for name, kind, grid, clips, seed in MASK_CASES:
        sample = sampler(kind, grid)
        torch.manual_seed(seed)
        for call in range(3):
            sets[f"{name}-{call}"] = pack_masks(sample(clips), grid)
    return sets


def our_mask_sets() -> Numbers:
    """Return the same from our sampler."""
    sets = {}
    for name, kind, grid, clips, seed in MASK_CASES:
        places = torch.Generator().manual_seed(seed)
        for call in range(3):
            masks = reference_masks(kind, grid, clips=clips, size_seed=call, places=places)
            sets[f"{name}-{call}"] = pack_masks(masks, grid)
    return sets


def pack_masks(masks: tuple[Tensor, Tensor], grid: Grid) -> np.ndarray:
    """Index sets as bits. Nothing is lost: sets are sorted, and sizes are equal over clips."""
    bits = []
    for ids in masks:
        assert (ids.diff(dim=1) > 0).all()
        bits.append(np.zeros((len(ids), grid.tokens), dtype=bool))
        np.put_along_axis(bits[-1], ids.numpy(), True, axis=1)
    return np.packbits(np.stack(bits), axis=-1)


def compare_masks(theirs: Numbers) -> float:
    """Share of bits that differ."""
    ours = our_mask_sets()
    assert theirs.keys() == ours.keys()
    return max(float((ours[name] != bits).mean()) for name, bits in theirs.items())


# --- the network --------------------------------------------------------------------------------------------------

NETWORK = Model.model_validate(
    {
        "encoder": {"name": "custom", "width": 96, "depth": 3, "heads": 3},
        "predictor": {"width": 48, "depth": 2, "heads": 3},
    }
)
GRID = Grid(4, 4, 4)


def fill(module: nn.Module, part: str) -> None:
    """Parameters as a function of their names: nothing at 0 or 1, where a swap would go unnoticed."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            drawn = generator(0, f"{part}.{name}").standard_normal(parameter.numel(), dtype=np.float32) * 0.05
            one = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.from_numpy(drawn).view(parameter.shape) + one)


def our_network() -> tuple[Encoder, Predictor]:
    encoder, predictor = Encoder(NETWORK), Predictor(NETWORK, mask_tokens=2)
    fill(encoder, "encoder")
    fill(predictor, "predictor")
    return encoder, predictor


def their_network() -> tuple[nn.Module, nn.Module]:
    """The reference's encoder and predictor of the same size, with the same parameters."""
    encoder, predictor = networks(NETWORK, px=64, frames=8)
    ours = our_network()
    encoder.load_state_dict(ours[0].state_dict(), strict=True)
    weights = ours[1].state_dict()
    tokens = weights.pop("mask_tokens")
    predictor.load_state_dict({**weights, **{f"mask_tokens.{i}": token for i, token in enumerate(tokens)}}, strict=True)
    return encoder, predictor


def some_frames(step: int) -> Tensor:
    """Normalised pixels of four clips, different in each step."""
    drawn = generator(0, "frames", step).standard_normal((4, 3, 8, 64, 64), dtype=np.float32)
    return torch.from_numpy(drawn)


def some_masks(step: int) -> list[tuple[Tensor, Tensor]]:
    """(visible, hidden) of the two released kinds of mask."""
    kinds = (ReferenceMask(blocks=8, spatial_scale=(0.15, 0.15)), ReferenceMask(blocks=2, spatial_scale=(0.7, 0.7)))
    places = torch.Generator().manual_seed(step)
    return [reference_masks(kind, GRID, clips=4, size_seed=step, places=places) for kind in kinds]


@torch.no_grad()
def reference_network() -> Numbers:
    """Return features of whole and masked clips, and predictions with either mask token: every 16th channel."""
    encoder, predictor = their_network()
    frames, masks = some_frames(0), some_masks(0)
    numbers = {"whole": encoder(frames)}
    for kind, (visible, hidden) in enumerate(masks):
        context = encoder(frames, masks=[visible])
        numbers[f"context-{kind}"] = context
        numbers[f"prediction-{kind}"] = predictor(context, [visible], [hidden], mask_index=kind)
    return {name: value[..., ::16].numpy() for name, value in numbers.items()}


@torch.no_grad()
def our_network_numbers() -> Numbers:
    """Return the same numbers from our model, all masks in a single pass."""
    encoder, predictor = our_network()
    frames, masks = some_frames(0), some_masks(0)
    whole, *contexts = encoder([View(frames), *(View(frames, visible) for visible, _ in masks)])
    numbers = {"whole": whole}
    inputs = [PredictorInput(c, *mask, GRID, kind) for kind, (c, mask) in enumerate(zip(contexts, masks, strict=True))]
    for kind, prediction in enumerate(predictor(inputs)):
        numbers[f"context-{kind}"] = contexts[kind]
        numbers[f"prediction-{kind}"] = prediction
    return {name: value[..., ::16].numpy() for name, value in numbers.items()}


def compare_network(theirs: Numbers) -> float:
    """Return the largest difference of any feature. Features are of order 1."""
    ours = our_network_numbers()
    assert theirs.keys() == ours.keys()
    return max(float(np.abs(ours[name] - value).max()) for name, value in theirs.items())


# --- three training steps -----------------------------------------------------------------------------------------

STEPS = 3


def reference_steps() -> Numbers:
    """Three optimizer steps as the reference's training loop makes them.

    Its own networks, optimizer, schedules and loss, in the order of its loop, with one correction: each kind of mask
    has its own mask token (its wrapper counts clip lengths where it should count masks).
    """
    encoder, predictor = their_network()
    target = copy.deepcopy(encoder).requires_grad_(False)
    init_opt = importlib.import_module("app.vjepa.utils").init_opt
    optimizer, _, lr_schedule, decay_schedule = init_opt(
        is_anneal=False,
        encoder=encoder,
        predictor=predictor,
        iterations_per_epoch=10,
        start_lr=1e-4,
        ref_lr=1e-3,
        warmup=1,
        num_epochs=2,
        wd=0.04,
        final_wd=0.4,
        mixed_precision=False,
    )
    numbers: Numbers = {}
    for step in range(STEPS):
        lr, weight_decay, ema = lr_schedule.step(), decay_schedule.step(), 0.9 + 0.02 * step
        frames, masks = some_frames(step), some_masks(step)
        with torch.no_grad():
            h = F.layer_norm(target(frames), (NETWORK.encoder.width,))
        loss = torch.zeros(())
        for kind, (visible, hidden) in enumerate(masks):
            prediction = predictor(encoder(frames, masks=[visible]), [visible], [hidden], mask_index=kind)
            loss = loss + (prediction - h.take_along_dim(hidden[..., None], 1)).abs().mean() / len(masks)
        loss.backward()
        gradients = {name: p.grad for name, p in _named(encoder, predictor)}
        numbers[f"{step}-rates"] = np.array([lr, weight_decay, ema])
        numbers[f"{step}-loss"] = np.array(loss.item())
        numbers[f"{step}-gradients"] = project(gradients)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for slow, fast in zip(target.parameters(), encoder.parameters(), strict=True):
                slow.mul_(ema).add_(fast, alpha=1 - ema)
        numbers[f"{step}-weights"] = project(dict(_named(encoder, predictor)))
        numbers[f"{step}-target"] = project({f"encoder.{name}": p for name, p in target.named_parameters()})
    return numbers


def our_steps(rates: list[Rates]) -> Numbers:
    """The same three steps with our objective, optimizer and average, sharded as in a run, in a single process."""
    run = Run.model_validate(
        {
            "name": "parity",
            "steps": STEPS,
            "batch_size": 4,
            "precision": "fp32",
            "model": NETWORK,
            "masks": [{"mode": "random", "visible_share": 0.5}] * 2,  # stand-ins: the masks are the reference's
            "optim": {"lr": 1e-3},
            "data": {"sources": [{"shards": "none"}], "clip": {"frames": 8}, "crop": {"px": 64}},
        }
    )
    numbers: Numbers = {}
    with join(run.parallel) as world:
        encoder, predictor = our_network()
        method = create_method(run)
        target = copy.deepcopy(encoder).requires_grad_(False)
        trained = {"encoder": encoder, "predictor": predictor}
        networks = Networks(trained, averages={"target": Average(target, of="encoder")}, exported="target")
        shard(networks, run.parallel, mesh=world.mesh, dtype=torch.float32)
        optimizer = build_optimizer(networks.trained, run.optim)
        for step in range(STEPS):
            frames = some_frames(step)
            masks = [Mask(kind, (0, 1, 2, 3), *ids) for kind, ids in enumerate(some_masks(step))]
            loss = method.loss(networks, [MaskedClips(frames, GRID, masks, step, (0, 1, 2, 3))], step=step)
            loss.value.backward()
            gradients = {name: whole(p.grad) for name, p in _named(encoder, predictor) if p.grad is not None}
            numbers[f"{step}-loss"] = np.array(loss.value.item())
            numbers[f"{step}-gradients"] = project(gradients)
            update = update_weights(optimizer, loss.value.detach(), rates[step], clip_norm=None)
            method.after_update(networks, ema=rates[step].ema, applied=update.applied)
            numbers[f"{step}-weights"] = project({name: whole(p) for name, p in _named(encoder, predictor)})
            target = {f"encoder.{name}": whole(p) for name, p in networks["target"].named_parameters()}
            numbers[f"{step}-target"] = project(target)
    return numbers


def _named(encoder: nn.Module, predictor: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for part, module in (("encoder", encoder), ("predictor", predictor)):
        for name, parameter in module.named_parameters():
            yield f"{part}.{name}", parameter


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor that may be sharded as a whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def project(tensors: Mapping[str, Tensor | None]) -> np.ndarray:
    """A few numbers for each tensor, in order of names: its norm, and its products with four fixed random directions.

    A difference in any element moves the products by about as much, so that a fixture need not hold every number.
    The reference's separate mask tokens are put together as ours are.
    """
    gathered = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    tokens = [gathered.pop(name) for name in sorted(gathered) if ".mask_tokens." in name]
    if tokens:
        gathered["predictor.mask_tokens"] = torch.stack(tokens)
    rows = []
    for name in sorted(gathered):
        values = gathered[name].double().flatten().numpy()
        directions = generator(0, name).standard_normal((4, len(values)))
        rows.append([np.linalg.norm(values), *(directions @ values)])
    return np.array(rows)


def compare_steps(theirs: Numbers) -> float:
    """Return the largest difference of a loss, and of any projection relative to the norm of its tensor."""
    ours = our_steps([Rates(*map(float, theirs[f"{step}-rates"])) for step in range(STEPS)])
    worst = 0.0
    for name, value in ours.items():
        difference = np.abs(value - theirs[name])
        if value.ndim:
            difference = difference / theirs[name][:, :1]
        worst = max(worst, float(difference.max()))
    return worst


# --- run files ----------------------------------------------------------------------------------------------------

RUN_FILES = {
    "vitl16_256px_16f": "vitl16/pretrain-256px-16f",
    "vitl16_256px_64f": "vitl16/cooldown-256px-64f",
    "vith16_256px_16f": "vith16/pretrain-256px-16f",
    "vith16_256px_64f": "vith16/cooldown-256px-64f",
    "vitg16_256px_16f": "vitg16/pretrain-256px-16f",
    "vitg16_256px_64f": "vitg16/cooldown-256px-64f",
    "vitg16_384px_64f": "vitg16/cooldown-384px-64f",
}

# Its lengths are left over from trials. The paper has 800 epochs of 300, and 40 of 300.
LEFT_OVER = {"vitl16_256px_16f": 800, "vith16_256px_16f": 800, "vitg16_256px_64f": 40}


def reference_settings(folder: Path) -> Numbers:
    """Every number of the published files that decides the result and that a run file of ours has a place for."""
    registry = importlib.import_module("src.models.vision_transformer")
    numbers: Numbers = {}
    for name, path in RUN_FILES.items():
        file = yaml.safe_load((folder / "configs" / "train" / f"{path}.yaml").read_text())
        data, model, optim, crop = (file[group] for group in ("data", "model", "optimization", "data_aug"))
        with mock.patch.object(registry, "VisionTransformer", dict):  # its arguments instead of the network
            size = registry.__dict__[model["model_name"]]()
        warmup = optim["warmup"] * optim["ipe"]
        epochs, ipe = (LEFT_OVER[name], 300) if name in LEFT_OVER else (optim["epochs"], optim["ipe"])
        values = {
            "seed": file["meta"]["seed"],
            "steps": epochs * ipe,
            "batch": data["batch_size"] * file["nodes"] * file["tasks_per_node"],
            "frames": data["dataset_fpcs"],
            "fps": data["fps"],
            "px": data["crop_size"],
            "patch": [data["tubelet_size"], data["patch_size"], data["patch_size"]],
            "weights": data["datasets_weights"],
            "crop": [*crop["random_resize_scale"], *crop["random_resize_aspect_ratio"]],
            "encoder": [
                *(size[part] for part in ("embed_dim", "depth", "num_heads")),
                int(size["embed_dim"] * size["mlp_ratio"]),
            ],
            "predictor": [model["pred_embed_dim"], model["pred_depth"], model["pred_num_heads"]],
            "masks": [
                [m["num_blocks"], *m["spatial_scale"], *m["temporal_scale"], *m["aspect_ratio"]] for m in file["mask"]
            ],
            "clips_cut_together": data["batch_size"],
            "lr": [optim["lr"], optim["final_lr"]],
            "warmup": [warmup, optim["start_lr"] if warmup else 0.0],
            "weight_decay": [optim["weight_decay"], optim["final_weight_decay"]],
            "ema": optim["ema"],
            "loss_exponent": file["loss"]["loss_exp"],
        }
        numbers.update({f"{name}-{key}": np.array(value, dtype=np.float64) for key, value in values.items()})
    return numbers


def our_settings() -> Numbers:
    """Return the same from our recipe, with the published masks that the file names at its end."""
    numbers: Numbers = {}
    for name in RUN_FILES:
        run = load(name).settings
        published = yaml.safe_load(_commented_masks(name))["objective"]["masks"]
        masks = [ReferenceMask.model_validate(mask) for mask in published]
        for ours, theirs in zip(run.objective.mask_kinds, masks, strict=True):
            assert isinstance(ours, BalancedMask)
            assert (ours.blocks, ours.block_share, ours.aspect) == (
                theirs.blocks,
                theirs.spatial_scale[0],
                theirs.aspect,
            )
        size, narrow, optim, crop = run.model.encoder, run.model.predictor, run.optim, run.data.crop
        values = {
            "seed": run.seed,
            "steps": run.steps,
            "batch": run.batch_size,
            "frames": [run.data.clip.frames] * len(run.data.sources),
            "fps": run.data.clip.fps,
            "px": crop.px,
            "patch": [run.model.tubelet_frames, run.model.patch_px, run.model.patch_px],
            "weights": [source.weight for source in run.data.sources],
            "crop": [*crop.scale, *crop.aspect],
            "encoder": [size.width, size.depth, size.heads, int(size.width * size.mlp_ratio)],
            "predictor": [narrow.width, narrow.depth, narrow.heads],
            "masks": [[m.blocks, *m.spatial_scale, *m.temporal_scale, *m.aspect] for m in masks],
            "clips_cut_together": masks[0].batch,
            "lr": [optim.lr, optim.lr if optim.decay == "constant" else optim.final_lr],
            "warmup": [optim.warmup_steps, optim.start_lr],
            "weight_decay": [optim.weight_decay] * 2 if optim.final_weight_decay is None else [-1.0, -1.0],
            "ema": [optim.ema] * 2 if optim.final_ema is None else [-1.0, -1.0],
            "loss_exponent": run.objective.loss_exponent,  # pyright: ignore[reportAttributeAccessIssue]
        }
        numbers.update({f"{name}-{key}": np.array(value, dtype=np.float64) for key, value in values.items()})
    return numbers


def _commented_masks(name: str) -> str:
    lines = (Path(__file__).parent.parent / "configs" / f"{name}.yaml").read_text().split("# The published masks")[1]
    return "\n".join(line.removeprefix("# ") for line in lines.splitlines()[1:])


def compare_settings(theirs: Numbers) -> float:
    """Return the number of settings that differ."""
    ours = our_settings()
    assert theirs.keys() == ours.keys()
    wrong = [name for name, value in theirs.items() if not np.array_equal(ours[name], value)]
    for name in wrong:
        print(f"{name}: published {theirs[name].tolist()}, ours {ours[name].tolist()}")
    return float(len(wrong))


COMPARISONS = {
    "reference_masks": (compare_masks, 0.0),
    # Not zero: hidden pixels are left out before the patches are embedded, and tokens are not sorted by place.
    "reference_network": (compare_network, 1e-5),
    "reference_steps": (compare_steps, 1e-4),
    "reference_settings": (compare_settings, 0.0),
}


if __name__ == "__main__":
    main()

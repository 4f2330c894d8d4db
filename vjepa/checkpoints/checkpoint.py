"""What a checkpoint is, and how it is found and restored: it is complete and verified, or it is not there.

    checkpoints/.step_00001000.part/      being written: every rank its slices (DCP), then digests of all files
    checkpoints/step_00001000/            fsynced, then renamed: complete
        .metadata  __0_0.distcp ...       DCP, readable at any number of ranks
        state.json                        step, settings, corpora, and size and xxh3 of every file
    checkpoints/latest                    name of the newest, for people; we look for ourselves

DCP has no checksums (one flipped bit loads without complaint) and saving over an old checkpoint leaves, if it is cut
short, a mixture that looks whole. Hence digests of our own, a fresh folder for every save, and a rename at the end.

In an object store (`checkpoint.folder: s3://...`) every rank writes its slices to a disk of its node and uploads them,
and `state.json` is the last object: without it a `step_*` is no checkpoint. See `place`; who writes is `saver`.
"""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

from vjepa.checkpoints import storage
from vjepa.checkpoints.safe_unpickle import check_metadata
from vjepa.config import Checkpoint
from vjepa.distributed.world import World
from vjepa.methods.base import Networks, named_parameters
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

FORMAT = 1
NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class CheckpointMetadata:
    """What a checkpoint says of itself beside its tensors."""

    step: int
    """Updates made; the next one uses the data of this step."""

    world: int
    """Ranks that wrote it."""

    settings: Mapping[str, Any]
    """The run, resolved."""

    settings_hash: str
    manifests: Sequence[str]
    """Hash of the manifest of each source: which corpora were seen."""

    wandb_id: str | None
    versions: Mapping[str, str]
    passed_over: Sequence[tuple[int, int]] = ()
    """Batches that were never used: from which step on, and how many. See `vjepa.engine.skipped_batches`."""


def checkpoint_dir(run_folder: Path, settings: Checkpoint | None = None) -> Path:
    """Where the checkpoints of a run lie.

    Args:
        run_folder: of the run.
        settings: of the run; by default those in its `config.yaml`.
    """
    written = run_folder / "config.yaml"
    if settings is None and written.is_file():
        settings = Checkpoint.model_validate(yaml.safe_load(written.read_text()).get("checkpoint") or {})
    return storage.to_path(settings.folder) if settings and settings.folder else run_folder / "checkpoints"


def step_dir(home: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be, among those of a run."""
    return home / f"step_{step:08d}"


def collect_tensors(networks: Networks, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return all tensors that a checkpoint stores, by name. With them and the step a run resumes exactly.

    encoder.*  predictor.*  target.*  optimizer.{step,exp_avg,exp_avg_sq}.{encoder,predictor}.*
    """
    state = {
        f"optimizer.{key}.{name}": value
        for name, parameter in named_parameters(networks.trained).items()
        for key, value in optimizer.state[parameter].items()
    }
    return {**{name: p.detach() for name, p in named_parameters(networks.saved).items()}, **state}


def list_checkpoints(home: Path) -> list[Path]:
    """Folders that claim to be complete, oldest first. Whether they are is for `find_corruption` to say.

    Raises:
        BadInput: `home` may not be read.
    """
    try:
        found = [path for path in storage.children(home) if NAME.fullmatch(path.name)]
    except PermissionError as error:
        raise BadInput(f"{home} cannot be read ({error}); see to the rights there, or to the credentials") from None
    if storage.is_remote(home):
        found = [path for path in found if any(one.name == "state.json" for one in storage.children(path))]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    assert match, f"{path} is not the folder of a checkpoint"
    return int(match[1])


def read_metadata(path: Path) -> CheckpointMetadata:
    """What a checkpoint says of itself.

    Raises:
        BadInput: there is no readable `state.json`, or another version of us wrote it.
    """
    try:
        state = json.loads(_read_text(path / "state.json"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is no complete checkpoint ({error}); choose another with `ls {path.parent}`") from None
    if state.get("format") != FORMAT:
        writer = state.get("versions", {}).get("vjepa", "of unknown version")
        raise BadInput(
            f"{path} has checkpoint format {state.get('format')}, this version reads format {FORMAT}; "
            f"it was written with vjepa {writer}: go on with that one, or start another run"
        )
    passed_over = tuple((at, batches) for at, batches in state.get("passed_over", ()))
    known = {name: state[name] for name in CheckpointMetadata.__dataclass_fields__ if name in state}
    return CheckpointMetadata(**{**known, "passed_over": passed_over})


def find_corruption(path: Path, *, only: Sequence[str] | None = None) -> str | None:
    """Say what is wrong with a checkpoint, in one line; None when every byte is what it was.

    Args:
        path: folder of the checkpoint.
        only: names of the files to check; all by default. Ranks share the reading in this way.
    """
    try:
        files = json.loads(_read_text(path / "state.json"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"state.json cannot be read ({type(error).__name__})"
    for name in files if only is None else only:
        wanted, file = files[name], path / name
        try:
            size = storage.with_retries(lambda file=file: file.stat().st_size, file)
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes, not {wanted['bytes']}"
            if storage.with_retries(lambda file=file: digest(file), file) != wanted["xxh3"]:
                return f"{name} has changed since it was written"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def digest(file: Path) -> str:
    """xxh3 of a file, 128 bits, in hex: 10 GB/s and more, so that the disk is the limit."""
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(16 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def find_newest(home: Path, world: World) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; the ranks share the reading.

    Damaged ones that are newer are set aside under another name, since their steps will be made again.

    Returns:
        Its folder, or None when the run has none yet.

    Raises:
        BadInput: there are checkpoints and all are damaged: starting anew would be a silent loss.
    """
    candidates = world.first(lambda: list_checkpoints(home))
    damaged = []
    for path in reversed(candidates):
        try:
            names = sorted(json.loads(_read_text(path / "state.json"))["files"])
        except (OSError, ValueError, KeyError):
            names = []  # `find_corruption` will say it
        wrong = [one for one in world.gather(find_corruption(path, only=names[world.rank :: world.size])) if one]
        if not wrong:
            world.first(lambda: [storage.set_aside(one, name="damaged") for one in damaged])
            return path
        damaged.append(path)
        if world.is_first:
            log.warning("%s is skipped: %s", path, wrong[0])
    if candidates:
        raise BadInput(
            f"none of the {len(candidates)} checkpoints in {home} is intact; "
            f"bring one back, or give another folder with --out to start anew"
        )
    return None


def check_moved(run_folder: Path, home: Path) -> None:
    """Make sure that a run without checkpoints has none elsewhere: starting anew would be a silent loss.

    Raises:
        BadInput: its folder has some, or notes of some, and `home` has none.
    """
    left = sorted((run_folder / "checkpoints").glob("step_*"))
    if left:
        raise BadInput(
            f"{home} holds no checkpoint of this run, but {left[-1]} says that there are some; copy them there, set "
            f"checkpoint.folder back, or give another run folder with --out"
        )


def load_into(tensors: Mapping[str, Tensor], path: Path, world: World) -> None:
    """Fill tensors in place from a checkpoint that any number of ranks wrote.

    Raises:
        BadInput: on every rank, when it holds other tensors.
        OSError: on every rank, when it cannot be read on one.
    """
    check_metadata(path)
    try:
        load(dict(tensors), storage_reader=storage.open_reader(path), process_group=world.storage)
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, OSError):
            raise OSError(f"{path} cannot be read: rank {rank}: {cause}") from error
        raise BadInput(
            f"{path} holds another model than the settings describe ({cause}); give one of this size"
        ) from None


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest intact one of a run.

    Raises:
        BadInput: it means none.
    """
    if NAME.fullmatch(path.name) and path.is_dir():
        return path
    found = latest(checkpoint_dir(path))
    if found is None:
        raise BadInput(
            f"{path} holds no complete checkpoint; give the folder of a run, or one of its step_* folders; a model of "
            "others becomes one by `vjepa import`"
        )
    return found


def latest(home: Path) -> Path | None:
    """The newest intact checkpoint of a run, if there is any."""
    for path in reversed(list_checkpoints(home)):
        wrong = find_corruption(path)
        if not wrong:
            return path
        log.warning("%s is skipped: %s", path, wrong)
    return None


def _read_text(file: Path) -> str:
    return storage.with_retries(file.read_text, file)

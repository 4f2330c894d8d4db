"""The checkpoint format, and how checkpoints are found, verified and restored. A checkpoint is complete or absent.

    checkpoints/.step_00001000.part/      being written: a file of each rank (DCP), then digests of all files
    checkpoints/step_00001000/            fsynced, then renamed: complete
        .metadata  __0_0.distcp ...       DCP, readable at any number of ranks
        state.json                        step, settings, corpora, and size and xxh3 of every file
    checkpoints/latest                    name of the newest, for people only

Each tensor is written by one rank, its owner (`owners`), and older checkpoints hold a slice of it from each rank. Both
are read alike, at any number of ranks.

DCP has no checksums: a flipped bit loads without an error. An interrupted save over an old checkpoint would leave a
mixture that looks complete. Therefore every save has its own digests and a fresh folder, and ends with a rename.

In an object store (`checkpoint.folder: s3://...`) every rank writes its file to a disk of its node and uploads them,
and `state.json` is the last object: without it a `step_*` is not a checkpoint. `storage` defines the places, and
`manager` writes checkpoints.
"""

import json
import logging
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from vjepa.checkpoints import storage
from vjepa.checkpoints.owners import owners_of, spread_owned
from vjepa.checkpoints.safe_unpickle import unpickle_metadata
from vjepa.compat import local
from vjepa.config import Checkpoint
from vjepa.distributed.world import World
from vjepa.methods.base import Networks, named_parameters
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

FORMAT = 1
NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class CheckpointMetadata:
    """Metadata of a checkpoint, stored with its tensors."""

    step: int
    """Updates made. The next update uses the data of this step."""

    world: int
    """Ranks that wrote it."""

    settings: Mapping[str, Any]
    """Resolved settings of the run."""

    settings_hash: str
    manifests: Sequence[str]
    """Hash of the manifest of each source."""

    wandb_id: str | None
    versions: Mapping[str, str]
    passed_over: Sequence[tuple[int, int]] = ()
    """Skipped batches: from which step on, and how many. See `vjepa.engine.skipped_batches`."""

    signals: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Description of each signal that the run reads, by name: the fields of `vjepa_data.signal_spec.SignalSpec`."""


def checkpoint_dir(run_folder: Path, settings: Checkpoint | None = None) -> Path:
    """Return the folder of a run's checkpoints.

    Args:
        run_folder: folder of the run.
        settings: settings of the run, by default from its `config.yaml`.
    """
    written = run_folder / "config.yaml"
    if settings is None and written.is_file():
        settings = Checkpoint.model_validate(yaml.safe_load(written.read_text()).get("checkpoint") or {})
    return storage.to_path(settings.folder) if settings and settings.folder else run_folder / "checkpoints"


def step_dir(home: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
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
    """Return the folders of complete checkpoints, oldest first. `find_corruption` verifies their contents.

    Raises:
        BadInput: the folder cannot be read.
    """
    try:
        found = [path for path in storage.children(home) if NAME.fullmatch(path.name)]
    except PermissionError as error:
        raise BadInput(f"{home} cannot be read ({error}); see to the rights there, or to the credentials") from None
    if storage.is_remote(home):
        found = [path for path in found if any(one.name == "state.json" for one in storage.children(path))]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    assert match, f"{path} is not the folder of a checkpoint"
    return int(match[1])


def read_metadata(path: Path) -> CheckpointMetadata:
    """Read the metadata of a checkpoint.

    Raises:
        BadInput: `state.json` is missing, unreadable or of another version.
    """
    try:
        state = json.loads(_read_text(path / "state.json"))
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path} is not a complete checkpoint ({error}); choose another with `ls {path.parent}`"
        ) from None
    if state.get("format") != FORMAT:
        writer = state.get("versions", {}).get("vjepa", "of unknown version")
        raise BadInput(
            f"{path} has checkpoint format {state.get('format')}, this version reads format {FORMAT}. "
            f"It was written with vjepa {writer}: continue with that version, or start another run."
        )
    passed_over = tuple((at, batches) for at, batches in state.get("passed_over", ()))
    known = {name: state[name] for name in CheckpointMetadata.__dataclass_fields__ if name in state}
    return CheckpointMetadata(**{**known, "passed_over": passed_over})


def find_corruption(path: Path, *, files: Mapping[str, Any] | None = None) -> str | None:
    """Return the fault of a checkpoint in one line, or None if all files match their digests.

    Args:
        path: folder of the checkpoint.
        files: sizes and digests of the files to check, by default of all. Ranks divide the files among themselves.
    """
    try:
        expected = json.loads(_read_text(path / "state.json"))["files"] if files is None else files
    except (OSError, ValueError, KeyError) as error:
        return f"state.json cannot be read ({type(error).__name__})"
    for name, wanted in expected.items():
        file = path / name
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
    """Return the 128-bit xxh3 of a file in hex. It runs at 10 GB/s or more, so the disk is the limit."""
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(16 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


def find_newest(home: Path, world: World) -> Path | None:
    """Return the newest intact checkpoint. The ranks divide the verification.

    Newer corrupted checkpoints are renamed, since their steps will be repeated.

    Returns:
        Its folder, or None if the run has no checkpoint yet.

    Raises:
        BadInput: all checkpoints are corrupted. Restarting from step 0 would lose the run silently.
    """
    candidates = world.first(lambda: list_checkpoints(home))
    damaged = []
    for path in reversed(candidates):
        mine = world.deal(lambda path=path: _share_files(path, world.size))
        wrong = [one for one in world.gather(find_corruption(path, files=mine)) if one]
        if not wrong:
            world.first(lambda: [storage.set_aside(one, name="damaged") for one in damaged])
            return path
        damaged.append(path)
        if world.is_first:
            log.warning("%s is skipped: %s", path, wrong[0])
    if candidates:
        raise BadInput(
            f"none of the {len(candidates)} checkpoints in {home} is intact. "
            f"Restore one of them, or give another folder with --out to start from step 0."
        )
    return None


def _share_files(path: Path, ranks: int) -> list[dict[str, Any] | None]:
    """Return the record of the files that each rank verifies. It is read once, and has a line for each file."""
    try:
        files = sorted(json.loads(_read_text(path / "state.json"))["files"].items())
    except (OSError, ValueError, KeyError, AttributeError):
        return [None] + [{}] * (ranks - 1)  # rank 0 reads it again, and reports
    return [dict(files[rank::ranks]) for rank in range(ranks)]


def check_moved(run_folder: Path, home: Path) -> None:
    """Check that a run without checkpoints has none elsewhere. Restarting from step 0 would lose them silently.

    Raises:
        BadInput: the run folder holds or mentions checkpoints and the configured place has none.
    """
    left = sorted((run_folder / "checkpoints").glob("step_*"))
    if left:
        raise BadInput(
            f"{home} holds no checkpoint of this run, but {left[-1]} says that there are some. Copy them there, set "
            f"checkpoint.folder back, or give another run folder with --out."
        )


def load_into(tensors: Mapping[str, Tensor], path: Path, world: World) -> None:
    """Load a checkpoint written by any number of ranks into tensors, in place.

    Raises:
        BadInput: on every rank, if the checkpoint holds other tensors.
        OSError: on every rank, if any rank cannot read it.
    """
    owners = owners_of(tensors, world.size)
    # An older checkpoint has 100 MB of metadata at 512 ranks.
    metadata = world.deal(lambda: split_metadata(unpickle_metadata(path), owners, world.size))
    mine = [name for name in tensors if owners[name] == world.rank]
    if world.size == 1:
        owned = {name: local(tensors[name]) for name in mine}
    else:
        owned = {name: torch.empty(tensors[name].shape, dtype=tensors[name].dtype) for name in mine}
    failure = None
    try:
        read_tensors(owned, metadata, storage.open_reader(path))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        failure = error
    failures = [(rank, one) for rank, one in enumerate(world.gather(failure)) if one is not None]
    for rank, cause in failures:
        if isinstance(cause, OSError):
            raise OSError(f"{path} cannot be read: rank {rank}: {cause}") from cause
        raise BadInput(
            f"{path} does not hold the model of the settings ({cause}); give a checkpoint of this size"
        ) from None
    if world.size > 1:
        spread_owned(owned, tensors, world)


def split_metadata(metadata: Metadata, owners: Mapping[str, int], ranks: int) -> list[Metadata]:
    """Return for each rank the metadata of the tensors that it owns."""
    parts = [Metadata({}, storage_data={}) for _ in range(ranks)]
    for name, owner in owners.items():
        if name in metadata.state_dict_metadata:
            parts[owner].state_dict_metadata[name] = metadata.state_dict_metadata[name]
    for index, place in metadata.storage_data.items():
        if index.fqn in owners:
            parts[owners[index.fqn]].storage_data[index] = place
    return parts


def read_tensors(tensors: Mapping[str, Tensor], metadata: Metadata, reader: FileSystemReader) -> None:
    """Read whole tensors from the files of a checkpoint, in place, without other ranks.

    These are the steps of DCP's own `load`, which would read the metadata of all tensors again in each call.

    Raises:
        RuntimeError, ValueError: the checkpoint lacks a tensor, or holds it in another size.
        OSError: a file cannot be read.
    """
    planner = DefaultLoadPlanner()
    planner.set_up_planner(dict(tensors), metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    reader.read_data(planner.create_local_plan(), planner).wait()


def resolve(path: Path) -> Path:
    """Return the checkpoint that a path denotes: itself, or the newest intact checkpoint of a run.

    Raises:
        BadInput: there is no checkpoint.
    """
    if NAME.fullmatch(path.name) and path.is_dir():
        return path
    found = latest(checkpoint_dir(path))
    if found is None:
        raise BadInput(
            f"{path} holds no complete checkpoint. Give the folder of a run, or one of its step_* folders. Use "
            "`vjepa import` for a model of another project."
        )
    return found


def latest(home: Path) -> Path | None:
    """Return the newest intact checkpoint of a run, or None."""
    for path in reversed(list_checkpoints(home)):
        wrong = find_corruption(path)
        if not wrong:
            return path
        log.warning("%s is skipped: %s", path, wrong)
    return None


def _read_text(file: Path) -> str:
    return storage.with_retries(file.read_text, file)

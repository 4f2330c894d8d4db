"""Save, find, restore, prune: a checkpoint is complete and verified, or it is not there.

    checkpoints/.step_00001000.part/      being written: every rank its slices (DCP), then digests of all files
    checkpoints/step_00001000/            fsynced, then renamed: complete
        .metadata  __0_0.distcp ...       DCP, readable at any number of ranks
        state.json                        step, settings, corpora, and size and xxh3 of every file
    checkpoints/latest                    name of the newest, for people; we look for ourselves

DCP has no checksums (one flipped bit loads without complaint) and saving over an old checkpoint leaves, if it is cut
short, a mixture that looks whole. Hence digests of our own, a fresh folder for every save, and a rename at the end.
"""

import json
import logging
import os
import re
import shutil
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from vjepa.config import Checkpoint
from vjepa.objective import Models
from vjepa.optimizer import named_parameters
from vjepa.parallel import World
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

FORMAT = 1
NAME = re.compile(r"step_(\d{8,})")
Part = Literal["target", "encoder", "predictor"]


@dataclass(frozen=True)
class Facts:
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


def folder_of(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run_folder / "checkpoints" / f"step_{step:08d}"


def tensors_of(models: Models, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that must survive, by name: with it and the step, a run goes on as if nothing had happened.

    encoder.*  predictor.*  target.*  optimizer.{step,exp_avg,exp_avg_sq}.{encoder,predictor}.*
    """
    state = {
        f"optimizer.{key}.{name}": value
        for name, parameter in named_parameters(models.learning).items()
        for key, value in optimizer.state[parameter].items()
    }
    return {**{name: p.detach() for name, p in named_parameters(models.all).items()}, **state}


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Folders that claim to be complete, oldest first. Whether they are is for `damage` to say."""
    found = [path for path in (run_folder / "checkpoints").glob("step_*") if NAME.fullmatch(path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    assert match, f"{path} is not the folder of a checkpoint"
    return int(match[1])


def read_facts(path: Path) -> Facts:
    """What a checkpoint says of itself.

    Raises:
        BadInput: there is no readable `state.json`, or another version of us wrote it.
    """
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} is no complete checkpoint ({error}); choose another with `ls {path.parent}`") from None
    if state.get("format") != FORMAT:
        raise BadInput(
            f"{path} has checkpoint format {state.get('format')}, this version reads format {FORMAT}; "
            f"it was written with vjepa {state.get('versions', {}).get('vjepa', 'of unknown version')}"
        )
    return Facts(**{name: state[name] for name in Facts.__dataclass_fields__})


def damage(path: Path, *, only: Sequence[str] | None = None) -> str | None:
    """Say what is wrong with a checkpoint, in one line; None when every byte is what it was.

    Args:
        path: folder of the checkpoint.
        only: names of the files to check; all by default. Ranks share the reading in this way.
    """
    try:
        files = json.loads((path / "state.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"state.json cannot be read ({type(error).__name__})"
    for name in files if only is None else only:
        wanted, file = files[name], path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != wanted["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, not {wanted['bytes']}"
        if digest(file) != wanted["xxh3"]:
            return f"{name} has changed since it was written"
    return None


def digest(file: Path) -> str:
    """xxh3 of a file, 128 bits, in hex: 10 GB/s and more, so that the disk is the limit."""
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while chunk := stream.read(16 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()


class Saver:
    """Writes checkpoints of one run, at once or while training goes on, and prunes old ones."""

    def __init__(self, run_folder: Path, settings: Checkpoint, world: World) -> None:
        self.run_folder, self.settings, self.world = run_folder, settings, world
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self.newest = -1
        """Step of the newest complete checkpoint that this attempt wrote or went on from."""
        if world.is_first:
            _sweep(run_folder / "checkpoints")

    def is_due(self, step: int) -> bool:
        """Whether the cadence asks for a checkpoint after so many updates."""
        return step % self.settings.every_steps == 0

    def save(self, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        """Write one checkpoint, all ranks together.

        With `background`, only the copy to the host is waited for; the rest happens in a thread, on a process group of
        its own (on the common one its messages and those of training would take each other's place).

        Args:
            tensors: sharded or replicated, by name. Equal names are taken for replicas: one rank's copy is kept.
            facts: the rest.
        """
        self.wait()
        if facts.step == self.newest:
            return  # stopped at once after a save or a start
        path = folder_of(self.run_folder, facts.step)
        self.newest = facts.step
        part = path.with_name(f".{path.name}.part")
        self.world.first(lambda: _fresh(part))
        if not self.settings.background:
            save(dict(tensors), checkpoint_id=part, process_group=self.world.storage)
            self._commit(part, path, facts)
            return
        done = async_save(dict(tensors), checkpoint_id=part, process_group=self.world.storage)

        def finish() -> None:
            try:
                done.result()  # pyright: ignore[reportAttributeAccessIssue]
                self._commit(part, path, facts)
            except BaseException as error:  # noqa: BLE001  it is raised again where training waits
                self._failure = error

        self._writing = threading.Thread(target=finish, name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete.

        Raises:
            OSError: it could not be written, on any rank.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _commit(self, part: Path, path: Path, facts: Facts) -> None:
        """Digest, list, sync, rename. Until the rename there is no checkpoint; after it, a whole one."""
        rank, size, group = self.world.rank, self.world.size, self.world.storage
        mine = {
            file.name: {"bytes": file.stat().st_size, "xxh3": digest(file)}
            for file in sorted(part.iterdir())
            if file.name.startswith(f"__{rank}_") or (rank == 0 and file.name == ".metadata")
        }
        everyone: list[Any] = [None] * size
        dist.all_gather_object(everyone, mine, group=group)
        if rank == 0:
            files = {name: facts_ for one in everyone for name, facts_ in one.items()}
            unseen = [name for name in files if not (part / name).is_file()]
            if unseen:
                raise OSError(f"{part} lacks {unseen[:3]} that other ranks wrote; it must be on a disk that all share")
            text = json.dumps({"format": FORMAT, **asdict(facts), "files": files}, indent=1)
            _write_synced(part / "state.json", text)
            _sync(part)
            part.rename(path)
            _sync(path.parent)
            _write_synced(path.parent / "latest.part", path.name + "\n")
            os.replace(path.parent / "latest.part", path.parent / "latest")
            log.info("step %d: saved %s", facts.step, path)
            self._prune()
        dist.barrier(group=group)

    def _prune(self) -> None:
        """Delete what retention does not ask for, oldest first; it never leaves fewer than two."""
        every = self.settings.keep_every_steps
        found = list_checkpoints(self.run_folder)
        for path in found[: -self.settings.keep_last]:
            if every and step_of(path) % every == 0:
                continue
            # Out of sight first: a deletion cut short must not leave half a checkpoint under a good name.
            trash = path.with_name(f".{path.name}.trash")
            path.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def find_newest(run_folder: Path, world: World) -> Path | None:
    """The newest checkpoint whose every byte is as it was written; the ranks share the reading.

    Damaged ones that are newer are set aside under another name, since their steps will be made again.

    Returns:
        Its folder, or None when the run has none yet.

    Raises:
        BadInput: there are checkpoints and all are damaged: starting anew would be a silent loss.
    """
    candidates = world.first(lambda: list_checkpoints(run_folder))
    damaged = []
    for path in reversed(candidates):
        try:
            names = sorted(json.loads((path / "state.json").read_text())["files"])
        except (OSError, ValueError, KeyError):
            names = []  # `damage` will say it
        wrong = [one for one in world.gather(damage(path, only=names[world.rank :: world.size])) if one]
        if not wrong:
            world.first(lambda: [one.rename(one.with_name(f"damaged_{one.name}")) for one in damaged])
            return path
        damaged.append(path)
        if world.is_first:
            log.warning("%s is skipped: %s", path, wrong[0])
    if candidates:
        raise BadInput(
            f"none of the {len(candidates)} checkpoints in {run_folder / 'checkpoints'} is intact; "
            f"bring one back, or give another folder with --out to start anew"
        )
    return None


def load_into(tensors: Mapping[str, Tensor], path: Path, world: World) -> None:
    """Fill tensors in place from a checkpoint that any number of ranks wrote."""
    load(dict(tensors), checkpoint_id=path, process_group=world.storage)


def load_weights(path: Path, part: Part = "target") -> dict[str, Tensor]:
    """Read one model from a checkpoint, whole, on the CPU, without any process group.

    Args:
        path: folder of a checkpoint, or of a run (its newest intact one is taken).
        part: which of the three models.

    Returns:
        Tensors in fp32 by their names inside the model.

    Raises:
        BadInput: there is no checkpoint, or it is damaged.
    """
    path = resolve(path)
    wrong = damage(path)
    if wrong:
        raise BadInput(f"{path} is damaged: {wrong}; choose another checkpoint")
    read_facts(path)
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(f"{part}.") and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what we ask for
        load(tensors, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest intact one of a run.

    Raises:
        BadInput: it means none.
    """
    if NAME.fullmatch(path.name) and path.is_dir():
        return path
    found = latest(path / "checkpoints")
    if found is None:
        raise BadInput(f"{path} holds no complete checkpoint; give the folder of a run, or one of its step_* folders")
    return found


def latest(checkpoints: Path) -> Path | None:
    """The newest intact checkpoint in a folder of checkpoints, if there is any."""
    for path in reversed(list_checkpoints(checkpoints.parent)):
        wrong = damage(path)
        if not wrong:
            return path
        log.warning("%s is skipped: %s", path, wrong)
    return None


def _fresh(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _sweep(checkpoints: Path) -> None:
    """Remove what an attempt that was killed left half done."""
    for pattern in (".step_*.part", ".step_*.trash"):
        for path in checkpoints.glob(pattern):
            log.info("removing %s, left unfinished by an earlier attempt", path)
            shutil.rmtree(path, ignore_errors=True)


def _write_synced(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Save, find, restore, prune: a checkpoint is complete and verified, or it is not there.

    checkpoints/.step_00001000.part/      being written: every rank its slices (DCP), then digests of all files
    checkpoints/step_00001000/            fsynced, then renamed: complete
        .metadata  __0_0.distcp ...       DCP, readable at any number of ranks
        state.json                        step, settings, corpora, and size and xxh3 of every file
    checkpoints/latest                    name of the newest, for people; we look for ourselves

DCP has no checksums (one flipped bit loads without complaint) and saving over an old checkpoint leaves, if it is cut
short, a mixture that looks whole. Hence digests of our own, a fresh folder for every save, and a rename at the end.

In an object store (`checkpoint.folder: s3://...`) every rank writes its slices to a disk of its node and uploads them,
and `state.json` is the last object: without it a `step_*` is no checkpoint. See `place`.
"""

import errno
import json
import logging
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
import xxhash
import yaml
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from vjepa.config import Checkpoint
from vjepa.objective import Models
from vjepa.optimizer import named_parameters
from vjepa.parallel import World
from vjepa.run import place
from vjepa.run.metadata import check_metadata
from vjepa_data.corpus.whole import sync_folder
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

T = TypeVar("T")
FORMAT = 1
LITTLE_BYTES = 1 << 20  # a disk with less room has none
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
    passed_over: Sequence[tuple[int, int]] = ()
    """Batches that were never used: from which step on, and how many. See `vjepa.run.passed_over`."""


def home_of(run_folder: Path, settings: Checkpoint | None = None) -> Path:
    """Where the checkpoints of a run lie.

    Args:
        run_folder: of the run.
        settings: of the run; by default those in its `config.yaml`.
    """
    written = run_folder / "config.yaml"
    if settings is None and written.is_file():
        settings = Checkpoint.model_validate(yaml.safe_load(written.read_text()).get("checkpoint") or {})
    return place.path_of(settings.folder) if settings and settings.folder else run_folder / "checkpoints"


def folder_of(home: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be, among those of a run."""
    return home / f"step_{step:08d}"


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


def list_checkpoints(home: Path) -> list[Path]:
    """Folders that claim to be complete, oldest first. Whether they are is for `damage` to say.

    Raises:
        BadInput: `home` may not be read.
    """
    try:
        found = [path for path in place.children(home) if NAME.fullmatch(path.name)]
    except PermissionError as error:
        raise BadInput(f"{home} cannot be read ({error}); see to the rights there, or to the credentials") from None
    if place.is_remote(home):
        found = [path for path in found if any(one.name == "state.json" for one in place.children(path))]
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
    known = {name: state[name] for name in Facts.__dataclass_fields__ if name in state}
    return Facts(**{**known, "passed_over": passed_over})


def damage(path: Path, *, only: Sequence[str] | None = None) -> str | None:
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
            size = place.patiently(lambda file=file: file.stat().st_size, file)
            if size != wanted["bytes"]:
                return f"{name} has {size} bytes, not {wanted['bytes']}"
            if place.patiently(lambda file=file: digest(file), file) != wanted["xxh3"]:
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


class Saver:
    """Writes checkpoints of one run, at once or while training goes on, and prunes old ones."""

    def __init__(
        self,
        run_folder: Path,
        settings: Checkpoint,
        world: World,
        *,
        newest: Path | None = None,
        on_saved: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Make ready to save, and remove what a save that was cut short left.

        Args:
            run_folder: of the run.
            settings: where, how often, what to keep.
            world: the ranks; all must call it.
            newest: the intact checkpoint that this attempt goes on from.
            on_saved: told of every checkpoint when it is complete, by the thread that trains.
        """
        self.settings, self.world = settings, world
        self.home = home_of(run_folder, settings)
        self._notes = run_folder / "checkpoints"
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._newest = step_of(newest) if newest else -1
        """Step of the newest complete checkpoint that this attempt wrote or went on from."""
        self._intact = {newest} if newest else set[Path]()
        """Those that were found intact in this attempt."""
        self._on_saved = on_saved
        world.first(lambda: place.sweep(self.home))

    def is_due(self, step: int) -> bool:
        """Whether the cadence asks for a checkpoint after so many updates."""
        return step % self.settings.every_steps == 0 or step in self.settings.milestones

    def save(self, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        """Write one checkpoint, all ranks together.

        With `background`, only the copy to the host is waited for; the rest happens in a thread, on a process group of
        its own (on the common one its messages and those of training would take each other's place).

        Args:
            tensors: sharded or replicated, by name. Equal names are taken for replicas: one rank's copy is kept.
            facts: the rest.
        """
        self.wait()
        if facts.step == self._newest:
            return  # stopped at once after a save or a start
        path = folder_of(self.home, facts.step)
        self._newest = facts.step
        part = place.stage_of(path, self.world.rank)
        if place.is_remote(path):
            _fresh(part)
            self.world.first(lambda: place.withdraw(path))
        else:
            self.world.first(lambda: _fresh(part))
        if not self.settings.background:
            with _failing_plainly(part):
                save(dict(tensors), checkpoint_id=part, process_group=self.world.storage)
            self._commit(part, path, facts)
            self._on_saved(path)
            return
        done = async_save(dict(tensors), checkpoint_id=part, process_group=self.world.storage)

        def finish() -> None:
            try:
                with _failing_plainly(part):
                    done.result()  # pyright: ignore[reportAttributeAccessIssue]
                self._commit(part, path, facts)
            except BaseException as error:  # noqa: BLE001  it is raised again where training waits
                self._failure = error

        self._writing = threading.Thread(target=finish, name="checkpoint")
        self._writing.start()

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written while training goes on."""
        return self._writing is not None and self._writing.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete.

        Raises:
            OSError: it could not be written, on any rank.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
            if self._failure is None:
                self._on_saved(folder_of(self.home, self._newest))
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _commit(self, part: Path, path: Path, facts: Facts) -> None:
        """Digest, list, sync, rename. Until the rename there is no checkpoint; after it, a whole one."""
        rank = self.world.rank

        def finish_mine() -> dict[str, dict[str, Any]]:
            mine = [file for file in part.iterdir() if file.name.startswith(f"__{rank}_")]
            if rank == 0:
                mine.append(part / ".metadata")
            if place.is_remote(path):
                for file in mine:
                    place.upload(file, path / file.name)
            return {file.name: {"bytes": file.stat().st_size, "xxh3": digest(file)} for file in sorted(mine)}

        files = {name: facts_ for one in self._together(finish_mine) for name, facts_ in one.items()}
        state = json.dumps({"format": FORMAT, **asdict(facts), "files": files}, indent=1)
        self._together(lambda: self._publish(part, path, files, state) if rank == 0 else None)
        if place.is_remote(path):
            shutil.rmtree(part, ignore_errors=True)

    def _publish(self, part: Path, path: Path, files: Mapping[str, Any], state: str) -> None:
        if place.is_remote(path):
            place.patiently(lambda: (path / "state.json").write_text(state), path)
            place.patiently(lambda: (path.parent / "latest").write_text(path.name + "\n"), path)
            self._note(path)
        else:
            unseen = [name for name in files if not (part / name).is_file()]
            if unseen:
                raise OSError(f"{part} lacks {unseen[:3]} that other ranks wrote; it must be on a disk that all share")
            _write_synced(part / "state.json", state)
            sync_folder(part)
            part.rename(path)
            sync_folder(path.parent)
            _write_synced(path.parent / "latest.part", path.name + "\n")
            os.replace(path.parent / "latest.part", path.parent / "latest")
        self._intact.add(path)
        log.info("step %d: saved %s", step_of(path), path)
        self._prune()

    def _note(self, path: Path) -> None:
        """Leave the name of a checkpoint that lies elsewhere, for launchers that look how far a run folder is."""
        self._notes.mkdir(exist_ok=True)
        for old in self._notes.glob("step_*"):
            if old.is_file():
                old.unlink()
        (self._notes / path.name).write_text(f"{path}\n")

    def _together(self, action: Callable[[], T]) -> list[T]:
        """What an action gave on each rank. Its failure on one is one on all: nobody waits for who gave up.

        Raises:
            OSError: on every rank.
        """
        result, failure = None, None
        try:
            result = action()
        except (OSError, BadInput) as error:
            failure = f"rank {self.world.rank}: {error}"
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, (result, failure), group=self.world.storage)
        for _, wrong in everyone:
            if wrong:
                raise OSError(f"the checkpoint could not be written: {wrong}")
        return [one for one, _ in everyone]

    def _prune(self) -> None:
        """Delete what retention does not ask for, oldest first, once two that stay are found intact."""
        every, found = self.settings.keep_every_steps, list_checkpoints(self.home)
        doomed = [
            path
            for path in found[: -self.settings.keep_last]
            if not (every and step_of(path) % every == 0) and step_of(path) not in self.settings.milestones
        ]
        if not doomed:
            return
        intact = 0
        for path in reversed([path for path in found if path not in doomed]):
            if path not in self._intact and (wrong := damage(path)):
                log.warning("%s is damaged: %s", path, wrong)
                continue
            self._intact.add(path)
            intact += 1
            if intact == 2:
                break
        if intact < 2:
            log.warning("%s: no old checkpoint is deleted, since fewer than two newer ones are intact", self.home)
            return
        for path in doomed:
            place.remove(path)


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
            names = []  # `damage` will say it
        wrong = [one for one in world.gather(damage(path, only=names[world.rank :: world.size])) if one]
        if not wrong:
            world.first(lambda: [place.set_aside(one, name="damaged") for one in damaged])
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
        load(dict(tensors), storage_reader=place.reader_of(path), process_group=world.storage)
    except CheckpointException as error:
        rank, cause = _first_failure(error)
        if isinstance(cause, OSError):
            raise OSError(f"{path} cannot be read: rank {rank}: {cause}") from error
        raise BadInput(
            f"{path} holds another model than the settings describe ({cause}); give one of this size"
        ) from None


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
    check_metadata(path)
    reader = place.reader_of(path)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if name.startswith(f"{part}.") and isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what we ask for
        load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items()}


def resolve(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the newest intact one of a run.

    Raises:
        BadInput: it means none.
    """
    if NAME.fullmatch(path.name) and path.is_dir():
        return path
    found = latest(home_of(path))
    if found is None:
        raise BadInput(
            f"{path} holds no complete checkpoint; give the folder of a run, or one of its step_* folders; a model of "
            "others becomes one by `vjepa import`"
        )
    return found


def latest(home: Path) -> Path | None:
    """The newest intact checkpoint of a run, if there is any."""
    for path in reversed(list_checkpoints(home)):
        wrong = damage(path)
        if not wrong:
            return path
        log.warning("%s is skipped: %s", path, wrong)
    return None


@contextmanager
def _failing_plainly(part: Path) -> Iterator[None]:
    """DCP's own exception is no `Exception`, and holds the stacks of all ranks; the first reason says enough.

    Of a full disk torch's writer says no more than `unexpected pos`, so we look ourselves.
    """
    try:
        yield
    except CheckpointException as error:
        rank, cause = _first_failure(error)
        what = f"the checkpoint could not be written: rank {rank}: "
        if shutil.disk_usage(part).free < LITTLE_BYTES:
            raise OSError(errno.ENOSPC, what + os.strerror(errno.ENOSPC), str(part)) from error
        raise OSError(f"{what}{cause}") from error


def _first_failure(error: CheckpointException) -> tuple[int, BaseException]:
    rank, (cause, _) = min(error.failures.items())
    return rank, cause


def _fresh(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _read_text(file: Path) -> str:
    return place.patiently(file.read_text, file)


def _write_synced(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())

"""Writing and pruning the checkpoints of a run, in the foreground or in the background.

    save -> file of every rank -> _commit: digests of all files -> _publish: state.json, sync, rename -> _prune

The format, on disks and in object stores, is described in `checkpoint`.
"""

import errno
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save

from vjepa.checkpoints import storage
from vjepa.checkpoints.checkpoint import (
    FORMAT,
    CheckpointMetadata,
    checkpoint_dir,
    digest,
    find_corruption,
    list_checkpoints,
    step_dir,
    step_of,
)
from vjepa.checkpoints.owners import gather_owned
from vjepa.config import Checkpoint
from vjepa.distributed.world import World
from vjepa_data.atomic import sync_folder
from vjepa_data.settings import BadInput

log = logging.getLogger(__name__)

T = TypeVar("T")
LITTLE_BYTES = 1 << 20  # a disk with less free space counts as full


class CheckpointManager:
    """Writes the checkpoints of a run, in the foreground or in the background, and prunes old ones."""

    def __init__(
        self,
        run_folder: Path,
        settings: Checkpoint,
        world: World,
        *,
        newest: Path | None = None,
        on_saved: Callable[[Path], None] = lambda path: None,
    ) -> None:
        """Prepare to save, and remove the leftovers of an interrupted save.

        Args:
            run_folder: of the run.
            settings: place, cadence and retention.
            world: the ranks, all of which must call this.
            newest: the intact checkpoint from which this attempt resumed.
            on_saved: called with every complete checkpoint, in the training thread.
        """
        self.settings, self.world = settings, world
        self.home = checkpoint_dir(run_folder, settings)
        self._notes = run_folder / "checkpoints"
        self._writing: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._newest = step_of(newest) if newest else -1
        """Step of the newest complete checkpoint that this attempt wrote or resumed from."""
        self._intact = {newest} if newest else set[Path]()
        """Checkpoints that were verified in this attempt."""
        self._on_saved = on_saved
        world.first(lambda: storage.sweep(self.home))

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint is due after `step` updates."""
        return step % self.settings.every_steps == 0 or step in self.settings.milestones

    def save(self, tensors: Mapping[str, Tensor], facts: CheckpointMetadata) -> None:
        """Write a checkpoint on all ranks together.

        With `background`, training waits only for the exchange and the copy to the host. A thread does the rest on its
        own process group, because messages of two threads on the same group would be mixed up.

        Args:
            tensors: sharded or replicated, by name. Equal names are replicas, and the copy of a single rank is kept.
            facts: the metadata.
        """
        self.wait()
        if facts.step == self._newest:
            return  # stopped right after a save or a start
        path = step_dir(self.home, facts.step)
        self._newest = facts.step
        part = storage.staging_folder(path, self.world.rank)
        if storage.is_remote(path):
            _fresh(part)
            self.world.first(lambda: storage.withdraw(path))
        else:
            self.world.first(lambda: _fresh(part))
        owned = gather_owned(tensors, self.world, copy=self.settings.background)

        def write() -> None:
            with _failing_plainly(part):
                save(owned, checkpoint_id=part, process_group=self.world.storage)
            self._commit(part, path, facts)

        if not self.settings.background:
            write()
            self._on_saved(path)
            return

        def finish() -> None:
            try:
                write()
            except BaseException as error:  # noqa: BLE001  it is raised again where training waits
                self._failure = error

        self._writing = threading.Thread(target=finish, name="checkpoint")
        self._writing.start()

    @property
    def is_writing(self) -> bool:
        """Return whether a checkpoint is being written in the background."""
        return self._writing is not None and self._writing.is_alive()

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete.

        Raises:
            OSError: any rank could not write it.
        """
        if self._writing is not None:
            self._writing.join()
            self._writing = None
            if self._failure is None:
                self._on_saved(step_dir(self.home, self._newest))
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _commit(self, part: Path, path: Path, facts: CheckpointMetadata) -> None:
        """Write digests and metadata, sync, and rename. The checkpoint exists from the rename on."""
        rank = self.world.rank

        def finish_mine() -> dict[str, dict[str, Any]]:
            mine = [file for file in part.iterdir() if file.name.startswith(f"__{rank}_")]
            if rank == 0:
                mine.append(part / ".metadata")
            if storage.is_remote(path):
                for file in mine:
                    storage.upload(file, path / file.name)
            return {file.name: {"bytes": file.stat().st_size, "xxh3": digest(file)} for file in sorted(mine)}

        files = {name: facts_ for one in self._together(finish_mine) for name, facts_ in one.items()}
        state = json.dumps({"format": FORMAT, **asdict(facts), "files": files}, indent=1)
        self._together(lambda: self._publish(part, path, files, state) if rank == 0 else None)
        if storage.is_remote(path):
            shutil.rmtree(part, ignore_errors=True)

    def _publish(self, part: Path, path: Path, files: Mapping[str, Any], state: str) -> None:
        if storage.is_remote(path):
            storage.with_retries(lambda: (path / "state.json").write_text(state), path)
            storage.with_retries(lambda: (path.parent / "latest").write_text(path.name + "\n"), path)
            self._note(path)
        else:
            unseen = sorted(files.keys() - {file.name for file in part.iterdir()})
            if unseen:
                raise OSError(f"{part} lacks {unseen[:3]} that other ranks wrote; it must be on a disk that all share")
            _write_synced(part / "state.json", state)
            sync_folder(part)
            part.rename(path)
            sync_folder(path.parent)
            _write_synced(path.parent / "latest.part", path.name + "\n")
            os.replace(path.parent / "latest.part", path.parent / "latest")
            if path.parent.resolve() != self._notes.resolve():
                self._note(path)
        self._intact.add(path)
        log.info("step %d: saved %s", step_of(path), path)
        self._prune()

    def _note(self, path: Path) -> None:
        """Write the name of a checkpoint stored elsewhere to the run folder, where launchers read the progress."""
        self._notes.mkdir(exist_ok=True)
        for old in self._notes.glob("step_*"):
            if old.is_file():
                old.unlink()
        (self._notes / path.name).write_text(f"{path}\n")

    def _together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and gather the results. A failure on any rank raises on all.

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
        """Delete checkpoints outside the retention policy, oldest first, once two of the remaining are verified."""
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
            if path not in self._intact and (wrong := find_corruption(path)):
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
            storage.remove(path)


@contextmanager
def _failing_plainly(part: Path) -> Iterator[None]:
    """Turn DCP's exception into an OSError with the first reason.

    DCP's exception is not an `Exception` and holds the stacks of all ranks. On a full disk torch's writer reports only
    `unexpected pos`, so free space is checked here.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        what = f"the checkpoint could not be written: rank {rank}: "
        if shutil.disk_usage(part).free < LITTLE_BYTES:
            raise OSError(errno.ENOSPC, what + os.strerror(errno.ENOSPC), str(part)) from error
        raise OSError(f"{what}{cause}") from error


def _fresh(part: Path) -> None:
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _write_synced(file: Path, text: str) -> None:
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())

"""Batches of uint8 clips for a rank, from any step on, without end.

The plan names the samples, the pipeline turns them into batches, and a DataLoader spreads the pipeline over processes
and returns the batches in order. The only state to save is the step.
"""

import contextlib
import faulthandler
import functools
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import webdataset as wds
from torch.utils.data import DataLoader

from vjepa_data.child_process import die_with_owner, die_with_parent, ignore_stop_signals, start_fork_server
from vjepa_data.compat import kill_workers_at_shutdown, loader_workers, shut_down_workers
from vjepa_data.decoding.decode_worker_main import keep_memory
from vjepa_data.errors import BadInput
from vjepa_data.reader.batch import Batch, Clips
from vjepa_data.reader.clip_times import EligibleSamples
from vjepa_data.reader.pipeline import BOARD_BYTES, Decode, Gather, Samples, open_plan
from vjepa_data.reader.plan import Plan
from vjepa_data.reader.rejects import RejectLog, TooManyRejects
from vjepa_data.reader.shared_buffers import SharedBuffers
from vjepa_data.settings import Data, Loader
from vjepa_data.watchdog import Alarm, Watchdog

__all__ = ["Batch", "ClipLoader", "Clips", "TooManyRejects", "open_plan"]

log = logging.getLogger(__name__)

RESTARTS = 5  # times that killed workers are replaced before the loader gives up


class ClipLoader:
    """The stream of a rank: an endless iterator of `Batch`, starting at a given step.

        loader = ClipLoader(run.data, run.loader, seed=0, batch_size=256, rank=3, world=8, step=1000)
        for batch in loader: ...      # the batches of steps 1000, 1001, ...

    A killed loader worker is replaced and its steps are made again. The stream does not change.
    """

    def __init__(
        self,
        data: Data,
        loader: Loader,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world: int = 1,
        ranks_here: int = 1,
        step: int = 0,
        folder: Path | None = None,
        stall_s: float = 60.0,
        plan: Plan | None = None,
    ) -> None:
        """Open the corpora and start the workers.

        Args:
            data, loader: the settings.
            seed: seed of the run.
            batch_size: slots of a step, over all ranks.
            rank, world: this rank and the number of ranks, which determine the slots of this rank.
            ranks_here: number of ranks on this machine, which share its memory.
            step: first step to make.
            folder: run folder, for `rejected.jsonl` and `stalls.txt`.
            stall_s: seconds of waiting for a batch after which stacks and keys in flight are written down.
            plan: the plan of these data, seed and batch size, if it exists already.

        Raises:
            BadInput: data or numbers are inconsistent, see `open_plan` and `Plan.slots`.
        """
        self.data, self.settings = data, loader
        self.rank, self.world, self.step = rank, world, step
        self.plan = plan or open_plan(data, seed=seed, batch_size=batch_size, loader=loader)
        self.slots = self.plan.slots(rank, world)
        self.rejects = RejectLog(data.rejects.max_share, folder, rank)
        self._board = torch.zeros(max(1, loader.workers), BOARD_BYTES, dtype=torch.uint8).share_memory_()
        self._check_shared_memory(ranks_here)
        name = "stalls.txt" if rank == 0 else f"stalls-{rank:05d}.txt"
        self._stalls = None if folder is None else str(folder / name)
        self._restarts = 0
        self._batches: Iterator[Batch] = self._open()
        self._watchdog = Watchdog([Alarm(stall_s, self._describe_stall)], name="loader watchdog")

    def __iter__(self) -> "ClipLoader":
        return self

    def __next__(self) -> Batch:
        self._watchdog.beat()
        try:
            batch = self._next()
        finally:
            self._watchdog.rest()
        if batch.stop is not None:
            self.close()
            raise batch.stop
        assert batch.step == self.step, f"the loader gave step {batch.step} instead of {self.step}"
        self.step += 1
        self.rejects.add(batch)
        return batch

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all worker processes."""
        self._watchdog.close()
        self._shut()
        if self._stalls and os.path.exists(self._stalls) and not os.path.getsize(self._stalls):
            os.remove(self._stalls)  # workers open it in advance, in case they must write stacks

    def _next(self) -> Batch:
        while True:
            try:
                return next(self._batches)
            except (RuntimeError, ConnectionError, EOFError) as e:
                if not self._lost_a_worker(e) or self._restarts == RESTARTS:
                    raise
                self._restarts += 1
                why = " ".join(str(e).split()) or type(e).__name__
                log.warning("a loader worker was killed (%s): restarting all workers at step %d", why, self.step)
            self._shut()
            self._batches = self._open()

    def _lost_a_worker(self, error: Exception) -> bool:
        """Return whether a worker was killed. DataLoader says so, except while it takes a batch from the worker."""
        if isinstance(error, RuntimeError):
            return str(error).startswith("DataLoader worker")
        return not all(worker.is_alive() for worker in loader_workers(self._batches))

    def _open(self) -> Iterator[Batch]:
        samples = Samples(self.plan, self.data, rank=self.rank, world=self.world, step=self.step)
        max_in_a_row = self.data.rejects.max_in_a_row
        decode = Decode(samples, loader=self.settings, max_in_a_row=max_in_a_row, board=self._board)
        gather = Gather(samples, crop_on=self.settings.crop_on, buffers=self._shared_buffers())
        pipeline = wds.DataPipeline(samples, decode, gather)  # pyright: ignore[reportAttributeAccessIssue]
        workers = self.settings.workers
        batches = DataLoader(
            pipeline,
            batch_size=None,
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=torch.cuda.is_available(),
            **(self._process_options() if workers else {}),
        )
        with _keep_child_handler():
            iterator: Any = iter(batches)
        if workers:
            kill_workers_at_shutdown(iterator)
        return iterator

    def _process_options(self) -> dict[str, Any]:
        """Return the options of a DataLoader that has worker processes."""
        if self.settings.start_method == "forkserver":
            start_fork_server(["vjepa_data.reader.pipeline"])  # torch is then imported once, not once per worker
        return {
            "multiprocessing_context": multiprocessing.get_context(self.settings.start_method),
            "prefetch_factor": self.settings.prefetch_steps,
            "persistent_workers": True,
            "worker_init_fn": functools.partial(_prepare_worker, os.getpid(), self._stalls),
        }

    def _shut(self) -> None:
        batches = self._batches
        self._batches = iter(())
        shut_down_workers(batches)

    def _shared_buffers(self) -> SharedBuffers | None:
        """Allocate the memory that workers write to: prefetched batches, and a batch per worker for the trainer."""
        settings = self.settings
        if not settings.workers:
            return None
        return SharedBuffers(workers=settings.workers, each=settings.prefetch_steps + 1, size=self._batch_bytes())

    def _batch_bytes(self) -> int:
        """Return the size of the pixels of a batch. With `crop_on: device` that is an upper estimate: whole frames."""
        sources = cast(list[EligibleSamples], self.plan.sources)
        picture = self.data.crop.px**2
        if self.settings.crop_on == "device":
            picture = math.ceil(max(o.index.width.mean() * o.index.height.mean() for o in sources))
        return len(self.slots) * max(o.frames for o in sources) * self.data.clip.sequence * picture * 3

    def _check_shared_memory(self, ranks: int) -> None:
        if not self.settings.workers or not os.path.isdir("/dev/shm"):
            return
        need = self._batch_bytes() * self.settings.workers * (self.settings.prefetch_steps + 1)
        shared = shutil.disk_usage("/dev/shm")
        # Other ranks may have allocated their part already, so the need of all ranks is compared with the total.
        if need > shared.free or need * ranks > shared.total:
            raise BadInput(
                f"{ranks} ranks of {self.settings.workers} workers with {self.settings.prefetch_steps} steps of "
                f"prefetch need {need * ranks / 1e9:.2f} GB of shared memory, {need / 1e9:.2f} each; /dev/shm has "
                f"{shared.total / 1e9:.2f} GB, {shared.free / 1e9:.2f} free. Lower loader.workers or "
                "loader.prefetch_steps, or give the container more (docker run --shm-size)."
            )

    def _describe_stall(self, waited_s: float) -> None:
        at = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in self._board]
        log.error("no batch for %.0f s at step %d; in flight: %s", waited_s, self.step, "; ".join(filter(None, at)))
        with open(self._stalls, "a") if self._stalls else contextlib.nullcontext(sys.stderr) as out:
            heading = f"rank {self.rank}: no batch for {waited_s:.0f} s at step {self.step}; in flight:"
            print(heading, *at, sep="\n", file=out)
            out.flush()
            faulthandler.dump_traceback(out)
        for worker in loader_workers(self._batches):
            if worker.is_alive() and worker.pid is not None:
                os.kill(worker.pid, signal.SIGUSR1)


@contextlib.contextmanager
def _keep_child_handler() -> Iterator[None]:
    """Restore the handler of SIGCHLD that DataLoader replaces.

    DataLoader's handler would raise in the middle of a training step. `next` notices dead workers without it.
    """
    before = signal.getsignal(signal.SIGCHLD)
    yield
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and signal.getsignal(signal.SIGCHLD) is not before:
        signal.signal(signal.SIGCHLD, before)


def _prepare_worker(trainer: int, stalls: str | None, worker: int) -> None:
    """Set up a worker process: it exits with the trainer, ignores stop signals, and dumps its stacks on request."""
    if trainer == os.getppid():
        die_with_parent(trainer)
    else:  # started by the fork server, which lives as long as its last child
        parent = multiprocessing.parent_process()
        assert parent is not None
        die_with_owner(parent.sentinel)
    ignore_stop_signals()
    keep_memory()
    out = open(stalls, "a") if stalls else sys.stderr  # noqa: SIM115  stays open as long as the worker
    faulthandler.register(signal.SIGUSR1, file=out, all_threads=True)


def _unchanged(batch: Any) -> Any:
    return batch

"""Batches of uint8 clips for one rank, from any step on, for ever.

The plan says which samples, `stream` turns them into batches, DataLoader spreads that over processes and hands the
batches out in turn. All that must be saved of it is the step.
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
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, cast

import torch
import webdataset as wds
from torch.utils.data import DataLoader

from vjepa_data.child_process import die_with_owner, die_with_parent, ignore_stop_signals, start_fork_server
from vjepa_data.decoding.decode_worker_main import keep_memory
from vjepa_data.reader.batch import Batch, Clips
from vjepa_data.reader.clip_times import EligibleSamples
from vjepa_data.reader.pipeline import BOARD_BYTES, Decode, Gather, Samples, open_plan
from vjepa_data.reader.plan import Plan
from vjepa_data.reader.rejects import LoaderWatchdog, RejectLog, TooManyRejects
from vjepa_data.reader.shared_buffers import SharedBuffers
from vjepa_data.settings import BadInput, Data, Loader

__all__ = ["Batch", "ClipLoader", "Clips", "TooManyRejects", "open_plan"]

log = logging.getLogger(__name__)

RESTARTS = 5  # times that killed workers are replaced before the loader gives up


class ClipLoader:
    """The stream of one rank: an endless iterator of `Batch`, from a given step on.

        loader = ClipLoader(run.data, run.loader, seed=0, batch_size=256, rank=3, world=8, step=1000)
        for batch in loader: ...      # the batches of steps 1000, 1001, ...

    A worker that is killed is replaced and its steps are made again; the stream does not change.
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
        """Args:
        data, loader: the settings.
        seed: seed of the run.
        batch_size: slots of a step, over all ranks.
        rank, world: which share of the slots is ours.
        ranks_here: how many of them are on this machine and share its memory.
        step: first step to make.
        folder: run folder, for `rejected.jsonl` and `stalls.txt`.
        stall_s: seconds of waiting for a batch after which stacks and keys in flight are written down.
        plan: of these data, seed and batch, where it is laid out already.

        Raises:
            BadInput: data or numbers do not fit; see `open_plan` and `Plan.slots`.
        """
        self.data, self.settings, self.rank, self.world, self.step, self.folder = (
            data,
            loader,
            rank,
            world,
            step,
            folder,
        )
        self.plan = plan or open_plan(data, seed=seed, batch_size=batch_size, loader=loader)
        self.slots = self.plan.slots(rank, world)
        self.rejects = RejectLog(data.rejects.max_share, folder, rank)
        self._board = torch.zeros(max(1, loader.workers), BOARD_BYTES, dtype=torch.uint8).share_memory_()
        self._check_shared_memory(ranks_here)
        self._stalls = (
            None if folder is None else str(folder / ("stalls.txt" if rank == 0 else f"stalls-{rank:05d}.txt"))
        )
        self._restarts = 0
        self._batches: Iterator[Batch] = self._open()
        self._watchdog = LoaderWatchdog(stall_s, self._describe_stall)

    def __iter__(self) -> "ClipLoader":
        return self

    def __next__(self) -> Batch:
        with self._watchdog:
            batch = self._next()
        if batch.stop is not None:
            self.close()
            raise batch.stop
        assert batch.step == self.step, f"the loader gave step {batch.step} in place of {self.step}"
        self.step += 1
        self.rejects.add(batch)
        return batch

    def __enter__(self) -> "ClipLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End workers and servants."""
        self._watchdog.close()
        self._shut()
        if self._stalls and os.path.exists(self._stalls) and not os.path.getsize(self._stalls):
            os.remove(self._stalls)  # workers open it, should they ever have stacks to write

    def _next(self) -> Batch:
        while True:
            try:
                return next(self._batches)
            except (RuntimeError, ConnectionError, EOFError) as e:
                if not self._lost_a_worker(e) or self._restarts == RESTARTS:
                    raise
                self._restarts += 1
                why = " ".join(str(e).split()) or type(e).__name__
                log.warning("a worker is gone (%s): starting the workers again at step %d", why, self.step)
            self._shut()
            self._batches = self._open()

    def _lost_a_worker(self, error: Exception) -> bool:
        """Whether a worker was killed: DataLoader says so, unless it was just taking a batch out of its memory."""
        if isinstance(error, RuntimeError):
            return str(error).startswith("DataLoader worker")
        return not all(worker.is_alive() for worker in getattr(self._batches, "_workers", ()))

    def _open(self) -> Iterator[Batch]:
        samples = Samples(self.plan, self.data.crop, rank=self.rank, world=self.world, step=self.step)
        decode = Decode(
            samples,
            loader=self.settings,
            max_in_a_row=self.data.rejects.max_in_a_row,
            board=self._board,
        )
        gather = Gather(self.slots, self.data.crop.px, crop_on=self.settings.crop_on, blocks=self._blocks())
        pipeline = wds.DataPipeline(samples, decode, gather)  # pyright: ignore[reportAttributeAccessIssue]
        workers = self.settings.workers
        more: dict = {}
        if workers:
            prepare = functools.partial(_prepare_worker, os.getpid(), self._stalls)
            context = multiprocessing.get_context(self.settings.start_method)
            if self.settings.start_method == "forkserver":
                start_fork_server(["vjepa_data.reader.pipeline"])  # torch is then imported once, not per worker
            more = {
                "multiprocessing_context": context,
                "prefetch_factor": self.settings.prefetch_steps,
                "persistent_workers": True,
                "worker_init_fn": prepare,
            }
        pin = torch.cuda.is_available()
        batches = DataLoader(
            pipeline, batch_size=None, num_workers=workers, collate_fn=_as_it_is, pin_memory=pin, **more
        )
        before = signal.getsignal(signal.SIGCHLD)
        iterator: Any = iter(batches)
        if workers:
            iterator._workers_done_event = _Kill(iterator._workers, iterator._workers_done_event)
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGCHLD) is not before:
            # DataLoader's handler would raise in the middle of a training step; next() notices dead workers as well.
            signal.signal(signal.SIGCHLD, before)
        return iterator

    def _shut(self) -> None:
        batches: Any = self._batches
        self._batches = iter(())
        if hasattr(batches, "_workers"):
            batches._shutdown_workers()

    def _blocks(self) -> SharedBuffers | None:
        """Make the memory that workers write to: for each as many batches as it prefetches, and one in the trainer."""
        settings = self.settings
        if not settings.workers:
            return None
        return SharedBuffers(workers=settings.workers, each=settings.prefetch_steps + 1, size=self._batch_bytes())

    def _batch_bytes(self) -> int:
        """Size of a batch; with `crop_on: device` that of whole pictures, of which its boxes are parts."""
        offers = cast(list[EligibleSamples], self.plan.populations)
        picture = self.data.crop.px**2
        if self.settings.crop_on == "device":
            picture = math.ceil(max(o.index.width.mean() * o.index.height.mean() for o in offers))
        return len(self.slots) * max(o.frames for o in offers) * picture * 3

    def _check_shared_memory(self, ranks: int) -> None:
        if not self.settings.workers or not os.path.isdir("/dev/shm"):
            return
        need = self._batch_bytes() * self.settings.workers * (self.settings.prefetch_steps + 1)
        shared = shutil.disk_usage("/dev/shm")
        # What is free says nothing of all ranks together: others may hold their part of it by now.
        if need > shared.free or need * ranks > shared.total:
            raise BadInput(
                f"{ranks} ranks of {self.settings.workers} workers with {self.settings.prefetch_steps} steps of "
                f"prefetch need {need * ranks / 1e9:.2f} GB of shared memory, {need / 1e9:.2f} each; /dev/shm has "
                f"{shared.total / 1e9:.2f} GB, {shared.free / 1e9:.2f} free; lower loader.workers or "
                "loader.prefetch_steps, or give the container more (docker run --shm-size)"
            )

    def _describe_stall(self, waited_s: float) -> None:
        at = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in self._board]
        log.error("no batch for %.0f s at step %d; in flight: %s", waited_s, self.step, "; ".join(filter(None, at)))
        with open(self._stalls, "a") if self._stalls else contextlib.nullcontext(sys.stderr) as out:
            print(
                f"rank {self.rank}: no batch for {waited_s:.0f} s at step {self.step}; in flight:",
                *at,
                sep="\n",
                file=out,
            )
            out.flush()
            faulthandler.dump_traceback(out)
        for worker in getattr(self._batches, "_workers", ()):
            if worker.is_alive():
                os.kill(worker.pid, signal.SIGUSR1)


class _Kill(threading.Event):
    """What DataLoader sets when it wants its workers to end. They are killed, since nothing they hold must be kept.

    Its own event is shared with them: one that was killed with the event's lock in its hand would hang the trainer.
    """

    def __init__(self, workers: list[BaseProcess], shared: Any) -> None:
        super().__init__()
        self._workers = workers
        self._shared = shared  # kept, since workers that are just starting look for it

    def set(self) -> None:
        for worker in self._workers:
            worker.kill()
        super().set()


def _prepare_worker(trainer: int, stalls: str | None, worker: int) -> None:
    """Set up a worker process: it dies with the trainer and leaves signals to it."""
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


def _as_it_is(batch: Any) -> Any:
    return batch

"""What is recorded of a run: a file that is the truth, a terminal, and Weights & Biases when it can be had.

`metrics.jsonl` has a line for every step, with what is a function of the step (losses, rates, gradient norm: equal in a
run that was killed and resumed); every `track.every_steps`, and at a checkpoint, the line also says how fast it went.
Numbers stay on the device until then, so recording never makes it wait. Values that are not finite are written as null.
"""

import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from vjepa.config import Run
from vjepa.distributed.world import World
from vjepa.wandb_client import WandbRun

log = logging.getLogger(__name__)

Record = dict[str, Any]
SHOWN = {"loss/total": "loss", "loss/explained": "explained", "optim/lr": "lr", "speed/clips_per_s": "clips/s"}


class RunLogger:
    """The record of one attempt. Every rank keeps it, rank 0 writes it."""

    def __init__(self, run: Run, folder: Path, world: World, *, step: int, wandb_id: str | None) -> None:
        """Open the record at the step from which the attempt goes on.

        Args:
            run: the run.
            folder: its folder.
            world: this rank.
            step: updates already made; later lines, of an attempt that was killed, are dropped.
            wandb_id: of the run at Weights & Biases, if a checkpoint knows it.
        """
        self.run, self.world = run, world
        self._buffer: list[Mapping[str, Tensor | float | int]] = []
        self._file = self._terminal = self._wandb = None
        self.wandb_id = wandb_id
        if world.is_first:
            self._file = _open_truncated(folder / "metrics.jsonl", step)
            self._terminal = Terminal(run, step)
            if run.track.wandb != "off":
                self.wandb_id = _remembered_id(folder / "wandb" / "id", wandb_id)
                self._wandb = WandbRun(run, folder, self.wandb_id)

    def add(self, step: int, measures: Mapping[str, Tensor | float | int]) -> None:
        """Keep what was measured in a step; nothing is waited for.

        Args:
            step: updates made, this one included.
            measures: numbers, on the device or not, equal on all ranks.
        """
        self._buffer.append({"step": step, "time": time.time(), **measures})

    def amend(self, measures: Mapping[str, Tensor | float | int]) -> None:
        """Add to what was kept of the last step."""
        self._buffer[-1] = {**self._buffer[-1], **measures}

    def is_due(self, step: int) -> bool:
        """Whether lines should be written after so many updates."""
        return step % self.run.track.every_steps == 0 or step == self.run.steps

    @property
    def is_behind(self) -> bool:
        """Whether there are steps whose lines are not written."""
        return bool(self._buffer)

    def write(self, extra: Mapping[str, float]) -> list[Record]:
        """Write the lines of all steps since the last time; waits for the device.

        Args:
            extra: measured over these steps, added to the last line.

        Returns:
            The records, equal on all ranks but for `extra`.
        """
        records = _to_host(self._buffer)
        self._buffer = []
        if not records:
            return []
        records[-1].update(extra)
        if self._file and self._terminal:
            self._file.write("".join(json.dumps(_jsonable(record)) + "\n" for record in records))
            self._file.flush()
            self._terminal.show(records[-1])
            if self._wandb:
                self._wandb.log(records[-1])
        return records

    def show(self, picture: Path, step: int) -> None:
        """Keep a picture where someone may see it."""
        if self._wandb:
            self._wandb.show(picture, step)

    def refer_to(self, checkpoint: Path) -> None:
        """Say that a checkpoint is complete, and where."""
        if self._wandb:
            self._wandb.refer_to(checkpoint)

    def alert(self, title: str, text: str) -> None:
        """Shout, wherever someone may hear it."""
        if self.world.is_first:
            log.warning("%s: %s", title, text)
            if self._wandb:
                self._wandb.alert(title, text)

    def close(self, code: int) -> None:
        """Close all records.

        Args:
            code: exit code of the attempt.
        """
        if self._file:
            self._file.close()
        if self._terminal:
            self._terminal.close()
        if self._wandb:
            self._wandb.close(code)


class Terminal:
    """A bar where someone watches, lines where not."""

    def __init__(self, run: Run, step: int) -> None:
        self._steps = run.steps
        self._progress = None
        if sys.stderr.isatty():
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                transient=False,
            )
            self._task = self._progress.add_task(run.name, total=run.steps, completed=step, numbers="")
            self._progress.start()

    def show(self, record: Record) -> None:
        """The last numbers."""
        numbers = "  ".join(f"{short} {_brief(record[name])}" for name, short in SHOWN.items() if name in record)
        if self._progress:
            self._progress.update(self._task, completed=record["step"], numbers=numbers)
        else:
            log.info("step %d/%d  %s", record["step"], self._steps, numbers)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._progress:
            self._progress.stop()


@contextmanager
def logging_to(file: Path, world: World) -> Iterator[None]:
    """Copy the log of rank 0 to the run folder; other ranks only shout."""
    root, ours = logging.getLogger(), [logging.getLogger(room) for room in ("vjepa", "vjepa_data")]
    levels = [logger.level for logger in ours]
    handler = logging.FileHandler(file) if world.is_first else logging.NullHandler()
    handler.setLevel(logging.INFO)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
    for logger in ours:
        logger.setLevel(logging.INFO if world.is_first else logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, level in zip(ours, levels, strict=True):
            logger.setLevel(level)
        handler.close()


def _open_truncated(file: Path, step: int) -> Any:
    """Open for appending, without the lines of steps that will be made again and without a torn last line."""
    kept = []
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if record["step"] <= step:
                kept.append(line)
    beside = file.with_name(f".{file.name}.part")
    beside.write_text("".join(line + "\n" for line in kept))
    os.replace(beside, file)
    return file.open("a")


def _remembered_id(file: Path, known: str | None) -> str:
    """The run's id at W&B, the same for all attempts."""
    if file.is_file():
        return file.read_text().strip()
    made = known or secrets.token_hex(4)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(made + "\n")
    return made


def _to_host(buffer: list[Mapping[str, Tensor | float | int]]) -> list[Record]:
    """Bring all numbers over, in one copy from each device: with offloaded weights some are on the host already."""
    tensors = [value for measures in buffer for value in measures.values() if isinstance(value, Tensor)]
    numbers: dict[int, float] = {}
    for device in {tensor.device for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.device == device]
        found = torch.stack([tensor.detach().double() for tensor in here]).tolist()
        numbers |= zip(map(id, here), found, strict=True)
    return [
        {name: numbers[id(value)] if isinstance(value, Tensor) else value for name, value in measures.items()}
        for measures in buffer
    ]


def _jsonable(record: Record) -> Record:
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }


def _brief(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""Metrics of a run: `metrics.jsonl`, which is authoritative, the terminal, and Weights & Biases where available.

`metrics.jsonl` has a line for every step with the values that are a function of the step: losses, rates and gradient
norm, equal in a run that was killed and resumed. Every `track.every_steps`, and at a checkpoint, the line also has
speeds. Numbers stay on the device until then, so recording does not synchronise. Non-finite values are written as null.
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
    """Records the metrics of an attempt. Every rank keeps them, and rank 0 writes them."""

    def __init__(self, run: Run, folder: Path, world: World, *, step: int, wandb_id: str | None) -> None:
        """Open the record at the step from which the attempt resumes.

        Args:
            run: the run.
            folder: folder of the run.
            world: this rank.
            step: updates already made. Later lines, from a killed attempt, are dropped.
            wandb_id: id of the run at Weights & Biases, if a checkpoint has it.
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
        """Keep the metrics of a step, without synchronising.

        Args:
            step: updates made, including the last.
            measures: numbers, on the device or on the host, equal on all ranks.
        """
        self._buffer.append({"step": step, "time": time.time(), **measures})

    def amend(self, measures: Mapping[str, Tensor | float | int]) -> None:
        """Add metrics to the last step."""
        self._buffer[-1] = {**self._buffer[-1], **measures}

    def is_due(self, step: int) -> bool:
        """Return whether lines are due after `step` updates."""
        return step % self.run.track.every_steps == 0 or step == self.run.steps

    @property
    def is_behind(self) -> bool:
        """Return whether some steps are not yet written."""
        return bool(self._buffer)

    def write(self, extra: Mapping[str, float]) -> list[Record]:
        """Write the lines of all steps since the last call. Waits for the device.

        Args:
            extra: metrics over these steps, added to the last line.

        Returns:
            The records, equal on all ranks except for `extra`.
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
        """Upload a picture to W&B."""
        if self._wandb:
            self._wandb.show(picture, step)

    def refer_to(self, checkpoint: Path) -> None:
        """Record the place of a complete checkpoint."""
        if self._wandb:
            self._wandb.refer_to(checkpoint)

    def alert(self, title: str, text: str) -> None:
        """Log a warning and send a W&B alert."""
        if self.world.is_first:
            log.warning("%s: %s", title, text)
            if self._wandb:
                self._wandb.alert(title, text)

    def close(self, code: int) -> None:
        """Close all outputs.

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
    """A progress bar on a terminal, log lines elsewhere."""

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
        """Show the last record."""
        numbers = "  ".join(f"{short} {_brief(record[name])}" for name, short in SHOWN.items() if name in record)
        if self._progress:
            self._progress.update(self._task, completed=record["step"], numbers=numbers)
        else:
            log.info("step %d/%d  %s", record["step"], self._steps, numbers)

    def close(self) -> None:
        """Stop the progress bar."""
        if self._progress:
            self._progress.stop()


@contextmanager
def logging_to(file: Path, world: World) -> Iterator[None]:
    """Copy the log of rank 0 to the run folder. Other ranks log warnings only."""
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
    """Open a file for appending, after dropping the lines of steps that will be repeated and a torn last line."""
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
    """Return the W&B id of the run, the same for all attempts."""
    if file.is_file():
        return file.read_text().strip()
    made = known or secrets.token_hex(4)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(made + "\n")
    return made


def _to_host(buffer: list[Mapping[str, Tensor | float | int]]) -> list[Record]:
    """Copy all numbers to the host, with a single copy per device."""
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

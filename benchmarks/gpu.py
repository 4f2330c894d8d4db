"""Check and measure everything on a machine with a GPU, in less than 8 minutes, without a network.

    python benchmarks/gpu.py --out runs/gpu                              one H200
    VJEPA2_REFERENCE=/somewhere python benchmarks/gpu.py --out runs/gpu  V-JEPA 2's own step beside ours
    python benchmarks/gpu.py --out runs/gpu --toy                        the same code at toy sizes, on a CPU
    python benchmarks/gpu.py --out runs/gpu --only "resume" "speed vit_large"

Correctness comes first, then speed, in the order of worth. Each stage is a process of its own, so that a crash, a hang
or an exhausted memory costs one stage. A stage prints a row of numbers as soon as it has it, and the rows are written
to `gpu.json` at once. A stage that exceeds its limit, a signal, or the end of the time leave the rows that exist. The
table (`gpu.md`) is written at the end, and printed. The exit code is 1 if a check failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOTAL_S = 465.0
"""Seconds of the whole script. Eight minutes, less the time in which the last stage is stopped."""

TOY_FACTOR = 5.0
"""Toy sizes may take this many times as long, since a CPU compiles slowly."""

TOO_SHORT = 0.3
"""Share of a stage's limit below which it is not begun."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A process of its own."""

    name: str
    """A function of `gpu_correctness` or `gpu_speed`, and its arguments."""

    limit_s: float
    """Seconds after which it is stopped. The sum exceeds the total: most stages need less."""

    note: str = ""
    """Estimate to print where the stage did not run."""


# The limits are guesses: no stage has been run on a GPU.
STAGES = (
    Stage("machine", 30),
    Stage("numbers", 75),
    Stage("resume", 60),
    Stage("out_of_memory", 40),
    Stage("speed vit_large", 110, "roofline: 303 ms a step of 24 clips (cuDNN's attention), 339 ms (FlashAttention 2)"),
    Stage("speed vit_giant", 90, "at 40 % MFU: 0.80 s a step of 24 clips"),
    Stage("attention", 45, "roofline: 36 ms of a step of ViT-L between cuDNN and FlashAttention 2"),
    Stage("loader vit_large", 60),
    Stage("dynamics", 75, "at 40 % MFU: 26 ms a clip"),
    Stage("speed vit_huge", 75, "at 40 % MFU: 0.53 s a step of 24 clips"),
    Stage("speed vit_base", 45, "at 40 % MFU: 0.13 s a step of 24 clips"),
    Stage("long_clips", 60, "at 40 % MFU: 82 ms a clip"),
    Stage("levjepa", 60, "at 40 % MFU: 2.1 ms a clip"),
)  # fmt: skip

PREPARATION = "corpus"
"""Work of the CPUs alone, done beside the first stages: videos for the stages that read any."""


@dataclass
class Results:
    """Rows that are written as soon as they are known."""

    folder: Path
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        """Add a row and write all."""
        self.rows.append(row)
        print(f"  {text_of(row)}", flush=True)
        self.write()

    def write(self) -> None:
        """Write the rows, replacing the file in one operation."""
        partial = self.folder / "gpu.json.partial"
        partial.write_text(json.dumps(self.rows, indent=1) + "\n")
        partial.replace(self.folder / "gpu.json")

    @property
    def failed(self) -> list[Row]:
        """Rows of checks that failed, and stages that ended with an error."""
        return [row for row in self.rows if row.get("ok") is False]


def main() -> int:
    args = parse()
    if args.child:
        return run_child(args)
    args.out.mkdir(parents=True, exist_ok=True)
    slowness = TOY_FACTOR if args.toy else 1.0
    results, end_s = Results(args.out), time.monotonic() + slowness * args.total_s
    chosen = [stage for stage in STAGES if not args.only or stage.name in args.only]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    preparation = None
    try:
        preparation = begin(child_command(args, PREPARATION), args.out / f"{PREPARATION}.log", pipe=False)
        for stage in chosen:
            left_s = end_s - time.monotonic()
            limit_s = slowness * stage.limit_s
            if left_s < TOO_SHORT * limit_s:
                results.add({"stage": stage.name, "what": "not run: no time left", "estimate": stage.note})
                continue
            print(f"{stage.name} ({left_s:.0f} s left)", flush=True)
            for row in run_stage(child_command(args, stage.name), args.out, stage, min(left_s, limit_s)):
                results.add(row)
    finally:
        if preparation is not None:
            stop(preparation)
        results.write()
        (args.out / "gpu.md").write_text(table(results.rows))
        print(table(results.rows))
    return 1 if results.failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, logs and compiled code")
    parser.add_argument("--toy", action="store_true", help="toy sizes, to test this script on a CPU")
    parser.add_argument("--only", nargs="+", choices=[stage.name for stage in STAGES], help="stages to run")
    parser.add_argument("--total-s", type=float, default=TOTAL_S, help="seconds of all stages (default: %(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    return args


def child_command(args: argparse.Namespace, stage: str) -> list[str]:
    """Return the command of a stage."""
    command = [sys.executable, __file__, "--out", str(args.out), "--child", stage]
    return command + (["--toy"] if args.toy else [])


def run_child(args: argparse.Namespace) -> int:
    """Run a stage in this process, and print each of its rows as a line of JSON."""
    import gpu_correctness
    import gpu_speed

    name, *rest = args.child.split()
    function = getattr(gpu_correctness, name, None) or getattr(gpu_speed, name)
    for row in function(args.out, args.toy, *rest):
        print(json.dumps(row), flush=True)
    return 0


def run_stage(command: Sequence[str], folder: Path, stage: Stage, limit_s: float) -> Iterator[Row]:
    """Run a stage and yield its rows as they appear, then one row if it failed or was stopped."""
    began_s, log = time.monotonic(), folder / f"{stage.name.replace(' ', '_')}.log"
    child = begin(command, log, pipe=True)
    was_late = threading.Event()

    def end() -> None:
        was_late.set()
        stop(child)

    timer = threading.Timer(limit_s, end)
    timer.start()
    try:
        assert child.stdout is not None
        for line in child.stdout:
            with suppress(ValueError):  # a library's own print
                row = json.loads(line)
                if isinstance(row, dict):
                    yield {"stage": stage.name, **row}
        code = child.wait()
    finally:
        timer.cancel()
        stop(child)
    took_s = round(time.monotonic() - began_s, 1)
    if was_late.is_set():
        yield {"stage": stage.name, "what": f"stopped after its {limit_s:.0f} s", "estimate": stage.note}
    elif code:
        yield {"stage": stage.name, "what": f"ended with code {code}: {last_line(log)}", "ok": False}
    else:
        yield {"stage": stage.name, "what": "whole stage", "s": took_s}


def begin(command: Sequence[str], log: Path, *, pipe: bool) -> subprocess.Popen[str]:
    """Start a process in a group of its own, with compiled code kept for the other stages and its errors in a log."""
    caches = {name: str(log.parent / name.lower()) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    with log.open("w") as errors:
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE if pipe else errors,
            stderr=errors,
            text=True,
            env={**os.environ, **caches},
            start_new_session=True,
        )


def stop(child: subprocess.Popen[str]) -> None:
    """End a process with everything that it started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def last_line(log: Path) -> str:
    """Return the last line of a log, which in a traceback is the error."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"


def table(rows: Sequence[Row]) -> str:
    """Return all rows as a table in Markdown."""
    lines = ["| stage | what | numbers | check |", "|---|---|---|---|"]
    for row in rows:
        verdict = {True: "ok", False: "**FAILED**", None: ""}[row.get("ok")]
        lines.append(f"| {row['stage']} | {row.get('what', '')} | {numbers_of(row)} | {verdict} |")
    return "\n".join(lines) + "\n"


def text_of(row: Row) -> str:
    """Return a row as a line."""
    verdict = {True: "ok", False: "FAILED", None: ""}[row.get("ok")]
    return ": ".join(filter(None, (str(row.get("what", "")), numbers_of(row), verdict)))


def numbers_of(row: Mapping[str, Any]) -> str:
    """Return the numbers of a row, with four digits."""
    shown = []
    for name, value in row.items():
        if name in ("stage", "what", "ok") or value in ("", None):
            continue
        if isinstance(value, dict):
            value = " ".join(f"{key} {number:.4g}" for key, number in value.items())
        shown.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(shown).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())

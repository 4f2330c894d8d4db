"""The transcripts of docs/launch.md work with the local executor, where they need no SLURM."""

import time
from pathlib import Path

import pytest
from pages import ROOT, Block, console_commands, run_block

from vjepa_data.synthetic.physics import write_corpus

PAGE = ROOT / "docs" / "launch.md"

pytestmark = pytest.mark.timeout(900)

LOCAL = {
    "vitl16_256px_16f --on h100 --nodes 16": "small.yaml --on local",
    "runs/crash-loop": "runs/small",
    "/data/videos": "videos",
    "--on slurm-cpu --tasks 32": "--on local --tasks 1",
}
NEEDS_SLURM = ("vjepa doctor", "vjepa drill")  # run by tests/slurm/


def run(command: str, folder: Path) -> str:
    return run_block(Block("sh", command, 0), folder, page=PAGE, smaller=LOCAL)


def wait_until_done(folder: Path, *options: str) -> None:
    """Wait for all runs below a folder to end, so that no process is left."""
    end = time.monotonic() + 300
    while " done " not in (listed := run(f"vjepa runs list {' '.join(options)}", folder)):
        assert time.monotonic() < end, listed
        time.sleep(1)


def test_the_transcripts_of_the_launch_page_work_on_one_machine(page_folder: Path) -> None:
    write_corpus(page_folder / "videos", videos=2, seed=0, seconds=1)
    ran = []
    for command in console_commands(PAGE):
        if command.startswith(NEEDS_SLURM):
            continue
        output = run(command, page_folder)
        ran.append(" ".join(command.split()[1:3]))
        if command.startswith("vjepa launch") and "--dry-run" not in command:
            wait_until_done(page_folder)
        if command.startswith("vjepa shard"):
            wait_until_done(page_folder, "--root", "corpora/mine.jobs")
        if command.startswith("vjepa runs show"):
            assert "done" in output
    assert {"runs list", "runs show", "shard /data/videos", "launch vitl16_256px_16f"} <= set(ran)
    assert (page_folder / "corpora/mine/manifest.json").exists()

"""Run the fenced blocks of a documentation page in order, as a reader would, at a size that a test can afford.

`sh` and `python` blocks are run. `text`, `yaml` and unnamed blocks are only shown. A `sh` block is a bash script with
`vjepa` (see `command_server`) and the environment's `python` first on the path. A `python` block is a program.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from command_server import client_folder

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str
    line: int


def read_blocks(page: Path) -> list[Block]:
    """Return every fenced block of a page, with the line of its fence."""
    text = page.read_text()
    return [Block(match[1], match[2], text.count("\n", 0, match.start()) + 1) for match in FENCE.finditer(text)]


def run_page(page: Path, folder: Path, *, smaller: Mapping[str, str] | None = None) -> list[str]:
    """Run the `sh` and `python` blocks of a page in a folder.

    Args:
        page: the Markdown file.
        folder: working directory of every block, with the files that the page assumes.
        smaller: text of the page -> text to run instead, for sizes that a test cannot afford. A text that does not
            occur in the page fails the test, so that no obsolete replacement remains.

    Returns:
        The output of each block that was run.
    """
    blocks = [block for block in read_blocks(page) if block.language in ("sh", "python")]
    assert blocks, f"{page} has no block to run"
    smaller = smaller or {}
    unused = [old for old in smaller if not any(old in block.text for block in blocks)]
    assert not unused, f"{page} no longer contains {unused}"
    return [run_block(block, folder, page=page, smaller=smaller) for block in blocks]


def run_block(block: Block, folder: Path, *, page: Path, smaller: Mapping[str, str]) -> str:
    """Run a block and return its output. A non-zero exit code fails the test with the line of the page."""
    text = block.text
    for old, new in smaller.items():
        text = text.replace(old, new)
    command = ["bash", "-euo", "pipefail", "-c", text] if block.language == "sh" else [sys.executable, "-c", text]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(client_folder()), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "WANDB_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, f"{page.name}:{block.line}: exit code {done.returncode}\n{text}\n{output}"
    return output


def console_commands(page: Path) -> list[str]:
    """Return the commands of the page's transcripts: lines that begin with `$ ` in any fenced block."""
    lines = [line for block in read_blocks(page) for line in block.text.splitlines()]
    return [line[2:].split("  #")[0].strip() for line in lines if line.startswith("$ ")]

"""The code of a run, frozen in its folder: what was launched is what runs, after every restart, whatever is edited.

The three rooms may lie in three places (an editable install) or side by side (a wheel). Frozen, they lie side by side
under RUN/code, exactly as the wheel lays them, and RUN/code comes first on the path of every process. A half-frozen
run, with one room from the copy and another from the live clone, would be two versions in one run, in silence.

The files are copied rather than installed by pip: that would need a build backend, and so a network or luck, on the
login node. A test holds the copy to the content of the wheel.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from vjepa_launch.history import launch_folder, read_json, write_json
from vjepa_launch.settings import BadInput

ROOMS = ("vjepa", "vjepa_data", "vjepa_launch")

LARGEST_FILE_MIB = 10
"""A larger file among the code is a data file that was dropped there; copying it to every run would go unnoticed."""


@dataclass(frozen=True)
class Code:
    """Which code a run consists of."""

    digest: str
    """sha256 over the names and bytes of all files."""
    files: int
    commit: str | None
    """Commit of the clone that it came from, or None outside of one."""
    dirty: bool
    """Whether the clone differed from that commit; the difference is in RUN/launch/code.diff."""
    source: dict[str, str]
    """Room to the folder it was taken from."""


def find_rooms() -> dict[str, Path]:
    """Where each room would be imported from, without importing it."""
    rooms = {}
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        if spec is None or spec.origin is None:
            raise BadInput(f"package {room} cannot be found, so the code cannot be frozen; install vjepa-pretrain")
        rooms[room] = Path(spec.origin).parent
    return rooms


def list_files(rooms: dict[str, Path]) -> dict[str, Path]:
    """Name in the frozen tree (`vjepa/engine/trainer.py`) to the file it is taken from, in order."""
    files = {}
    for room, folder in rooms.items():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                files[f"{room}/{path.relative_to(folder).as_posix()}"] = path
    for path in files.values():
        mib = path.stat().st_size / 2**20
        if mib > LARGEST_FILE_MIB:
            raise BadInput(
                f"{path} is {mib:.0f} MiB, and code is frozen in files of at most {LARGEST_FILE_MIB} MiB; "
                "move it out of the packages"
            )
    return files


def digest_files(files: dict[str, Path]) -> str:
    """sha256 over names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def describe() -> tuple[Code, dict[str, Path], str]:
    """The live code: what it is, its files, and its difference from the commit. Writes nothing."""
    rooms = find_rooms()
    files = list_files(rooms)
    # A virtual environment may lie inside some clone; only files that git knows are of its commit.
    tracked = _git(rooms["vjepa"], "ls-files", "__init__.py").strip()
    commit = _git(rooms["vjepa"], "rev-parse", "HEAD").strip() or None if tracked else None
    diff = ""
    if commit:
        diff = _git(rooms["vjepa"], "diff", "HEAD", "--", *map(str, rooms.values()))
        untracked = _git(rooms["vjepa"], "ls-files", "--others", "--exclude-standard", "--", *map(str, rooms.values()))
        diff += "".join(f"# untracked: {name}\n" for name in untracked.splitlines())
    source = {room: str(folder) for room, folder in rooms.items()}
    return Code(digest_files(files), len(files), commit, bool(diff), source), files, diff


def home(run: Path) -> Path:
    """The folder that holds the frozen code of a run: its own, or that of its sweep."""
    return (run / "code").resolve().parent


def freeze(run: Path) -> Code:
    """Copy the live code into a run folder: complete or absent.

    Returns:
        What was frozen; also written to RUN/launch/code.json, with the difference from the commit in code.diff.
    """
    code, files, diff = describe()
    run.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".code.", dir=run))
    for name, path in files.items():
        target = beside / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    beside.chmod(0o755)
    # Of the copies: a clone may be edited meanwhile.
    code = replace(code, digest=digest_files(list_files({room: beside / room for room in ROOMS})))
    frozen = run / "code"
    if frozen.is_symlink():  # an element of a sweep that gets code of its own
        frozen.unlink()
    elif frozen.exists():
        shutil.rmtree(frozen)
    beside.rename(frozen)
    write_json(launch_folder(run) / "code.json", code.__dict__)
    (launch_folder(run) / "code.diff").write_text(diff)
    return verify(run)


def verify(run: Path) -> Code:
    """Read what was frozen, and check that it still is what is there.

    Raises:
        BadInput: the frozen code is missing, or was changed.
    """
    record = read_json(launch_folder(run) / "code.json")
    frozen = run / "code"
    if record is None or not frozen.is_dir():
        raise BadInput(f"{run} holds no frozen code; launch it with --refreeze to freeze the present one")
    code = Code(**record)
    found = digest_files(list_files({room: frozen / room for room in ROOMS}))
    if found != code.digest:
        raise BadInput(
            f"{frozen} was changed after it was frozen: digest {found[:12]}, expected {code.digest[:12]}; "
            "launch with --refreeze to go on with the present code"
        )
    return code


def _git(folder: Path, *arguments: str) -> str:
    """Output of git about the clone that holds a folder; empty outside of a clone, or without git."""
    if shutil.which("git") is None:
        return ""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, env=environment, check=False
    )
    return done.stdout if done.returncode == 0 else ""

"""Freeze the code of a run in its folder, so that every restart runs the code that was launched.

The three packages may lie in three places (an editable install) or side by side (a wheel). Frozen, they lie side by
side under RUN/code, exactly as in the wheel, and RUN/code comes first on the path of every process. Freezing only some
of the packages would silently mix two versions in a run.

The files are copied, not installed with pip, which would need a build backend and perhaps a network on the login node.
A test compares the copy with the content of the wheel.
"""

import compileall
import hashlib
import importlib.util
import os
import shutil
import socket
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vjepa_launch.atomic import read_json, write_json
from vjepa_launch.history import launch_folder
from vjepa_launch.settings import BadLaunch

PACKAGES = ("vjepa", "vjepa_data", "vjepa_launch")

LARGEST_FILE_MIB = 10
"""A larger file in a package is a stray data file. Copying it into every run would go unnoticed."""


@dataclass(frozen=True)
class CodeSnapshot:
    """The identity of the code of a run."""

    digest: str
    """sha256 over the names and contents of all files."""
    files: int
    commit: str | None
    """Commit of the clone that the code came from. None if it was not in a clone."""
    dirty: bool
    """True if the clone had uncommitted changes, which are stored in RUN/launch/code.diff."""
    source: dict[str, str]
    """The folder that each package was copied from."""


def find_packages() -> dict[str, Path]:
    """Return the folder that each package would be imported from, without importing it."""
    folders = {}
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise BadLaunch(f"cannot freeze the code: package {package} was not found; install vjepa-pretrain")
        folders[package] = Path(spec.origin).parent
    return folders


def list_files(packages: dict[str, Path]) -> dict[str, Path]:
    """Map each name in the frozen tree (`vjepa/engine/trainer.py`) to its source file, in order.

    Raises:
        BadLaunch: a file is too large to be code.
    """
    files = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
                files[f"{package}/{path.relative_to(folder).as_posix()}"] = path
    for path in files.values():
        mib = path.stat().st_size / 2**20
        if mib > LARGEST_FILE_MIB:
            raise BadLaunch(
                f"cannot freeze the code: {path} is {mib:.0f} MiB, and the limit for a file is {LARGEST_FILE_MIB} MiB. "
                "Move it out of the packages."
            )
    return files


def digest_files(files: dict[str, Path]) -> str:
    """Return the sha256 over the names and contents of files."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def describe() -> tuple[CodeSnapshot, dict[str, Path], str]:
    """Return the identity of the installed code, its files, and its difference from the commit. Writes nothing."""
    packages = find_packages()
    files = list_files(packages)
    # A virtual environment may lie inside an unrelated clone, so the commit counts only if git tracks the files.
    tracked = _git(packages["vjepa"], "ls-files", "__init__.py").strip()
    commit = _git(packages["vjepa"], "rev-parse", "HEAD").strip() or None if tracked else None
    diff = ""
    if commit:
        folders = [str(folder) for folder in packages.values()]
        diff = _git(packages["vjepa"], "diff", "HEAD", "--", *folders)
        untracked = _git(packages["vjepa"], "ls-files", "--others", "--exclude-standard", "--", *folders)
        diff += "".join(f"# untracked: {name}\n" for name in untracked.splitlines())
    source = {package: str(folder) for package, folder in packages.items()}
    return CodeSnapshot(digest_files(files), len(files), commit, bool(diff), source), files, diff


def code_owner(run: Path) -> Path:
    """Return the folder that holds the frozen code of a run: the run folder, or the folder of its sweep."""
    return (run / "code").resolve().parent


def freeze(run: Path) -> CodeSnapshot:
    """Copy the installed code to RUN/code, which is complete or absent at any time.

    Returns:
        The snapshot. It is also written to RUN/launch/code.json, and the difference from the commit to code.diff.
    """
    code, files, diff = describe()
    run.mkdir(parents=True, exist_ok=True)
    temporary = run / f".code.{socket.gethostname()}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, path in files.items():
        target = temporary / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy_module(path, target)
    # Digest the copies, because the clone may have been edited in the meantime.
    code = replace(code, digest=digest_files(list_files({package: temporary / package for package in PACKAGES})))
    frozen = run / "code"
    if frozen.is_symlink():  # an element of a sweep gets its own code
        frozen.unlink()
    elif frozen.exists():
        shutil.rmtree(frozen)
    temporary.rename(frozen)
    write_json(launch_folder(run) / "code.json", asdict(code))
    (launch_folder(run) / "code.diff").write_text(diff)
    return verify(run)


def _copy_module(source: Path, target: Path) -> None:
    """Copy a file, and the bytecode of a module.

    Otherwise some twenty processes of every rank would compile each module, and write it to the shared disk. Python
    accepts bytecode for a source of the same time and size.
    """
    before = source.stat()
    shutil.copyfile(source, target)
    if source.suffix != ".py":
        return
    compiled, made = (Path(importlib.util.cache_from_source(str(path))) for path in (target, source))
    after = source.stat()
    if made.is_file() and (before.st_mtime_ns, before.st_size) == (after.st_mtime_ns, after.st_size):
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
        compiled.parent.mkdir(exist_ok=True)
        shutil.copyfile(made, compiled)
    compileall.compile_file(target, quiet=2)  # unless the bytecode is up to date


def verify(run: Path) -> CodeSnapshot:
    """Read the snapshot of a run and check that the frozen code still matches it.

    Raises:
        BadLaunch: the frozen code is missing or was changed.
    """
    record = read_json(launch_folder(run) / "code.json")
    frozen = run / "code"
    if record is None or not frozen.is_dir():
        raise BadLaunch(f"{run} has no frozen code; launch with --refreeze to freeze the current code")
    code = CodeSnapshot(**record)
    found = digest_files(list_files({package: frozen / package for package in PACKAGES}))
    if found != code.digest:
        raise BadLaunch(
            f"{frozen} was changed after it was frozen: digest {found[:12]}, expected {code.digest[:12]}. "
            "Launch with --refreeze to continue with the current code."
        )
    return code


def check_running(code: Path) -> None:
    """Check that this process imports our packages from the frozen code.

    Raises:
        BadLaunch: another copy comes first on the path.
    """
    for package, folder in find_packages().items():
        if folder.resolve() != (code / package).resolve():
            raise BadLaunch(
                f"{package} is imported from {folder} and not from the frozen code in {code}. Remove the entry that "
                "puts it first on the path (PYTHONPATH, a .pth file, the profile's setup or python)."
            )


def _git(folder: Path, *arguments: str) -> str:
    """Return the output of git for the clone that holds a folder, or "" outside a clone or without git."""
    if shutil.which("git") is None:
        return ""
    # GIT_DIR and its kin, which git sets in hooks, would point to another clone.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment = {**inherited, "GIT_OPTIONAL_LOCKS": "0"}
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
        check=False,
    )
    return done.stdout if done.returncode == 0 else ""

"""The frozen code of a run equals the code of the wheel, and does not change."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from vjepa_launch import snapshot
from vjepa_launch.process_info import code_environment
from vjepa_launch.settings import BadLaunch

ROOT = Path(__file__).parents[2]


def test_the_frozen_code_equals_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    snapshot.freeze(tmp_path / "run")
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        # The wheel also has the configs and clusters, which lie outside the packages in a clone.
        code = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith(".yaml")}
    code = {name: content for name, content in code.items() if ".dist-info/" not in name}
    frozen = tmp_path / "run" / "code"
    files = [path for path in frozen.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {str(path.relative_to(frozen)): path.read_bytes() for path in files} == code
    assert "vjepa_launch/srun_shield.sh" in code


def test_frozen_code_comes_first_even_inside_the_clone(tmp_path: Path) -> None:
    snapshot.freeze(tmp_path)
    program = (
        "import vjepa, vjepa_data, vjepa_launch; print(vjepa.__file__, vjepa_data.__file__, vjepa_launch.__file__)"
    )
    environment = {**os.environ, **code_environment(tmp_path / "code", os.environ)}
    for folder in (ROOT, ROOT / "launch"):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
        )
        assert all(Path(file).is_relative_to(tmp_path / "code") for file in done.stdout.split())


def test_frozen_modules_are_compiled_once_for_all_ranks(tmp_path: Path) -> None:
    snapshot.freeze(tmp_path)
    frozen = tmp_path / "code"
    seen = {path: path.stat().st_mtime_ns for path in frozen.rglob("*.pyc")}
    assert len(seen) == len(list(frozen.rglob("*.py")))
    environment = {**os.environ, **code_environment(frozen, os.environ)}
    program = "import vjepa.config, vjepa_launch.job; print(vjepa.config.load.__code__.co_filename)"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(frozen))
    assert {path: path.stat().st_mtime_ns for path in frozen.rglob("*.pyc")} == seen


def test_changed_or_missing_frozen_code_is_rejected(tmp_path: Path) -> None:
    frozen = snapshot.freeze(tmp_path)
    assert snapshot.verify(tmp_path) == frozen
    with (tmp_path / "code" / "vjepa" / "config.py").open("a") as file:
        file.write("\n")
    with pytest.raises(BadLaunch, match="was changed after it was frozen"):
        snapshot.verify(tmp_path)
    assert snapshot.freeze(tmp_path).digest == frozen.digest  # as --refreeze does
    (tmp_path / "launch" / "code.json").unlink()
    with pytest.raises(BadLaunch, match="has no frozen code"):
        snapshot.verify(tmp_path)


def test_a_clone_may_be_edited_while_it_is_frozen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = shutil.copyfile

    def edit(source: Path, target: Path) -> None:
        copy(source, target)
        if source.name == "config.py":
            with target.open("a") as file:  # as if it had been saved just before
                file.write("# edited\n")

    monkeypatch.setattr(shutil, "copyfile", edit)
    assert snapshot.freeze(tmp_path) == snapshot.verify(tmp_path)


def test_bytecode_files_do_not_change_the_digest(tmp_path: Path) -> None:
    frozen = snapshot.freeze(tmp_path)
    (tmp_path / "code" / "vjepa" / "__pycache__").mkdir(exist_ok=True)
    (tmp_path / "code" / "vjepa" / "__pycache__" / "config.cpython-311.pyc").write_bytes(b"cache")
    assert snapshot.verify(tmp_path) == frozen


def test_a_large_file_in_a_package_is_rejected(tmp_path: Path) -> None:
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate((snapshot.LARGEST_FILE_MIB + 1) * 2**20)
    with pytest.raises(BadLaunch, match=r"weights.bin is 11 MiB"):
        snapshot.list_files({"vjepa": tmp_path})

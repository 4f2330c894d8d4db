"""The content of the wheel, and the imports of the three packages."""

import ast
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Build a wheel through the source distribution and return the names inside it."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return ZipFile(next(out.glob("*.whl"))).namelist()


def test_the_wheel_adds_three_names(wheel: list[str]) -> None:
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {
        "vjepa",
        "vjepa_data",
        "vjepa_launch",
    }


def test_the_wheel_has_every_module_config_and_cluster(wheel: list[str]) -> None:
    modules = [
        path for room in ("vjepa", "data/vjepa_data", "launch/vjepa_launch") for path in (ROOT / room).rglob("*.py")
    ]
    expected = {str(path.relative_to(ROOT)).removeprefix("data/").removeprefix("launch/") for path in modules}
    expected |= {f"vjepa/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    expected |= {f"vjepa_launch/clusters/{path.name}" for path in (ROOT / "launch/clusters").glob("*.yaml")}
    assert expected <= set(wheel)


def test_settings_and_the_command_line_never_import_torch() -> None:
    code = """
import importlib, sys, vjepa.cli, vjepa.config, vjepa_launch.settings
for name in vjepa.cli.VERB_FILES:
    importlib.import_module(f"vjepa.cli.{name}")
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_main_dependencies_are_imported() -> None:
    imported: set[str] = set()
    for room in ("vjepa", "data", "launch"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {name.name.split(".")[0] for name in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    imported.add(node.module.split(".")[0])
                elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
                    imported |= {str(word.value).split(".")[0] for word in node.args if isinstance(word, ast.Constant)}
    assert {"torch", "cyclopts", "decord", "webdataset", "submitit", "wandb", "xformers"} <= imported

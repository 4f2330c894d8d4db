"""Dry runs, the shipped profiles, and requests that are rejected before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from vjepa_launch import submit
from vjepa_launch.request import Request, train_command, with_nodes
from vjepa_launch.settings import BadLaunch, Cluster

CLUSTERS = Path(__file__).parents[2] / "launch" / "clusters"
CONFIG = "name: tiny\nsteps: 10\n"


def read(name: str) -> Cluster:
    return Cluster.model_validate(yaml.safe_load((CLUSTERS / f"{name}.yaml").read_text()))


def describe(run: Path, cluster: Cluster, *, nodes: int | None = None) -> str:
    cluster = with_nodes(cluster, nodes)
    return submit.describe(Request(run, cluster, train_command(run), config=CONFIG, name="tiny"))


@pytest.mark.parametrize("path", sorted(CLUSTERS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_profile_gives_a_dry_run(path: Path, tmp_path: Path) -> None:
    text = describe(tmp_path / "run", read(path.stem))
    assert "vjepa/engine/trainer.py" in text or "vjepa/config.py" in text
    assert path.read_text().startswith("# ")


def test_a_dry_run_shows_the_whole_request_and_writes_nothing(tmp_path: Path) -> None:
    text = describe(tmp_path / "run", read("h100"), nodes=16)
    for line in (
        "#SBATCH --nodes=16",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --partition=h100",
        "#SBATCH --signal=USR2@600",
        "#SBATCH --requeue",
        "#SBATCH --exclusive",
        "#SBATCH --mem=0",
        "--kill-on-bad-exit=1",
        "NCCL_IB_HCA=mlx5",
        "PYTHONSAFEPATH=1",
        f'export PYTHONPATH={tmp_path}/run/code"${{PYTHONPATH:+:$PYTHONPATH}}"',
        f"vjepa_launch.finish_attempt {tmp_path}/run/launch",
        f"python -m vjepa train {tmp_path}/run/config.yaml --out {tmp_path}/run",
        "# Command of each of 128 ranks",
        "steps: 10",
        "vjepa_launch/submit.py",
    ):
        assert line in text, line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("before", "after"), [("", ""), ("/mine", ":/mine")])
def test_frozen_code_comes_first_for_any_folder_name(tmp_path: Path, before: str, after: str) -> None:
    run = tmp_path / "a $HOME `b`"
    (line,) = [line for line in describe(run, read("slurm")).splitlines() if line.startswith("export PYTHONPATH=")]
    script = f'{line}; printf %s "$PYTHONPATH"'
    done = subprocess.run(["sh", "-c", script], env={"PYTHONPATH": before}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{run}/code{after}"


def test_a_container_wraps_the_ranks_but_not_finish_attempt(tmp_path: Path) -> None:
    lines = describe(tmp_path / "run", read("h200")).splitlines()
    step = next(line for line in lines if line.startswith("srun --"))
    assert "--container-image=/shared/images/vjepa-pretrain.sqsh" in step
    assert "--container-mounts=/shared:/shared" in step
    assert " python3 -u -m submitit" in step
    assert any(line.startswith(f"{sys.executable} -m vjepa_launch.finish_attempt") for line in lines)


def test_apptainer_runs_the_interpreter_of_its_image(tmp_path: Path) -> None:
    cluster = read("h200").model_copy(update={"container_runtime": "apptainer", "container_image": "/i/v.sif"})
    step = next(line for line in describe(tmp_path / "run", cluster).splitlines() if line.startswith("srun --"))
    assert "apptainer exec --nv --bind /shared:/shared /i/v.sif python3 -u -m submitit" in step
    assert "--container-" not in step


def test_a_dry_run_needs_neither_slurm_nor_torch(tmp_path: Path) -> None:
    program = f"""
import sys, yaml
sys.modules["torch"] = None
from pathlib import Path
from vjepa_launch import submit
from vjepa_launch.request import Request
from vjepa_launch.settings import Cluster
cluster = Cluster.model_validate(yaml.safe_load(Path({str(CLUSTERS / "slurm.yaml")!r}).read_text()))
print(submit.describe(Request(Path("run").resolve(), cluster, ["python"], config="", name="tiny")))
"""
    environment = {"PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "#!/bin/bash" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_the_dry_run_command_needs_neither_slurm_nor_torch(tmp_path: Path) -> None:
    program = """
import sys
sys.modules["torch"] = None
from vjepa.cli import main
sys.exit(main(["launch", "vitl16_256px_16f", "--on", "h100", "--nodes", "16", "--dry-run"]))
"""
    environment = {"PATH": "/nowhere"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Command of each of 128 ranks" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_failed_submission_is_an_error_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(BadLaunch, match=r"the job was not submitted: .*srun"):
        submit.launch(Request(tmp_path / "run", read("slurm"), ["python"], config=CONFIG, name="tiny"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"executor": "slrum"}, "executor"),
        ({"executor": "slurm", "nodse": 2}, "nodse"),
        ({"executor": "local", "nodes": 2}, "must be 1 on this machine"),
        ({"executor": "slurm", "hours": 0.1, "notice_s": 600}, "must be shorter than hours"),
        ({"executor": "slurm", "container_mounts": ["/a:/a"]}, "requires container_image"),
    ],
)
def test_an_inconsistent_profile_is_rejected(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Cluster.model_validate(values)


def test_more_than_one_node_on_this_machine_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(BadLaunch, match="--nodes 2: must be 1 on this machine"):
        describe(tmp_path / "run", read("local"), nodes=2)

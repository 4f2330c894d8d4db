"""Variables of the user's shell, and settings of a profile that would undo ours."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from vjepa_launch import notes, slurm
from vjepa_launch.process_info import code_environment, common_environment
from vjepa_launch.request import Request, slurm_parameters
from vjepa_launch.settings import Cluster

PROFILE = Cluster(executor="slurm", cpus_per_task=2, hours=10)


def parameters(cluster: Cluster) -> dict[str, Any]:
    return slurm_parameters(Path("/run"), Request(Path("/run"), cluster, ["python"], config="", name="x"))


def test_system_commands_do_not_see_preferences(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "SQUEUE_STATES",
        "SQUEUE_FORMAT",
        "SCANCEL_STATE",
        "SINFO_PARTITION",
        "SLURM_CLUSTERS",
        "SBATCH_EXPORT",
    ):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    seen = {line.partition("=")[0]: line.partition("=")[2] for line in slurm.run_command("env").splitlines()}
    assert {name for name in seen if name.startswith(slurm.PREFERENCES)} == {"SLURM_CONF"}
    assert seen["PATH"] == os.environ["PATH"]


def test_every_rank_gets_the_cores_and_variables_of_the_job() -> None:
    found = parameters(PROFILE)
    assert "--export=ALL" in found["srun_args"]
    assert any("SRUN_CPUS_PER_TASK" in line for line in found["setup"])
    assert found["wckey"] is None  # submitit would send its own


def test_compiled_kernels_stay_on_the_node() -> None:
    first, again, other = (common_environment(Path("/shared/run"), cores=12), common_environment(Path("/shared/run")),
                           common_environment(Path("/shared/other")))  # fmt: skip
    cache = first["TORCHINDUCTOR_CACHE_DIR"]
    assert cache.startswith(tempfile.gettempdir())
    assert again["TORCHINDUCTOR_CACHE_DIR"] == cache != other["TORCHINDUCTOR_CACHE_DIR"]
    assert first["TORCHINDUCTOR_COMPILE_THREADS"] == "12"
    assert "TORCHINDUCTOR_COMPILE_THREADS" not in again


def test_frozen_code_comes_before_the_paths_of_the_profile() -> None:
    found = code_environment(Path("/run/code"), {"PYTHONPATH": ":/live::/run/code:/other"})
    assert found["PYTHONPATH"] == "/run/code:/live:/other"
    assert found["VJEPA_CODE"] == "/run/code"


@pytest.mark.parametrize("option", ["output", "clusters", "array", "test_only"])
def test_a_profile_cannot_redirect_what_the_launcher_needs(option: str) -> None:
    with pytest.raises(ValidationError, match=f"sbatch cannot set {option}: "):
        Cluster(executor="slurm", sbatch={option: "x"})


def test_ignored_variables_and_short_limits_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert notes.on_launch(PROFILE) == []
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("PYTHONPATH", "/live")
    ignored, path, limit = notes.on_launch(PROFILE.model_copy(update={"hours": 0.03, "notice_s": 105}))
    assert ignored == "SBATCH_ACCOUNT of this shell is ignored; the profile decides"
    assert "PYTHONPATH of this shell (/live) comes after the frozen code" in path
    assert limit.startswith("the time limit is 2 min")

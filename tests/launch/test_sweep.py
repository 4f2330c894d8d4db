"""Sweeps: the expansion of a file, and arrays of runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from vjepa_launch import array, job_control, snapshot, status, submit, sweep
from vjepa_launch.array import Array, Element
from vjepa_launch.atomic import write_json
from vjepa_launch.drill.drill_run import DrillRun
from vjepa_launch.settings import BadLaunch, Cluster
from vjepa_launch.sweep import Sweep


def array_of(folder: Path, cluster: Cluster, at_once: int) -> Array:
    """Return an array of three short runs."""
    elements = [
        Element(
            name,
            tuple(DrillRun(folder / name, "--steps", "20", "--step-s", "0.01").command),
            f"name: tiny-{name}\nsteps: 20\n",
        )
        for name in ("000", "001", "002")
    ]
    return Array(folder, cluster, elements, name="lr", at_once=at_once)


def test_elements_come_after_all_combinations_of_the_grid() -> None:
    text = "{name: lr, config: demo, grid: {optim.lr: [1e-4, 0.0003], seed: [0, 1]}, elements: [{steps: 5}]}"
    elements = sweep.expand(Sweep.model_validate(yaml.safe_load(text)))
    assert len(elements) == 5
    assert elements[3].overrides == ("name=lr-003", "optim.lr=0.0003", "seed=1")
    assert elements[3].name == "003-optim.lr-0.0003-seed-1"
    assert elements[4].overrides == ("name=lr-004", "steps=5")


def test_overrides_keep_lists_and_mappings() -> None:
    values = {"name": "x", "config": "demo", "elements": [{"data.sources": [{"path": "a b"}], "model.rope": "tiled"}]}
    (element,) = sweep.expand(Sweep.model_validate(values))
    name, _, text = element.overrides[1].partition("=")
    assert (name, yaml.safe_load(text)) == ("data.sources", [{"path": "a b"}])
    assert element.overrides[2] == "model.rope=tiled"


@pytest.mark.parametrize("values", [{}, {"grid": {"seed": list(range(1001))}}, {"gird": {"seed": [1]}}])
def test_an_empty_or_too_large_sweep_is_rejected(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Sweep.model_validate({"name": "x", "config": "demo", **values})


def test_the_dry_run_of_an_array_writes_nothing(tmp_path: Path) -> None:
    cluster = Cluster(executor="slurm", nodes=2, gpus_per_node=8)
    text = array.describe(array_of(tmp_path / "sweep", cluster, at_once=2))
    assert "#SBATCH --array=0-2%2" in text
    assert "%A_%a_%t_log.out" in text
    assert "name: tiny-000" in text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def launch_sweep(tmp_path: Path) -> Iterator[Callable[..., list[submit.Launched]]]:
    launched: list[submit.Launched] = []

    def start(at_once: int = 3) -> list[submit.Launched]:
        new = array.launch(array_of(tmp_path / "sweep", Cluster(executor="local"), at_once))
        launched.extend(new)
        return new

    yield start
    for job in launched:
        if job_control.is_alive("local", job.job):
            job_control.cancel("local", job.job)


def wait(launched: list[submit.Launched]) -> None:
    for job in launched:
        list(status.read_log(job.run, follow=True))


def test_a_second_launch_starts_only_unfinished_elements(
    launch_sweep: Callable[..., list[submit.Launched]], tmp_path: Path
) -> None:
    write_json(tmp_path / "sweep" / "001" / "fault.json", {"rank": 0, "step": 5, "restarts": 1, "do": "2"})
    first = launch_sweep()
    assert [job.run.name for job in first] == ["000", "001", "002"]
    wait(first)
    statuses, _ = status.read_all(status.find_runs(tmp_path))
    assert [(run.name, run.state) for run in statuses] == [("000", "done"), ("001", "refused"), ("002", "done")]
    assert all(snapshot.code_owner(job.run) == tmp_path / "sweep" for job in first)
    assert f"sha256 {first[0].code.digest[:12]}" in status.describe(first[0].run)

    (again,) = launch_sweep()
    assert again.run.name == "001"
    wait([again])
    with pytest.raises(BadLaunch, match=r"all 3 elements .* done or alive"):
        launch_sweep()
    alone = submit.launch_again(again.run)  # a single element
    assert alone.code == first[0].code
    wait([alone])


def test_an_array_larger_than_at_once_is_rejected_locally(launch_sweep: Callable[..., list[submit.Launched]]) -> None:
    with pytest.raises(BadLaunch, match="at_once is 2"):
        launch_sweep(at_once=2)

"""A file of settings to vary becomes runs."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from vjepa_launch import array, history, job_control, snapshot, status, submit, sweep
from vjepa_launch.array import Array, Element
from vjepa_launch.settings import BadInput, Cluster
from vjepa_launch.sweep import Sweep


def array_of(folder: Path, cluster: Cluster, at_once: int) -> Array:
    """Three runs of a few steps."""
    elements = []
    for name in ("000", "001", "002"):
        command = (
            "python",
            "-m",
            "vjepa_launch.drill.dummy_trainer",
            str(folder / name),
            "--steps",
            "20",
            "--step-s",
            "0.01",
        )
        elements.append(Element(name, command, f"name: tiny-{name}\nsteps: 20\n"))
    return Array(folder, cluster, elements, name="lr", at_once=at_once)


def test_a_grid_is_every_combination_and_elements_come_after() -> None:
    text = "{name: lr, config: demo, grid: {optim.lr: [1e-4, 0.0003], seed: [0, 1]}, elements: [{steps: 5}]}"
    elements = sweep.expand(Sweep.model_validate(yaml.safe_load(text)))
    assert len(elements) == 5
    assert elements[3].overrides == ("name=lr-003", "optim.lr=0.0003", "seed=1")
    assert elements[3].name == "003-optim.lr-0.0003-seed-1"
    assert elements[4].overrides == ("name=lr-004", "steps=5")


def test_lists_and_groups_stay_what_they_are() -> None:
    values = {"name": "x", "config": "demo", "elements": [{"data.sources": [{"path": "a b"}], "model.rope": "tiled"}]}
    (element,) = sweep.expand(Sweep.model_validate(values))
    name, _, text = element.overrides[1].partition("=")
    assert (name, yaml.safe_load(text)) == ("data.sources", [{"path": "a b"}])
    assert element.overrides[2] == "model.rope=tiled"


@pytest.mark.parametrize("values", [{}, {"grid": {"seed": list(range(1001))}}, {"gird": {"seed": [1]}}])
def test_a_sweep_of_nothing_or_too_much_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Sweep.model_validate({"name": "x", "config": "demo", **values})


def test_the_array_is_described_without_slurm_and_touches_nothing(tmp_path: Path) -> None:
    cluster = Cluster(executor="slurm", nodes=2, gpus_per_node=8)
    text = array.describe(array_of(tmp_path / "sweep", cluster, at_once=2))
    assert "#SBATCH --array=0-2%2" in text
    assert "%A_%a_%t_log.out" in text
    assert "name: tiny-000" in text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def swept(tmp_path: Path) -> Iterator[Callable[..., list[submit.Launched]]]:
    launched: list[submit.Launched] = []

    def start(at_once: int = 3) -> list[submit.Launched]:
        new = array.launch(array_of(tmp_path / "sweep", Cluster(executor="local"), at_once))
        launched.extend(new)
        return new

    yield start
    for one in launched:
        if job_control.is_alive("local", one.job):
            job_control.cancel("local", one.job)


def wait(launched: list[submit.Launched]) -> None:
    for one in launched:
        list(status.read_log(one.run, follow=True))


def test_elements_share_code_and_only_unfinished_ones_start_again(
    swept: Callable[..., list[submit.Launched]], tmp_path: Path
) -> None:
    history.write_json(tmp_path / "sweep" / "001" / "fault.json", {"rank": 0, "step": 5, "restarts": 1, "do": "2"})
    first = swept()
    assert [one.run.name for one in first] == ["000", "001", "002"]
    wait(first)
    statuses, _ = status.read_all(status.find_runs(tmp_path))
    assert [(one.name, one.state) for one in statuses] == [("000", "done"), ("001", "refused"), ("002", "done")]
    assert all(snapshot.home(one.run) == tmp_path / "sweep" for one in first)
    assert f"sha256 {first[0].code.digest[:12]}" in status.describe(first[0].run)

    (again,) = swept()
    assert again.run.name == "001"
    wait([again])
    with pytest.raises(BadInput, match=r"all 3 elements .* done or alive"):
        swept()
    alone = submit.launch_again(again.run)  # one element, by itself
    assert alone.code == first[0].code
    wait([alone])


def test_more_at_once_than_asked_for_is_refused_on_this_machine(swept: Callable[..., list[submit.Launched]]) -> None:
    with pytest.raises(BadInput, match="at_once is 2"):
        swept(at_once=2)

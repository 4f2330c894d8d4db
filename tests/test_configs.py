"""Every shipped run file is valid and states its command, its cost and its expected result."""

import re
from pathlib import Path

import pytest

from vjepa.config import load, shipped_configs
from vjepa.estimate.estimate import estimate

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.yaml"))


def test_configs_are_found_by_name() -> None:
    assert set(FILES) <= set(shipped_configs())
    assert load("demo").settings.name == "demo"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_config_is_valid_and_states_its_command(path: Path) -> None:
    run = load(path).settings
    assert run.name == path.stem
    head = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    for word in ("Run:", "Cost:", "Expect:"):
        assert word in head, f"{path.name}: the comment at the top lacks a line `# {word} ...`"


ON_A_CPU = ("demo", "lewm_two_room", "dynamics_two_room", "memory_curtain")


@pytest.mark.parametrize("path", [path for path in FILES if path.stem not in ON_A_CPU], ids=lambda path: path.stem)
def test_a_config_states_its_estimated_cost(path: Path) -> None:
    """The stated cost equals `vjepa estimate` to the digits given, on the nodes of 8 H100 in the command, and fits."""
    text = " ".join(path.read_text().split("\n# "))
    cost = re.search(r"Cost: +([\d.]+) TFLOP per .*?([\d,]+) H100 hours", text)
    nodes = re.search(r"Run: .*--on launch/clusters/h100.yaml --nodes (\d+)", text)
    assert cost, "# Cost: 1.2 TFLOP per clip (counted) and 3 H100 hours ..."
    assert nodes, "# Run: vjepa launch ... --on launch/clusters/h100.yaml --nodes 2"
    found = estimate(load(path).settings, gpus=8 * int(nodes[1]))
    teraflops, decimals = found.flops_per_clip / 1e12, len(cost[1].partition(".")[2])
    assert cost[1] == f"{teraflops:.{decimals}f}"
    assert cost[2] == f"{found.hours * found.gpus:,.0f}"
    assert found.fits, f"{found.memory_gib:.0f} GiB a GPU"

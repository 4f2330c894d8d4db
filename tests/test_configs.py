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


ON_A_CPU = ("demo", "surprise", "lewm_two_room", "dynamics_two_room", "memory_curtain")


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


def test_v_jepa_2_ac_has_the_published_numbers() -> None:
    """Values of configs/train/vitg16/droid-256px-8f.yaml and, for the batch, of arXiv:2506.09985."""
    epoch, run = 300, load("vjepa2_ac_vitg16_256px_8f").settings
    clip, crop, model, optim = run.data.clip, run.data.crop, run.model, run.optim
    objective = run.objective.model_dump()
    assert (run.steps, run.batch_size, run.seed, run.precision) == ((315 - 15) * epoch, 256, 239, "bf16")
    assert (clip.frames, clip.fps, crop.px, crop.flip) == (8, 4, 256, 0)
    assert (model.encoder.name, model.patch_px, model.tubelet_frames, model.rope) == ("vit_giant", 16, 2, "tiled")
    assert (model.predictor.depth, model.predictor.width, model.predictor.heads) == (24, 1024, 16)
    assert (model.predictor.mlp_ratio, model.condition, model.window) == (4, "token", None)
    assert (objective["action_channels"], objective["state_channels"], objective["normalise"]) == (7, 7, "none")
    assert (objective["rollout_steps"], objective["rollout_weight"], objective["exponent"]) == (2, 1, 1)
    assert (optim.start_lr, optim.lr, optim.warmup_steps, optim.decay) == (7.5e-5, 4.25e-4, 15 * epoch, "constant")
    assert (optim.weight_decay, optim.final_weight_decay, optim.clip_norm) == (0.04, None, None)

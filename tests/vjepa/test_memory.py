"""Memory: its loss, its pairs, exact resume, and the loaded model."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vjepa
from vjepa.config import Run
from vjepa.engine.trainer import train
from vjepa.estimate.estimate import estimate
from vjepa.evals.base import open_context
from vjepa.evals.memory.evaluation import MemoryEvalSettings, Question, Recording, curve, score_memories
from vjepa.evals.shell import run_evaluation
from vjepa.methods.base import create_method
from vjepa.methods.memory.method import ClipSequences, Memory, at_returns, set_whitening
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.memory import SHUT, ClipMemory, Whitening, pool_cells
from vjepa.weights.load import read_weights
from vjepa.weights.tensors import write_safetensors
from vjepa_data.builder.shard import shard
from vjepa_data.errors import BadInput
from vjepa_data.reader.loader import ClipLoader
from vjepa_data.settings import Loader
from vjepa_data.spec import Spec
from vjepa_data.synthetic.curtain import write_curtains

CLIPS, PX = 5, 32


def make_run(corpus: Path | str, **changes: Any) -> Run:
    return Run.model_validate(
        {
            "name": "tiny_memory",
            "steps": 4,
            "batch_size": 4,
            "precision": "fp32",
            "data": {
                "sources": [{"shards": str(corpus)}],
                "clip": {"frames": 2, "fps": 3, "sequence": CLIPS},
                "crop": {"px": PX, "scale": [1, 1], "aspect": [1, 1], "flip": 0},
            },
            "model": {
                "encoder": {"name": "custom", "width": 24, "depth": 1, "heads": 2},
                "predictor": {"width": 24, "depth": 1, "heads": 2},
                "patch_px": 8,
                "init_std": 0.2,
            },
            "objective": {"name": "memory", "side": 2, "shown": 1, "gap_clips": [1]},
            "optim": {"lr": 1e-3},
            "loader": {"workers": 0, "decoder": "pyav"},
            "checkpoint": {"every_steps": 2},
            "track": {"wandb": "off", "every_steps": 1, "monitor_every_steps": 2, "pictures_every_steps": None},
            "parallel": {"timeout_s": 60},
            **changes,
        }
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("curtain")
    write_curtains(folder / "in", videos=6, seed=0, seconds=8, px=PX)
    spec = Spec.model_validate({"encode": {"short_side_px": PX}, "split": {"val_share": 0.3}})
    shard([str(folder / "in")], folder / "shards", spec=spec, workers=1)
    return folder / "shards"


def inputs_of(run: Run, *, rank: int = 0, world: int = 1) -> tuple[Memory, ClipSequences]:
    method = create_method(run)
    assert isinstance(method, Memory)
    reading = Loader(workers=0, decoder="pyav")
    loader = ClipLoader(run.data, reading, batch_size=4, seed=run.seed, rank=rank, world=world)
    return method, method.prepare(next(iter(loader)), torch.device("cpu"))


def test_pairs_are_functions_of_seed_step_and_slot() -> None:
    method = create_method(make_run("none"))
    assert isinstance(method, Memory)
    both = method.draw_pairs(3, (0, 1), CLIPS, torch.device("cpu"))
    second = method.draw_pairs(3, (1,), CLIPS, torch.device("cpu"))
    for whole, part in zip(both, second, strict=True):
        assert torch.equal(whole[1:], part)
    many = [method.draw_pairs(step, (0,), CLIPS, torch.device("cpu")) for step in range(200)]
    gaps = torch.cat([(pairs.later - pairs.earlier).flatten() for pairs in many])
    assert (torch.bincount(gaps, minlength=CLIPS)[1:] / len(gaps) - 1 / (CLIPS - 1)).abs().max() < 0.05
    assert all((pairs.shown.sum(-1) == 1).all() and (pairs.later < CLIPS).all() for pairs in many)


def test_pairs_at_returns_aim_at_what_was_seen_before() -> None:
    objective = {"name": "memory", "side": 2, "pairs": 8, "returns": 0.5}
    method = create_method(make_run("none", objective=objective))
    assert isinstance(method, Memory)
    cpu = torch.device("cpu")
    places, second = method.draw_places(3, (0, 1), cpu), method.draw_places(3, (1,), cpu)
    assert places is not None
    assert second is not None
    assert torch.equal(places[1:], second)
    cells = torch.zeros(2, CLIPS, 4, 24)
    cells[0, 2:4] = 1  # in video 0, clip 4 returns to clips 0 and 1, and video 1 is still
    uniform = method.draw_pairs(3, (0, 1), CLIPS, cpu)
    many = [method.draw_places(step, (0, 1), cpu) for step in range(200)]
    found = [at_returns(uniform, cells, places) for places in many if places is not None]
    earlier, later = (torch.stack([getattr(pairs, name)[:, :4] for pairs in found]) for name in ("earlier", "later"))
    assert ((later[:, 0] == 4) & (earlier[:, 0] >= 2) & (earlier[:, 0] < 4)).float().mean() > 0.99
    assert torch.bincount(later[:, 1].flatten(), minlength=CLIPS)[1:].min() > 40  # of 800: any pair of a still video
    for pairs in found:
        assert ((pairs.earlier >= 0) & (pairs.earlier < pairs.later) & (pairs.later < CLIPS)).all()
        assert torch.equal(pairs.later[:, 4:], uniform.later[:, 4:])
    last = at_returns(uniform, cells, torch.ones(2, 4))  # a number just below 1 is 1 in fp32
    assert (last.later[:, :4] == CLIPS - 1).all()
    assert (last.earlier[:, :4] == CLIPS - 2).all()


def test_the_loss_is_the_error_with_and_without_memory(corpus: Path) -> None:
    method, inputs = inputs_of(make_run(corpus))
    networks = method.build()
    loss = method.loss(networks, inputs, step=0)
    grid, pairs = inputs.grid, inputs.pairs
    tokens = networks["target"]([View(inputs.frames)])[0].unflatten(1, (grid.t, grid.h, grid.w))
    cells = pool_cells(tokens, 2).unflatten(0, (4, CLIPS))
    memory = networks["memory"]
    assert isinstance(memory, ClipMemory)
    errors: dict[str, list[torch.Tensor]] = {"prediction": [], "alone": []}
    for video in range(4):
        for pair in range(8):
            first, later = int(pairs.earlier[video, pair]), int(pairs.later[video, pair])
            hidden = ~pairs.shown[video, pair]
            one = type(pairs)(*(each[video : video + 1, pair : pair + 1] for each in pairs))
            for name, start in (("prediction", 0), ("alone", first)):
                state = memory.remember(cells[video : video + 1, start : first + 1])[:, -1:]
                newest, aim = (cells[video : video + 1, each : each + 1] for each in (first, later))
                found = memory.forecast(state, newest, aim, one)[0, 0]
                errors[name].append((found - cells[video, later]).abs()[hidden].mean())
    for name, each in errors.items():
        assert math.isclose(loss.metrics[name].item(), torch.stack(each).mean().item(), rel_tol=1e-5)
    both = loss.metrics["prediction"].item() + loss.metrics["alone"].item()
    assert math.isclose(loss.value.item(), both, rel_tol=1e-6)
    for kind in ("prediction", "alone"):
        parts = loss.metrics[f"{kind}_gap_1_1"] + loss.metrics[f"{kind}_gap_2_up"]
        assert math.isclose(parts.item(), loss.metrics[kind].item(), rel_tol=1e-5)


def test_the_loss_is_a_sum_over_ranks(corpus: Path) -> None:
    method, whole = inputs_of(make_run(corpus))
    networks = method.build()
    parts = [method.loss(networks, inputs_of(make_run(corpus), rank=rank, world=2)[1], step=0) for rank in (0, 1)]
    wanted = method.loss(networks, whole, step=0)
    torch.testing.assert_close(parts[0].value + parts[1].value, wanted.value)
    for name, metric in wanted.metrics.items():
        torch.testing.assert_close(parts[0].metrics[name] + parts[1].metrics[name], metric, rtol=1e-4, atol=1e-9)


def test_the_estimate_counts_all_clips_of_a_sequence() -> None:
    run = make_run("none")
    longer = make_run("none", data={**run.data.model_dump(), "clip": {"frames": 2, "fps": 3, "sequence": 2 * CLIPS}})
    one, two = (estimate(each, gpus=1).flops_per_clip for each in (run, longer))
    assert 1.3 < two / one < 2.1  # the pairs of a sequence stay as many


def test_a_memory_goes_on_from_its_state() -> None:
    memory = ClipMemory(make_run("none").model, cells=4)
    clips = torch.randn(2, 6, 4, 24, generator=torch.Generator().manual_seed(0))
    whole = memory.remember(clips)
    first = memory.remember(clips[:, :4])
    torch.testing.assert_close(memory.remember(clips[:, 4:], first[:, -1]), whole[:, 4:])
    changed = clips.clone()
    changed[:, 0] += 1
    assert (memory.remember(changed)[:, -1] - whole[:, -1]).abs().max() > 1e-4  # the first clip is still there


def test_a_run_resumes_exactly_and_its_model_remembers(corpus: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(make_run(corpus), whole)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    train(make_run(corpus), again)
    one, other = (read_weights(folder).tensors for folder in (whole, again))
    for name in one:
        assert torch.equal(one[name], other[name]), name
    model = vjepa.load(whole)
    settings = {"supervised_steps": 2, "seeds": 2, "split": "train"}
    result = run_evaluation("memory", whole, corpus, settings, out=tmp_path / "memory.json")
    rows = {(row.task, row.features): row for row in result.rows}
    names = {"trained memory", "random memory", "raw context", "average", "window", "in sight", "supervised", "prior"}
    assert {row.features for row in result.rows} == names
    curves = result.details["retention_by_gap_s"]
    assert len({tuple(curve) for curve in curves.values()}) == 1
    for gap, value in curves["random memory"].items():
        assert math.isclose(value, np.mean(rows[f"retention, {gap} s", "random memory"].extra["seeds"]))
    gain = rows["memory gain, openings", "trained memory"]
    assert gain.low <= gain.value <= gain.high
    page = (tmp_path / "memory.html").read_text()
    assert page.count("<svg") == 3 + len(curves["window"])  # three tasks, and a film for each delay
    assert page.count("<img") == len(curves["window"])
    assert all(f"<td>{gap}</td>" in page for gap in curves["window"])
    assert model.capabilities == {"encode", "remember"}
    frames = torch.randint(0, 256, (1, 3, 2, PX, PX, 3), dtype=torch.uint8)
    states = model.remember(frames)
    assert states.shape == (1, 3, 4, 24)
    torch.testing.assert_close(model.remember(frames[:, 2:], states[:, 1])[:, 0], states[:, 2])
    with pytest.raises(BadInput, match="cannot predict"):
        model.predict(frames[:, 0], torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a native export of an untrained encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    model = make_run("none").model
    tensors = ((f"encoder.{name}", value) for name, value in Encoder(model, seed=3).state_dict().items())
    write_safetensors(folder / "model.safetensors", tensors)
    content = {"format": 1, "model": model.model_dump(mode="json"), "masks": [], "px": PX, "frames": 2, "fps": 3.0}
    (folder / "model.json").write_text(json.dumps(content))
    return folder


def test_whitened_runs_resume_exactly_and_load(corpus: Path, encoder: Path, tmp_path: Path) -> None:
    objective = {"name": "memory", "encoder": str(encoder), "side": 2, "shown": 1, "returns": 0.5, "whiten": True}
    run = make_run(corpus, objective=objective)
    whole, again = tmp_path / "whole", tmp_path / "again"
    train(run, whole)
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "step_00000004")
    train(run, again)
    one, other = (read_weights(folder).tensors for folder in (whole, again))
    for name in one:
        assert torch.equal(one[name], other[name]), name
    model = vjepa.load(whole)
    with ClipLoader(run.data, Loader(workers=0, decoder="pyav"), seed=run.seed, batch_size=4) as batches:
        frames = next(batches).groups[0].frames
    cells = pool_cells(model.encode(frames), 2)
    wanted = Whitening(24)
    set_whitening(wanted, cells.flatten(0, 1))
    torch.testing.assert_close(one["memory.whitening.mean"], wanted.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one["memory.whitening.matrix"], wanted.matrix, rtol=1e-3, atol=1e-3)
    memory = model.parts["memory"]
    assert isinstance(memory, ClipMemory)
    states = memory.remember(wanted(cells[None, :CLIPS]))
    torch.testing.assert_close(model.remember(frames[None, :CLIPS]), states, rtol=1e-3, atol=1e-4)


def test_whitening_makes_directions_alike_but_not_noise() -> None:
    draw = torch.Generator().manual_seed(0)
    mixed = torch.randn(4000, 6, generator=draw) * torch.tensor([10.0, 3, 1, 1, 1e-4, 1e-4])
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=draw)).Q
    whiten = Whitening(6)
    set_whitening(whiten, mixed @ rotation.T + 5)
    found = whiten(mixed @ rotation.T + 5)
    variances = torch.linalg.eigvalsh(torch.cov(found.T))
    torch.testing.assert_close(variances[2:], torch.tensor([0.91, 0.91, 0.99, 1.0]), rtol=0.02, atol=0.02)
    assert variances[:2].max() < 1e-6
    assert found.mean(0).abs().max() < 1e-3


def test_untrained_memories_forget_in_2_to_64_clips() -> None:
    memory = ClipMemory(make_run("none").model, cells=4)
    moved = (memory.gate_new.bias[:24] + SHUT).sigmoid()
    torch.testing.assert_close(1 / moved[[0, -1]], torch.tensor([2.0, 64.0]), rtol=1e-4, atol=0)
    assert (memory.gate_new.bias[24:] == 0).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data": {"sources": [{"shards": "x"}], "crop": {"px": PX}}}, "data.clip.sequence is 1; try 16"),
        ({"objective": {"name": "memory", "side": 9}}, r"objective.side \(9\) exceeds the 4 x 4 tokens"),
        ({"objective": {"name": "memory", "side": 1, "shown": 1}}, r"objective.shown \(1\) must be below"),
        ({"objective": {"name": "memory", "whiten": True}}, "needs features that stay as they are"),
        (
            {"objective": {"name": "memory", "whiten": True, "encoder": "x"}, "parallel": {"accumulate": 2}},
            r"parallel.accumulate \(2\) would change it",
        ),
        ({"objective": {"name": "memory", "gap_clips": [8, 2]}}, "must ascend from at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_run("none", **changes)


def planted(videos: int, seed: int) -> Recording:
    """Return features that show a class in clip 1 alone, and questions about it at clip 5."""
    draw = np.random.default_rng(seed)
    shapes = draw.integers(0, 4, videos)
    clips = torch.from_numpy(draw.normal(0, 0.1, (videos, 8, 4, 24)).astype(np.float32))
    clips[torch.arange(videos), 1, :, torch.from_numpy(shapes)] += 3
    asked = [
        Question(video, 1, 5, 7, 4.0, str(shape), (0.5, float(draw.random())), moves=video % 2 == 0, count=video % 3)
        for video, shape in enumerate(shapes.tolist())
    ]
    return Recording(list(clips), asked)


def test_only_what_remembers_recalls_what_the_window_cannot_see() -> None:
    model = make_run("none").model
    settings = MemoryEvalSettings(seeds=1, supervised_steps=40)
    with open_context(None) as context:
        memory = ClipMemory(model, cells=4, seed=7).requires_grad_(False)
        rows = score_memories([memory], model, planted(40, 0), planted(24, 1), settings, context)
    recalled = {name: values["4"] for name, values in curve(rows).items()}
    assert recalled["supervised"] > 0.7
    assert recalled["average"] > 0.9  # without distractors an average is enough
    assert recalled["in sight"] > 0.9
    assert recalled["window"] < 0.5
    assert {row.task for row in rows if row.metric == "R2"} == {"evolution, 4 s", "interference, 4 s"}

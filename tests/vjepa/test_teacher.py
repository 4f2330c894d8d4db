"""A fixed teacher in place of the moving average: the loss, the checkpoint, and what does not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vjepa
from vjepa.checkpoints import checkpoint
from vjepa.config import Run
from vjepa.engine.trainer import train
from vjepa.methods.base import MaskedClips, create_method
from vjepa.methods.masking import sample_masks
from vjepa.methods.vjepa2.method import predictor_inputs
from vjepa.methods.vjepa2.settings import VJEPA2Settings
from vjepa.nn.encoder import Encoder, View
from vjepa.nn.grid import Grid
from vjepa.weights.sharded import Sharded
from vjepa.weights.tensors import write_safetensors
from vjepa_data.errors import BadInput

FRAMES, PX = 4, 32


def write_teacher(folder: Path, run: Run, *, seed: int = 5, **model: Any) -> Path:
    """Write a native export of an untrained encoder of the run's sizes, some changed."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = type(run.model).model_validate(run.model.model_dump() | model)
    encoder = Encoder(settings, seed=seed)
    write_safetensors(
        folder / "model.safetensors", ((f"encoder.{name}", each) for name, each in encoder.state_dict().items())
    )
    content = {"format": 1, "model": settings.model_dump(mode="json"), "masks": [], "px": PX, "frames": 4, "fps": 4.0}
    (folder / "model.json").write_text(json.dumps(content))
    return folder


WIDE: dict[str, Any] = {"encoder": {"name": "custom", "width": 40, "depth": 1, "heads": 2}}


def with_teacher(tiny_run: Callable[..., Run], teacher: Path, **changes: Any) -> Run:
    objective = tiny_run().objective.model_dump(mode="json") | {"teacher": str(teacher)}
    return tiny_run(**{"objective": objective, "track": {"every_steps": 1}, **changes})


def clips_of(run: Run) -> list[MaskedClips]:
    frames = torch.randn(4, 3, FRAMES, PX, PX, generator=torch.Generator().manual_seed(0))
    grid, slots = Grid.of(FRAMES, PX, PX, run.model), (0, 1, 2, 3)
    return [
        MaskedClips(frames, grid, sample_masks(run.objective.mask_kinds, grid, seed=0, step=0, slots=slots), 0, slots)
    ]


def test_the_loss_is_the_distance_to_the_features_of_the_teacher(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    run = with_teacher(tiny_run, write_teacher(tmp_path / "teacher", tiny_run()))
    method, (clips,) = create_method(run), clips_of(run)
    networks = method.build()
    found = method.loss(networks, [clips], step=0)

    teacher = Encoder(run.model, seed=5)
    (features,) = teacher([View(clips.frames)])
    h = F.layer_norm(features, features.shape[-1:]).detach()
    errors = []
    for mask in clips.masks:
        (context,) = networks["encoder"]([View(clips.frames, mask.visible)])
        question = predictor_inputs([context], [(clips, mask)])
        (z,) = networks["predictor"](question)
        errors.append((z - h.take_along_dim(mask.hidden[..., None], dim=1)).abs().mean())
    torch.testing.assert_close(found.value, torch.stack(errors).mean())
    found.value.backward()
    assert all(p.grad is None for p in networks["teacher"].parameters())


@pytest.fixture(scope="module")
def student(tiny_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A student of a wider teacher, stopped half way."""
    folder = tmp_path_factory.mktemp("student")
    run = with_teacher(tiny_run, write_teacher(folder / "teacher", tiny_run(), **WIDE), steps=3)
    assert train(run, folder / "run") == 0
    return run, folder / "run"


def test_a_checkpoint_holds_the_student_and_no_target(student: tuple[Run, Path]) -> None:
    run, folder = student
    names = Sharded(checkpoint.resolve(folder)).names
    parts = {name.partition(".")[0] for name in names}
    assert {"encoder", "predictor", "teacher_map", "teacher_file"} <= parts
    assert not {"target", "teacher"} & parts
    assert vjepa.load(folder).width == run.model.encoder.width


def test_a_student_resumes_with_the_losses_of_an_unbroken_run(student: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = student
    longer = run.model_copy(update={"steps": 6})
    assert train(longer, folder) == 0
    assert train(longer, tmp_path / "whole") == 0
    resumed, whole = (
        [
            (row["step"], row["loss/prediction"])
            for row in map(json.loads, (each / "metrics.jsonl").read_text().splitlines())
        ]
        for each in (folder, tmp_path / "whole")
    )
    assert resumed == whole


def test_a_student_resumes_with_its_own_teacher_only(student: tuple[Run, Path], tiny_run: Callable[..., Run]) -> None:
    run, folder = student
    assert isinstance(run.objective, VJEPA2Settings)
    teacher = Path(str(run.objective.teacher))
    kept = (teacher / "model.safetensors").read_bytes()
    write_teacher(teacher, tiny_run(), seed=6, **WIDE)
    try:
        with pytest.raises(BadInput, match="is not the encoder that the checkpoint was trained with"):
            train(run.model_copy(update={"steps": 9}), folder)
    finally:
        (teacher / "model.safetensors").write_bytes(kept)


def test_a_dense_student_learns_all_levels_of_its_teacher(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    model = tiny_run().model.model_dump() | {"levels": (0, 1), "predict_context": True}
    wide = {"encoder": {"name": "custom", "width": 40, "depth": 3, "heads": 2}, "levels": (0, 2)}
    teacher = write_teacher(tmp_path / "teacher", tiny_run(), predict_context=True, **wide)
    objective = {"name": "vjepa2_1", "teacher": str(teacher), "context_ramp": [0, 0]}
    run = Run.model_validate(tiny_run().model_dump() | {"model": model, "objective": objective})
    method = create_method(run)
    networks = method.build()
    loss = method.loss(networks, clips_of(run), step=1)
    loss.value.backward()
    assert networks["teacher_map"].proj.weight.shape == (80, 48)  # pyright: ignore[reportAttributeAccessIssue]
    assert loss.features.shape[1] == 24  # of the student's last level
    assert networks["teacher_map"].proj.weight.grad.abs().min() > 0  # pyright: ignore


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"patch_px": 16}, "patch_px 16, model.patch_px is 8: their tokens are not the same; set model.patch_px to 16"),
        (None, "is not a native export .*model.json.*; make one with `vjepa export --format native`"),
    ],
)
def test_a_teacher_that_does_not_fit_is_rejected(
    model: dict[str, Any] | None, expected: str, tiny_run: Callable[..., Run], tmp_path: Path
) -> None:
    if model is not None:
        write_teacher(tmp_path / "teacher", tiny_run(), **model)
    with pytest.raises(BadInput, match=expected):
        create_method(with_teacher(tiny_run, tmp_path / "teacher")).build()

"""An untrained model of two rooms, as a native export."""

import json
from pathlib import Path

from safetensors.torch import save_file

from vjepa.config import Run
from vjepa.methods.base import create_method

PX = 32


def tiny_run(*, fps: float = 10.0) -> Run:
    """Return the settings of a tiny LeWM."""
    return Run.model_validate(
        {
            "name": "tiny",
            "steps": 1,
            "batch_size": 2,
            "data": {
                "sources": [{"shards": "none"}],
                "clip": {"frames": 5, "fps": fps},
                "crop": {"px": PX},
                "signals": ["action"],
            },
            "model": {
                "encoder": {"name": "custom", "width": 24, "depth": 1, "heads": 2},
                "predictor": {"width": 24, "depth": 1, "heads": 2},
                "patch_px": 8,
                "tubelet_frames": 1,
                "rope": "sincos",
                "window": 3,
                "init_std": 0.2,
            },
            "objective": {"name": "lewm", "latent": [16, 8], "rollout_steps": 3, "normalise": "none"},
            "optim": {"lr": 1e-3},
        }
    )


def write_model(folder: Path, *, fps: float = 10.0) -> Path:
    """Write the initial weights of a tiny LeWM and return its folder."""
    run = tiny_run(fps=fps)
    networks = create_method(run).build()
    tensors = {
        f"{name}.{path}": value.detach().contiguous()
        for name in ("encoder", "dynamics", "dynamics.actions", "dynamics.centre")
        for path, value in networks[name].state_dict().items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    content = {"format": 1, "px": PX, "frames": 5, "fps": fps, "model": run.model.model_dump(mode="json")}
    (folder / "model.json").write_text(json.dumps(content))
    return folder

"""Publish evaluation results next to the training curves of their run at Weights & Biases."""

from pathlib import Path

from vjepa import config
from vjepa.evals.base import Result
from vjepa.wandb_client import WandbRun
from vjepa_data.settings import BadInput


def find_record(model: Path) -> Path:
    """Return the run folder whose W&B record a model belongs to.

    Args:
        model: a run or its checkpoint.

    Raises:
        BadInput: it is neither, or the run has no W&B record.
    """
    folder = next((path for path in (model, model.parent.parent) if (path / "wandb" / "id").is_file()), None)
    if folder is None or not (folder / "config.yaml").is_file():
        raise BadInput(f"{model} is not a run with a W&B record (config.yaml and wandb/id); leave --wandb out")
    return folder


def publish(result: Result, model: Path) -> None:
    """Add a result to the W&B record of its run, at the step of the evaluated checkpoint.

    Metrics are named `eval/KIND/TASK/METRIC/FEATURES`.

    Args:
        result: of an evaluation of that model.
        model: a run or its checkpoint.

    Raises:
        BadInput: it is neither, or the run has no W&B record.
    """
    folder = find_record(model)
    run = config.load(folder / "config.yaml").settings
    numbers = {
        "/".join(("eval", result.kind, row.task, row.metric, row.features)).replace(" ", "_"): row.value
        for row in result.rows
    }
    client = WandbRun(run, folder, (folder / "wandb" / "id").read_text().strip())
    client.log({"step": result.model["step"], **numbers})
    client.close(0)

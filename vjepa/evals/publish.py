"""What evaluations found, beside the curves of the run at Weights & Biases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vjepa import config
from vjepa.wandb_client import WandbRun
from vjepa_data.settings import BadInput


def publish(result: Mapping[str, Any], model: Path) -> None:
    """Add a result to the record of the run that it is about, at the step of its checkpoint.

    Numbers are named `eval/KIND/TASK/METRIC/FEATURES`.

    Args:
        result: as `vjepa.evals.results` describes.
        model: a run, or one of its checkpoints.

    Raises:
        BadInput: it is neither, or the run keeps no record at W&B.
    """
    folder = next((one for one in (model, model.parent.parent) if (one / "wandb" / "id").is_file()), None)
    if folder is None or not (folder / "config.yaml").is_file():
        raise BadInput(f"{model} is no run with a record at W&B (config.yaml and wandb/id); leave --wandb out")
    run = config.load(folder / "config.yaml").settings
    numbers = {
        "/".join(("eval", result["kind"], row["task"], row["metric"], row["features"])).replace(" ", "_"): row["value"]
        for row in result["rows"]
    }
    client = WandbRun(run, folder, (folder / "wandb" / "id").read_text().strip())
    client.log({"step": result["model"]["step"], **numbers})
    client.close(0)

"""Weights & Biases: a copy of a run's metrics, and never a reason for training to stop."""

import logging
import netrc
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from vjepa.checkpoints.run_folder import code_version
from vjepa.config import Run

log = logging.getLogger(__name__)


class WandbRun:
    """One W&B run for all attempts: a copy of the metrics, never a reason to stop.

    The run has its own step axis, because W&B drops values for steps that it has seen, which a resumed run repeats. All
    exceptions of the client are caught. It has raised five unrelated undocumented types, and nothing depends on it.
    """

    def __init__(self, run: Run, folder: Path, run_id: str) -> None:
        import wandb

        self._run, self._name = None, f"{run.name}-{run_id}"
        wanted = run.track.wandb
        online = wanted == "online" or (wanted == "auto" and _has_key())
        modes: tuple[Literal["online", "offline"], ...] = ("online", "offline") if online else ("offline",)
        for mode in modes:
            try:
                self._run = wandb.init(
                    project=run.track.project,
                    entity=run.track.entity,
                    id=run_id,
                    name=run.name,
                    resume="allow",
                    dir=folder,
                    mode=mode,
                    config={**run.model_dump(mode="json"), "code": code_version()},
                    settings=wandb.Settings(init_timeout=run.track.wandb_timeout_s, console="off", silent=True),
                )
            except Exception as error:  # noqa: BLE001  see the class
                log.warning("W&B cannot be used %s (%s)", mode, _first_line(error))
                wandb.teardown()  # otherwise its service considers the run in use
                continue
            self._run.define_metric("*", step_metric="trainer/step")
            where = (
                self._run.url or f"`wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*-{run_id}` sends it"
            )
            log.info("W&B: %s, run %s, %s", mode, run_id, where)
            return

    def log(self, record: Mapping[str, Any]) -> None:
        """Log one record."""
        numbers = {name: value for name, value in record.items() if name not in ("step", "time")}
        self._try(lambda run: run.log({"trainer/step": record["step"], **numbers}))

    def show(self, picture: Path, step: int) -> None:
        """Log a picture."""
        import wandb

        self._try(lambda run: run.log({"trainer/step": step, "pictures": wandb.Image(str(picture))}))

    def refer_to(self, checkpoint: Path) -> None:
        """Record the place of a checkpoint; its files are not uploaded."""
        import wandb

        def note(run: Any) -> None:
            artifact = wandb.Artifact(self._name, type="model", metadata={"where": str(checkpoint)})
            # W&B's references read every file that they point to, and need a separate client for s3.
            with artifact.new_file("where.txt") as file:
                file.write(f"{checkpoint}\n")
            run.log_artifact(artifact, aliases=["latest", checkpoint.name])

        self._try(note)

    def alert(self, title: str, text: str) -> None:
        """Send an alert."""
        self._try(lambda run: run.alert(title=title, text=text))

    def close(self, code: int) -> None:
        """Finish the run. A run that will be resumed is not a failure."""
        self._try(lambda run: run.finish(exit_code=0 if code == 75 else code))
        self._run = None

    def _try(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:  # noqa: BLE001  see the class
            log.warning("W&B is lost for the rest of this attempt (%s); metrics.jsonl has it all", _first_line(error))
            self._run = None


def _has_key() -> bool:
    """Return whether W&B credentials exist, in the environment or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    file = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return bool(host and netrc.netrc(file).authenticators(host))
    except (OSError, netrc.NetrcParseError):
        return False


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"

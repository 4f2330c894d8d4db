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
    """Weights & Biases: a copy of the record, never a reason to stop.

    One run there for all attempts, with an axis of its own, because W&B drops what is logged for a step that it has
    seen, which a resumed run must do. Whatever its client raises is caught, the only such place in this project: it has
    raised five unrelated types of its own, none of them documented, and nothing depends on it.
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
                wandb.teardown()  # or its service goes on believing that the run is in use
                continue
            self._run.define_metric("*", step_metric="trainer/step")
            where = (
                self._run.url or f"`wandb sync {shlex.quote(str(folder / 'wandb'))}/offline-run-*-{run_id}` sends it"
            )
            log.info("W&B: %s, run %s, %s", mode, run_id, where)
            return

    def log(self, record: Mapping[str, Any]) -> None:
        """Copy one record."""
        numbers = {name: value for name, value in record.items() if name not in ("step", "time")}
        self._try(lambda run: run.log({"trainer/step": record["step"], **numbers}))

    def show(self, picture: Path, step: int) -> None:
        """Copy a picture."""
        import wandb

        self._try(lambda run: run.log({"trainer/step": step, "pictures": wandb.Image(str(picture))}))

    def refer_to(self, checkpoint: Path) -> None:
        """Note where a checkpoint is; its files stay there."""
        import wandb

        def note(run: Any) -> None:
            artifact = wandb.Artifact(self._name, type="model", metadata={"where": str(checkpoint)})
            # W&B's own references read every file that they point to, and for s3 need a client of their own.
            with artifact.new_file("where.txt") as file:
                file.write(f"{checkpoint}\n")
            run.log_artifact(artifact, aliases=["latest", checkpoint.name])

        self._try(note)

    def alert(self, title: str, text: str) -> None:
        """Send a notice."""
        self._try(lambda run: run.alert(title=title, text=text))

    def close(self, code: int) -> None:
        """Say how it ended. A run that will go on is no failure."""
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
    """Whether someone has logged in, by either of the two ways that W&B knows."""
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

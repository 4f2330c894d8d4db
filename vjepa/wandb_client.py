"""Weights & Biases: a copy of a run's metrics, and never a reason for training to stop.

`wandb` itself is asked for its mode, server and credentials (environment, `wandb login`, netrc, settings files,
identity tokens), since the places where it looks change with its version.
"""

import logging
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

from vjepa.checkpoints.run_folder import code_version
from vjepa.config import Run

log = logging.getLogger(__name__)

Mode = Literal["online", "offline", "disabled"]

T = TypeVar("T")


class WandbRun:
    """A W&B run for all attempts: a copy of the metrics, never a reason to stop.

    The run has its own step axis, because W&B drops values for steps that it has seen, which a resumed run repeats. All
    exceptions of the client are caught. It has raised five unrelated undocumented types, and nothing depends on it. Its
    start and its end are bounded in time by `track.wandb_timeout_s`.
    """

    def __init__(self, run: Run, folder: Path, run_id: str) -> None:
        self._run, self._name, self._timeout_s = None, f"{run.name}-{run_id}", run.track.wandb_timeout_s
        self._failed: set[str] = set()
        self._ours = _keep_files_in(folder / "wandb", told_not_to_send=run.track.wandb == "offline")
        try:
            import wandb  # noqa: F401  takes seconds on a busy machine, which are not a hang

            mode, reason = _within(self._timeout_s, lambda: _choose_mode(run.track.wandb, self._timeout_s))
        except Exception as error:  # noqa: BLE001  see the class
            log.warning("W&B cannot be used (%s); metrics.jsonl has it all", _first_line(error))
            return
        if mode == "disabled":
            log.info("W&B: disabled, %s", reason)
            return
        for attempt in (mode, "offline") if mode == "online" else (mode,):
            try:
                self._run = _within(2 * self._timeout_s, lambda mode=attempt: _start(run, folder, run_id, mode))
            except _Hangs as error:
                log.warning("W&B cannot be used %s (%s); metrics.jsonl has it all", attempt, error)
                return
            except Exception as error:  # noqa: BLE001  see the class
                reason = _first_line(error)
                log.warning("W&B cannot be used %s (%s)", attempt, reason)
                _teardown()  # otherwise its service considers the run in use
                continue
            if attempt == "online":
                log.info("W&B: online, run %s, %s", run_id, self._run.url)
                return
            record = f"{shlex.quote(str(folder / 'wandb'))}/offline-run-*-{run_id}"
            log.info("W&B: offline, since %s; run %s, `wandb sync %s` sends it", reason, run_id, record)
            return

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a record."""
        numbers = {name: value for name, value in record.items() if name not in ("step", "time")}
        self._try(lambda run: run.log({"trainer/step": record["step"], **numbers}))

    def show(self, picture: Path, step: int) -> None:
        """Log a picture."""

        def add(run: Any) -> None:
            import wandb

            run.log({"trainer/step": step, "pictures": wandb.Image(str(picture))})

        self._try(add, "pictures")

    def refer_to(self, checkpoint: Path) -> None:
        """Record the place of a checkpoint. Its files are not uploaded."""

        def note(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(self._name, type="model", metadata={"where": str(checkpoint)})
            # W&B's references read every file that they point to, and need a separate client for s3.
            with artifact.new_file("where.txt") as file:
                file.write(f"{checkpoint}\n")
            run.log_artifact(artifact, aliases=["latest", checkpoint.name])

        self._try(note, "the places of checkpoints")

    def alert(self, title: str, text: str) -> None:
        """Send an alert."""
        self._try(lambda run: run.alert(title=title, text=text), "alerts")

    def close(self, code: int) -> None:
        """Finish the run. A run that will be resumed is not a failure."""
        exit_code = 0 if code == 75 else code
        self._try(lambda run: _within(2 * self._timeout_s, lambda: run.finish(exit_code=exit_code)))
        self._run = None
        for name in self._ours:
            os.environ.pop(name, None)

    def _try(self, action: Callable[[Any], object], side: str | None = None) -> None:
        """Do something with the run. The failure of a side thing costs that thing alone, any other the record."""
        if self._run is None or side in self._failed:
            return
        try:
            action(self._run)
        except Exception as error:  # noqa: BLE001  see the class
            if side is not None:
                log.warning("W&B loses %s for the rest of this attempt (%s); metrics go on", side, _first_line(error))
                self._failed.add(side)
                return
            log.warning("W&B is lost for the rest of this attempt (%s); metrics.jsonl has it all", _first_line(error))
            self._run = None


def _keep_files_in(folder: Path, *, told_not_to_send: bool) -> list[str]:
    """Let `wandb` keep its files in the run folder and report no errors of an offline run. Settings of the user stay.

    Returns:
        Names of the environment variables that were set.
    """
    places = {"WANDB_DATA_DIR": str(folder / "data"), "WANDB_CACHE_DIR": str(folder / "cache")}
    if told_not_to_send or os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        places["WANDB_ERROR_REPORTING"] = "false"
    ours = {name: value for name, value in places.items() if name not in os.environ}
    os.environ.update(ours)
    return list(ours)


def _choose_mode(wanted: Literal["auto", "online", "offline", "off"], timeout_s: float) -> tuple[Mode, str]:
    """Return the mode of the run and why it is not online.

    Settings of the run and of the user can each keep a run from the network.
    """
    if wanted == "offline":
        return "offline", "track.wandb is offline"
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled", "WANDB_DISABLED is set"
    import wandb

    # The client may hang after this wait (see `_within`), so it must not end first.
    settings = wandb.setup(wandb.Settings(silent=True, x_service_wait=2 * timeout_s)).settings
    if settings.mode not in ("online", "run", "shared"):  # including the older `dryrun`
        origin = "WANDB_MODE is" if "WANDB_MODE" in os.environ else "the settings of wandb are"
        return "disabled" if settings.mode == "disabled" else "offline", f"{origin} {settings.mode}"
    with _no_questions():
        try:
            found = wandb.login(verify=False)  # without the network; the start of the run verifies
        except Exception as error:  # noqa: BLE001  see the class
            host, reason = settings.base_url, _first_line(error)
            return "offline", f"wandb has no credentials for {host} ({reason}); run `wandb login`"
    return ("online", "") if found else ("offline", f"wandb is not logged in to {settings.base_url}; run `wandb login`")


@contextmanager
def _no_questions() -> Iterator[None]:
    """Let `wandb` see no terminal, where it would ask for a key and wait."""
    stdin = sys.stdin
    with open(os.devnull) as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = stdin


def _start(run: Run, folder: Path, run_id: str, mode: Mode) -> Any:
    import wandb

    timeout_s = run.track.wandb_timeout_s
    defaults = wandb.setup(wandb.Settings(silent=True, x_service_wait=2 * timeout_s)).settings
    settings = wandb.Settings(init_timeout=timeout_s, console="off", silent=True)
    if "finish_timeout" in wandb.Settings.model_fields:  # since 0.27 or 0.28
        settings.finish_timeout = timeout_s
    started = wandb.init(
        project=run.track.project or defaults.project or "vjepa",
        entity=run.track.entity,
        id=run_id,
        name=defaults.run_name or run.name,
        resume="allow",
        dir=folder,
        mode=mode,
        config={**run.model_dump(mode="json"), "code": code_version()},
        settings=settings,
    )
    started.define_metric("*", step_metric="trainer/step")
    return started


class _Hangs(Exception):
    """A call of `wandb` did not return in time."""


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Return the result of a call of `wandb`, made in a thread of its own, which is left behind if it hangs.

    The client can hang for good: when its service does not start, it waits for a lock that it holds itself (0.31).

    Raises:
        _Hangs: The call took longer than `seconds`.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:  # noqa: BLE001  raised again below
            errors.append(error)

    thread = threading.Thread(target=run, name="wandb", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if thread.is_alive() or not results:
        raise _Hangs(f"it did not answer in {seconds:g} s")
    return results[0]


def _teardown() -> None:
    import wandb

    try:
        wandb.teardown()
    except Exception as error:  # noqa: BLE001  its service may be gone
        log.debug("wandb.teardown: %s", error)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"

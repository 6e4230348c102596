"""A Weights & Biases run in a thread of its own: nothing that happens to it reaches the training."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import threading
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal

import psutil

from flux2_ds.config.recipe import Log
from flux2_ds.errors import UserError, without_secrets
from flux2_ds.run.atomic import atomic_write_text

log = logging.getLogger("flux2_ds")

WANDB_ID = "wandb_id"
STEP = "optimizer_step"
"""Our own step axis: W&B's would drop what a run repeats after a kill."""
_START, _FINISH, _MARGIN = 60.0, 120.0, 30.0
"""s that W&B gets to start, to send its last records, and to end then; what is not sent stays in wandb/."""
_ALERT = 10.0
"""s that a run which ends by an error waits for its alert."""
_LOOK = 5.0
"""s between looks for a stall."""

Stall = Callable[[], tuple[float, str]]
"""Seconds without progress, and where."""


def check_trackers(settings: Log) -> None:
    """Refuse W&B and TensorBoard where they are wanted and not installed."""
    wanted = {
        "wandb": (settings.wandb != "disabled", settings.wandb, "it", "disabled"),
        "tensorboard": (settings.tensorboard, "true", "flux2-ds[tensorboard]", "false"),
    }
    for package, (asked, value, install, without) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise UserError(
                f"log.{package} is {value}, but the package {package} is not installed. Install {install}, "
                f"or set log.{package}: {without}."
            )


class WandbRun:
    """The W&B run of a run directory.

    `patience`: s without progress after which `stall` is told in an alert; 0: never.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: Log,
        config: dict[str, Any] | None = None,
        stall: Stall = lambda: (0.0, ""),
        patience: float = 0.0,
    ) -> None:
        self._run_dir, self._settings, self._config = run_dir, settings, config
        self._stall, self._patience, self._stalled = stall, patience, False
        self._queue: SimpleQueue[Callable[[Any], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send values of `step` when W&B takes them."""
        self._later(lambda run: run.log({STEP: step, **values}))

    def log_previews(self, step: int, images: list[tuple[str, Path]]) -> None:
        """Send images, pairs of prompt and path, as they are and as a table."""

        def send(run: Any) -> None:
            import wandb

            shown = [wandb.Image(str(path), caption=prompt) for prompt, path in images]
            rows = [[step, prompt, image] for (prompt, _), image in zip(images, shown, strict=True)]
            table = wandb.Table(columns=["step", "prompt", "image"], data=rows)
            run.log({STEP: step, "samples/images": shown, "samples/previews": table})

        self._later(send)

    def log_artifact(
        self, kind: Literal["checkpoint", "export"], paths: Sequence[Path], step: int
    ) -> None:
        """Send files and directories together; they may be gone once W&B has copied them."""

        def send(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(f"{kind}-{run.id}", type=kind, metadata={"step": step})
            try:
                for path in paths:
                    (artifact.add_dir if path.is_dir() else artifact.add_file)(str(path))
            except (OSError, ValueError) as error:  # ValueError: it is gone
                log.warning("W&B has no artifact of %s: %s", path, _first_line(error))
            else:
                run.log_artifact(artifact, aliases=["latest", f"step_{step}"])

        self._later(send)

    def alert(self, title: str, text: str, *, last: bool = False) -> None:
        """Send an alert, if they are wanted; before the `last` one's process ends W&B gets some seconds."""
        if not self._settings.alerts:
            return
        sent = threading.Event()

        def send(run: Any) -> None:
            run.alert(title, without_secrets(text), level="ERROR" if last else "WARN")
            if last:
                run.finish(exit_code=1)
            sent.set()

        self._later(send)
        if last and self._thread.is_alive():
            sent.wait(_ALERT)

    def finish(self) -> None:
        """Wait until W&B has taken everything, but not for ever."""
        self._queue.put(None)
        self._thread.join(_FINISH + _MARGIN)
        if self._thread.is_alive():
            log.warning("W&B does not end; what it has not sent is in %s", self._run_dir / "wandb")
            for child in psutil.Process().children():
                with contextlib.suppress(psutil.Error):
                    if child.name().startswith("wandb"):
                        child.kill()
            self._thread.join(_MARGIN)

    def _later(self, send: Callable[[Any], None]) -> None:
        if self._thread.is_alive():
            self._queue.put(send)

    def _serve(self) -> None:
        import wandb

        try:
            run = self._start()
            while run is not None:
                try:
                    send = self._queue.get(timeout=_LOOK)
                except Empty:
                    self._look_for_stall(run)
                    continue
                if send is None:
                    run.finish()
                    break
                send(run)
        except Exception as error:  # of any type: wandb's, its service's, the network's
            log.warning("W&B failed (%s); the run goes on without it", _first_line(error))
        with contextlib.suppress(Exception):  # or it would do this at exit, and wait for a service
            wandb.teardown()  # that is gone

    def _look_for_stall(self, run: Any) -> None:
        """Tell once of a stall."""
        seconds, where = self._stall()
        stalled = bool(self._patience) and seconds > self._patience
        if stalled and not self._stalled:
            run.alert("no progress", f"none for {seconds:.0f} s: {where}", level="WARN")
        self._stalled = stalled

    def _start(self) -> Any:
        """The W&B run, offline where it cannot be online; None if WANDB_MODE disables it."""
        import wandb

        mode, given = self._settings.wandb, os.environ.get("WANDB_MODE", "")
        if given in ("offline", "dryrun", "disabled") and given != mode:
            log.info("W&B is %s by the environment variable WANDB_MODE", given)
            mode = "offline"
        if given == "disabled":
            return None
        os.environ.setdefault("WANDB_SILENT", "true")
        # Tables and artifacts wait here until they are sent; W&B would have them in the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str((self._run_dir / "wandb").resolve()))
        if mode == "online" and not os.environ.get("WANDB_API_KEY"):
            known, why = False, ""
            try:
                known = wandb.login(prompt=False)
            except Exception as error:  # of a server or service that does not answer
                why = f" that works ({_first_line(error)})"
            if not known:
                message = (
                    "log.wandb is online but no W&B API key is set%s; the W&B run stays offline"
                )
                log.warning(message, why)
                mode = "offline"
        try:
            run = self._init(mode)
        except Exception as error:
            if mode == "offline":
                raise
            log.warning("W&B cannot be reached (%s); its run stays offline", _first_line(error))
            wandb.teardown()  # frees the run's id
            run = self._init("offline")
        run.define_metric(STEP, hidden=True)  # the axis is no chart
        run.define_metric("*", step_metric=STEP)
        for name in ("train/loss", "validation/loss"):  # the table of runs shows the best
            run.define_metric(name, step_metric=STEP, summary="min,last")
        return run

    def _init(self, mode: Literal["online", "offline", "disabled"]) -> Any:
        import wandb

        settings = self._settings
        return wandb.init(
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            name=settings.name or self._run_dir.resolve().name,
            tags=settings.tags,
            notes=settings.notes,
            config=self._config,
            id=_run_id(self._run_dir),
            resume="allow",
            dir=self._run_dir,
            mode=mode,
            settings=wandb.Settings(console="off", init_timeout=_START, finish_timeout=_FINISH),
        )


def log_export(settings: Log, run_dir: Path, paths: Sequence[Path], step: int) -> None:
    """Send an export's files as an artifact of the run that it comes from, if that is wanted."""
    if settings.wandb != "disabled" and "exports" in settings.artifacts:
        run = WandbRun(run_dir, settings)
        run.log_artifact("export", paths, step)
        run.finish()


def _run_id(run_dir: Path) -> str:
    """The run's W&B id, kept in the run directory so that a resumed run is one run."""
    path = run_dir / WANDB_ID
    kept = path.read_text().strip() if path.exists() else ""
    if not kept:
        kept = uuid.uuid4().hex[:8]
        atomic_write_text(path, kept)
    return kept


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]

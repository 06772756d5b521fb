"""Log events to W&B: one W&B run for the training run, optionally one per node in the same group.

Volunteers need no account: only the coordinator logs the training run, offline where no key is configured. W&B has its
own thread behind a bounded queue: a slow network, a bad key or a full disk cannot stop or delay the run; it is reported
in one :class:`Notice`.
"""

from __future__ import annotations

import netrc
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from psyche.config import Manifest, Wandb
from psyche.telemetry import metrics
from psyche.telemetry.events import Event, Notice

QUEUE_ROWS = 4096
INIT_TIMEOUT = 15.0
"""Seconds to wait for the server before logging offline instead."""
FINISH_TIMEOUT = 10.0
"""Seconds to wait for uploads at the end; the remainder stays on disk for ``wandb sync``."""

Mode = Literal["online", "offline", "disabled"]
Row = dict[str, float]


def swarm_run(wandb: Wandb, directory: Path, manifest: Manifest, notify: Callable[[Event], None]) -> WandbRun:
    """Open the W&B run of the training run, for the coordinator. A restarted coordinator resumes it (online)."""
    run_id = manifest.run_id.hex()
    return WandbRun(
        wandb,
        directory,
        notify,
        id=run_id[:16],
        row=metrics.swarm_row,
        plots=metrics.SWARM_PLOTS,
        init={"name": manifest.run.name, "group": run_id, "job_type": "swarm", "config": _config(manifest)},
    )


def own_run(
    wandb: Wandb, directory: Path, manifest: Manifest, peer: str, notify: Callable[[Event], None]
) -> WandbRun | None:
    """Open this node's own W&B run in the training run's group; ``None`` unless ``wandb.own_run`` is set."""
    if not wandb.own_run:
        return None
    run_id = manifest.run_id.hex()
    return WandbRun(
        wandb,
        directory,
        notify,
        id=f"{run_id[:16]}-{peer[-8:]}",
        row=metrics.node_row,
        plots=metrics.STEP_PLOTS + metrics.MEMBER_PLOTS,
        init={
            "name": f"{manifest.run.name} {peer[-6:]}",
            "group": run_id,
            "job_type": "node",
            "config": _config(manifest) | {"peer": peer},
        },
    )


def _config(manifest: Manifest) -> dict[str, Any]:
    return manifest.model_dump(mode="json")


def resolve_mode(wandb: Wandb) -> Mode:
    """Resolve ``auto``: ``WANDB_MODE`` if that is set, else online if a key is configured, else offline."""
    if wandb.mode != "auto":
        return wandb.mode
    match os.environ.get("WANDB_MODE"):
        case "online" | "offline" | "disabled" as mode:
            return mode
        case _:
            return "online" if key_configured() else "offline"


def key_configured() -> bool:
    """Return whether W&B finds credentials in the environment, its settings file or netrc. Asks no server."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    settings = _silenced().settings
    if settings.api_key:
        return True
    # The server's API host has changed over W&B's versions; a key saved for the old name still counts.
    hosts = {urlsplit(settings.base_url).netloc, "api.wandb.ai"}
    try:
        entries = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(entries.authenticators(host) for host in hosts)


def _silenced() -> Any:
    """Return W&B's process-wide state, silenced. ``wandb.init(settings=…)`` alone silences it only after the login."""
    import wandb

    setup = wandb.setup(wandb.Settings(silent=True))
    wandb.termsetup(setup.settings, None)
    return setup


class WandbRun:
    """A listener that logs rows to W&B from a thread of its own. Use :func:`swarm_run` or :func:`own_run`."""

    def __init__(
        self,
        wandb: Wandb,
        directory: Path,
        notify: Callable[[Event], None],
        *,
        id: str,
        row: Callable[[Event], Row],
        plots: tuple[metrics.Plot, ...],
        init: dict[str, Any],
    ) -> None:
        self._wandb = wandb
        self._directory = directory
        self._notify = notify
        self._row = row
        self._plots = plots
        self._init = init | {"id": id, "project": wandb.project, "entity": wandb.entity}
        self._queue: queue.Queue[Row | None] = queue.Queue(QUEUE_ROWS)
        self._failed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if wandb.mode != "disabled":
            self._thread.start()

    def __call__(self, event: Event) -> None:
        row = self._row(event) if self._thread.is_alive() and not self._failed.is_set() else {}
        if row:
            try:
                self._queue.put_nowait(row)
            except queue.Full:
                self._fail("it accepts rows more slowly than they are logged")

    def close(self, timeout: float = INIT_TIMEOUT + FINISH_TIMEOUT + 5) -> None:
        """Upload what is left, for at most ``timeout`` seconds."""
        if self._thread.is_alive():
            try:
                self._queue.put(None, timeout=timeout)
            except queue.Full:
                return  # it hangs; a notice has said so
            self._thread.join(timeout)

    def _work(self) -> None:
        try:
            mode = resolve_mode(self._wandb)
            if mode == "disabled":
                self._failed.set()
                return
            run = self._start(mode)
            while (row := self._queue.get()) is not None:
                run.log(row)
            run.finish()
        except Exception as error:
            self._fail(_sentence(error))

    def _start(self, mode: Mode) -> Any:
        if mode == "online":
            try:
                run = self._open("online", resume="allow")
            except Exception as error:
                # W&B keeps the id of the run that it could not start.
                self._init["id"] += "-offline"
                offline = self._open("offline")
                self._say("warning", f"W&B: cannot log online ({_sentence(error)}); {_offline_note(offline)}")
                return offline
            self._say("info", f"W&B: {run.url}")
            return run
        run = self._open("offline")
        self._say("info", f"W&B: {_offline_note(run)}")
        return run

    def _open(self, mode: Literal["online", "offline"], resume: Literal["allow"] | None = None) -> Any:
        import wandb

        _silenced()
        self._directory.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            silent=True,
            console="off",  # W&B must not upload a contributor's terminal output
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            init_timeout=INIT_TIMEOUT,
            finish_timeout=FINISH_TIMEOUT,
            stop_fn=lambda: self._say("warning", "the stop button of W&B does not stop psyche; press Ctrl-C here"),
        )
        run = wandb.init(
            **self._init, mode=mode, dir=str(self._directory), resume=resume, reinit="create_new", settings=settings
        )
        for axis in sorted({plot.axis for plot in self._plots}):
            run.define_metric(axis, hidden=True)
        for plot in self._plots:
            run.define_metric(plot.key, step_metric=plot.axis, summary=plot.summary)
        return run

    def _fail(self, reason: str) -> None:
        if not self._failed.is_set():
            self._failed.set()
            self._say("warning", f"W&B: logging has stopped ({reason}); the run continues without it")

    def _say(self, level: Literal["info", "warning"], text: str) -> None:
        self._notify(Notice(level, text))


def _offline_note(run: Any) -> str:
    return f"logging offline; upload later with: wandb sync {Path(run.dir).parent}"


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

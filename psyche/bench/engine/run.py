"""Measure one way to train: a process that trains and tells how long it took, or a whole run of one node."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import msgspec

from psyche.bench.engine.plan import Plan, Way
from psyche.bench.exchange.links import on_loopback
from psyche.bench.exchange.reap import reap
from psyche.bench.swarm import STOP_SECONDS, last_words, own_config, running, until_finished
from psyche.config import Config, Rounds, Wandb
from psyche.errors import PsycheError
from psyche.telemetry.event_log import LOG_NAME, read_events
from psyche.telemetry.events import MemberMetrics

SKIPPED = 1
"""Rounds of the run that are not counted: the first one warms up, as others do."""
COUNTED = 1


def seconds_per_step(plan: Plan, way: Way) -> float:
    """Of an inner step, the mean of all that are counted. Raises :class:`PsycheError`."""
    with tempfile.TemporaryDirectory(prefix="psyche-bench-") as name:
        folder = Path(name)
        return _node(plan, folder) if way == "node" else _alone(plan, way, folder)


def _alone(plan: Plan, way: Way, folder: Path) -> float:
    given, log = folder / "plan.json", folder / "log"
    given.write_bytes(msgspec.json.encode(plan))
    with given.open("rb") as stdin, log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "psyche.bench.engine.ways", way],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=os.environ | {"OMP_NUM_THREADS": str(plan.threads)},
            start_new_session=True,
        )
        try:
            output, _ = process.communicate()
        finally:
            reap(process, time.monotonic() + STOP_SECONDS)
    if process.returncode != 0:
        raise PsycheError(f"training by {way} failed: {last_words(log)}")
    return float(output) / plan.steps


def _node(plan: Plan, folder: Path) -> float:
    """A node in a run of its own, with a coordinator that polls, certifies and logs as always."""
    config = _with(plan)
    places = on_loopback(2)
    with ExitStack() as stack:
        processes = {}
        for name, place in zip(("coordinator", "node-1"), places, strict=True):
            own = str(own_config(config, place, folder / f"{name}.yaml"))
            where = ["--directory", str(folder / name)]
            command = ["psyche", "coordinator", own, *where]
            if name != "coordinator":
                command = ["psyche", "join", f"@{folder / 'coordinator' / 'invite'}", *where, "--config", own]
            processes[name] = stack.enter_context(running(name, place, command, folder, {}))
        until_finished(processes, folder)
    told = [one for one in read_events(folder / "node-1" / LOG_NAME) if isinstance(one, MemberMetrics)]
    counted = [one for one in told if one.round > SKIPPED]
    if not counted:
        raise PsycheError("the node told of no round that counts")
    return sum(one.train_seconds or 0.0 for one in counted) / sum(one.inner_steps or 0 for one in counted)


def _with(plan: Plan) -> Config:
    config = plan.load()
    rounds = Rounds(total=SKIPPED + COUNTED, inner_steps=plan.steps)
    run = config.run.model_copy(update={"name": "engine", "rounds": rounds})
    node = config.node.model_copy(update={"wandb": Wandb(mode="disabled")})
    return config.model_copy(update={"run": run, "node": node})

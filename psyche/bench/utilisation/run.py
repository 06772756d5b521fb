"""One whole run of paced nodes: the ordinary commands, each in its place, watched until the run is finished."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from psyche.bench.exchange.links import Link, Place, shaped
from psyche.bench.swarm import own_config, running, until_finished
from psyche.bench.utilisation.paced import PACE
from psyche.bench.utilisation.plan import Trial
from psyche.config import Config
from psyche.telemetry.event_log import LOG_NAME


def run(trial: Trial, folder: Path) -> tuple[Path, list[Path]]:
    """Run ``trial`` to its end, each node behind a link of its own; the event logs of the coordinator and of each node.

    Raises :class:`PsycheError`.
    """
    peers = trial.config.run.rounds.start_members
    with shaped([Link(), *[Link(trial.rate, trial.rate)] * peers]) as places:
        return run_at(places, trial.config, [trial.step_seconds] * peers, folder)


def run_at(
    places: Sequence[Place], config: Config, step_seconds: Sequence[float], folder: Path
) -> tuple[Path, list[Path]]:
    """The same at ``places``, the coordinator's first; each node takes its own ``step_seconds``."""
    names = ["coordinator", *(f"node-{number}" for number in range(1, len(step_seconds) + 1))]
    with ExitStack() as stack:
        processes = {}
        for name, place, seconds in zip(names, places, [0.0, *step_seconds], strict=True):
            arguments = _arguments(name, folder, own_config(config, place, folder / f"{name}.yaml"))
            pace = {PACE: str(seconds)}
            processes[name] = stack.enter_context(running(name, place, arguments, folder, pace))
        until_finished(processes, folder)
    logs = [folder / name / LOG_NAME for name in names]
    return logs[0], logs[1:]


def _arguments(name: str, folder: Path, config: Path) -> list[str]:
    place = ["--directory", str(folder / name)]
    if name == "coordinator":
        return ["psyche", "coordinator", str(config), *place]
    invite = f"@{folder / 'coordinator' / 'invite'}"
    return ["psyche.bench.utilisation.paced", invite, *place, "--config", str(config)]

"""One whole run on shaped links: the ordinary commands, each in its place, watched until the run is finished."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from psyche.bench.exchange.links import Link, shaped
from psyche.bench.swarm import own_config, running, until_finished
from psyche.bench.utilisation.paced import PACE
from psyche.bench.utilisation.plan import Trial
from psyche.telemetry.events import LOG_NAME


def run(trial: Trial, folder: Path) -> tuple[Path, list[Path]]:
    """Run ``trial`` to its end; the event logs of the coordinator and of each node. Raises :class:`PsycheError`."""
    peers = trial.config.run.rounds.start_members
    names = ["coordinator", *(f"node-{number}" for number in range(1, peers + 1))]
    links = [Link(), *[Link(trial.rate, trial.rate)] * peers]
    with shaped(links) as places, ExitStack() as stack:
        processes, pace = {}, {PACE: str(trial.step_seconds)}
        for name, place in zip(names, places, strict=True):
            arguments = _arguments(name, folder, own_config(trial.config, place, folder / f"{name}.yaml"))
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

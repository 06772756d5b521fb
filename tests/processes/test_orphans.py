"""When a process of psyche is killed, the processes it started end with it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from psyche.bench.harness.shaped_links import remove_stale
from psyche.config import load_config
from psyche.data.token_store import store_path
from psyche.network.identity import IDENTITY
from psyche.telemetry.events import RunStarted
from tests.bench.test_shaped_links import needs_namespaces
from tests.processes.swarm import PATIENCE, alive, descendants, standby_key, swarm
from tests.tiny import write_config


@dataclass(frozen=True)
class Parent:
    """A psyche program that starts processes."""

    name: str
    start: Callable[[Path], Iterator[subprocess.Popen[bytes]]]
    """Starts it in an empty folder, yields its process, and ends the other processes afterwards."""
    below: tuple[str, ...]
    """Programs that must run below it before it is killed, one per process."""

    def __str__(self) -> str:
        return self.name


def member(name: str) -> Callable[[Path], Iterator[subprocess.Popen[bytes]]]:
    """Start one process of a swarm, with W&B's helper process."""

    def start(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
        key = standby_key(folder / "run" / "standby")
        config = write_config(folder, members=2, standbys=[key])
        with swarm(folder / "run", config) as run:
            config.write_text(config.read_text().replace("mode: disabled", "mode: offline\n    own_run: true"))
            run.coordinator()
            if name != "coordinator":
                (run.standby if name == "standby" else run.node)(name)
            run.wait(name, RunStarted)
            yield run.processes[name]

    return start


def command(*arguments: str) -> Callable[[Path], Iterator[subprocess.Popen[bytes]]]:
    """Start ``psyche`` with arguments in which CONFIG stands for a configuration and FOLDER for a directory."""

    def start(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
        rounds = {"total": 500, "inner_steps": 3, "start_members": 2}
        places = {"CONFIG": str(write_config(folder, members=2, rounds=rounds)), "FOLDER": str(folder / "run")}
        with (folder / "output").open("wb") as output:
            given = [places.get(one, one) for one in arguments]
            process = subprocess.Popen([sys.executable, "-m", "psyche", *given], stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    return start


SWARM = ("python",) * 3 + ("p2pd",) * 3
PARENTS = [
    Parent("node-1", member("node-1"), ("p2pd", "wandb-core")),
    Parent("coordinator", member("coordinator"), ("p2pd", "wandb-core")),
    Parent("run", command("run", "CONFIG", "--peers", "2", "--directory", "FOLDER"), SWARM),
    Parent("standby", member("standby"), ("p2pd",)),
    Parent("demo", command("demo", "--config", "CONFIG", "--peers", "2", "--directory", "FOLDER"), SWARM),
    Parent("bench exchange", command("bench", "exchange", "--peers", "2", "--params", "1M", "--repeat", "999"), SWARM),
    Parent("bench utilisation", command("bench", "utilisation", "--peers", "2", "--rounds", "999"), SWARM),
]
FAST = {"coordinator"}


def chosen(parent: Parent) -> object:
    """Return a parameter for pytest; each case takes ten seconds or more."""
    marks = [] if parent.name in FAST else [pytest.mark.slow]
    return pytest.param(parent, marks=[*marks, needs_namespaces] if parent.name == "bench utilisation" else marks)


@pytest.mark.parametrize("parent", map(chosen, PARENTS), ids=[str(one) for one in PARENTS])
def test_a_killed_parent_leaves_no_process(tmp_path: Path, parent: Parent) -> None:
    with contextmanager(parent.start)(tmp_path) as process:
        eventually(lambda: contains(programs(process.pid), parent.below), lambda: str(programs(process.pid)))
        killed(process)
    if parent.name == "bench utilisation":
        remove_stale()


@pytest.mark.slow
@pytest.mark.parametrize("parent", [one for one in PARENTS if one.name in ("run", "bench exchange")], ids=str)
def test_a_parent_killed_during_startup_leaves_no_process(tmp_path: Path, parent: Parent) -> None:
    """The children have not yet asked the kernel to end them with their parent."""
    with contextmanager(parent.start)(tmp_path) as process:
        eventually(lambda: len(descendants(process.pid)) > 0, lambda: "it starts no process")
        below = descendants(process.pid)
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE)
        eventually(
            lambda: not any(map(alive, below)), lambda: str([(pid, program(pid)) for pid in below if alive(pid)])
        )


@pytest.mark.slow
def test_a_process_that_cannot_cancel_its_work_ends_after_sigterm(tmp_path: Path) -> None:
    """A coordinator that waits for another process to prepare the data does so in a thread that cannot be cancelled."""
    config = write_config(tmp_path, members=2)
    loaded = load_config(config)
    lock = FileLock(f"{store_path(loaded.node.cache, loaded.run.data)}.lock")
    Path(lock.lock_file).parent.mkdir(parents=True)
    with lock, contextmanager(command("run", "CONFIG", "--directory", "FOLDER"))(tmp_path) as process:
        identity = tmp_path / "run" / "coordinator" / IDENTITY
        eventually(identity.exists, lambda: (tmp_path / "output").read_text())
        killed(process)


# ------------------------------------------------------------------------------------------ helpers


def killed(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and wait until all processes below it are gone."""
    below = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait(PATIENCE)
    eventually(lambda: not any(map(alive, below)), lambda: str([(pid, program(pid)) for pid in below if alive(pid)]))


def program(pid: int) -> str:
    """Return the name of the program that runs as ``pid``."""
    try:
        name = Path(f"/proc/{pid}/exe").resolve().name
    except OSError:
        return ""
    return "python" if name.startswith("python") else name


def programs(pid: int) -> list[str]:
    """Return the program names of all processes below ``pid``."""
    return sorted(program(child) for child in descendants(pid))


def contains(there: list[str], wanted: tuple[str, ...]) -> bool:
    return all(there.count(name) >= wanted.count(name) for name in wanted)


def eventually(true: Callable[[], bool], otherwise: Callable[[], str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.1)

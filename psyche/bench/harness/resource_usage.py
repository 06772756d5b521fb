"""CPU time, memory and TCP traffic of a process and its descendants, from ``/proc`` and ``ss``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from psyche.bench.harness.shaped_links import Place

TICK = 1 / os.sysconf("SC_CLK_TCK")

Sockets = Mapping[str, tuple[int, int]]
"""Bytes sent (and acknowledged) and received so far, by socket."""


def tree(pid: int) -> list[int]:
    """List a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, frontier = [pid], [pid]
    while frontier:
        frontier = [child for parent in frontier for child in children.get(parent, [])]
        found += frontier
    return found


@dataclass(frozen=True)
class Usage:
    """Resources of a process tree at one moment."""

    cpu_seconds: float
    resident: Mapping[int, int]
    """Bytes by pid. A page that processes share counts for each of them."""
    proportional: int
    """Bytes. A page that processes share is divided among them (PSS)."""

    @classmethod
    def of(cls, pids: Iterable[int]) -> Usage:
        """Read the usage of ``pids`` and reset the counters of :func:`peaks`."""
        pids = list(pids)
        for pid in pids:
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
        resident = {pid: _status(pid, "VmRSS") for pid in pids}
        return cls(cpu_seconds(pids), resident, sum(_proportional(pid) for pid in pids))


def peaks(pids: Iterable[int]) -> dict[int, int]:
    """Peak resident bytes since the last :meth:`Usage.of`, by pid."""
    return {pid: _status(pid, "VmHWM") for pid in pids}


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of the processes that still run."""
    return sum((int(fields[11]) + int(fields[12])) * TICK for pid in pids if (fields := _stat(pid)))


def sockets(place: Place, pids: Iterable[int]) -> Sockets | None:
    """Read the TCP sockets of ``pids`` at ``place``. ``None`` if ``ss`` is missing or fails."""
    if shutil.which("ss") is None:
        return None
    command = place.command(["ss", "--tcp", "--info", "--numeric", "--processes", "--no-header", "--oneline"])
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        return None
    return parse_sockets(listed.stdout, frozenset(pids))


def parse_sockets(text: str, pids: frozenset[int]) -> Sockets:
    """Parse the output of ``ss`` for the sockets of ``pids``."""
    found = {}
    for line in text.splitlines():
        if pids.isdisjoint(int(pid) for pid in re.findall(r"pid=(\d+)", line)):
            continue
        ends = " ".join(line.split()[3:5])
        found[ends] = (_number("bytes_acked", line), _number("bytes_received", line))
    return found


def traffic(before: Sockets | None, after: Sockets | None) -> tuple[int, int] | None:
    """Return bytes sent and received between two readings, by the sockets of the second one."""
    if before is None or after is None:
        return None
    pairs = [(now, before.get(ends, (0, 0))) for ends, now in after.items()]
    return sum(now[0] - then[0] for now, then in pairs), sum(now[1] - then[1] for now, then in pairs)


def _number(name: str, line: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", line)
    return int(match[1]) if match else 0


def _stat(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` after the name; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _status(pid: int, name: str) -> int:
    return _kilobytes(Path(f"/proc/{pid}/status"), name)


def _proportional(pid: int) -> int:
    return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss")


def _kilobytes(path: Path, name: str) -> int:
    """Read the line ``name: … kB`` of a file in ``/proc`` as bytes; 0 if the process is gone."""
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def available_memory() -> int:
    """Return bytes that can be allocated without swapping."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable") or (
        os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )

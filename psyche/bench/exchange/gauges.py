"""What an exchange costs a process and all that it started: CPU seconds, memory, bytes through TCP."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from psyche.bench.exchange.links import Place

TICK = 1 / os.sysconf("SC_CLK_TCK")

Sockets = Mapping[str, tuple[int, int]]
"""Bytes sent (and acknowledged) and received so far, by socket."""


def tree(pid: int) -> list[int]:
    """A process and all below it, now."""
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
    """Of a process tree at one moment."""

    cpu_seconds: float
    resident: Mapping[int, int]
    """Bytes by pid. What processes share counts in each of them."""
    proportional: int
    """Bytes, with what processes share divided among them."""

    @classmethod
    def of(cls, pids: Iterable[int]) -> Usage:
        """Now; from now on, :func:`peaks` counts anew."""
        pids = list(pids)
        for pid in pids:
            with suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts at what is resident now
        resident = {pid: _status(pid, "VmRSS") for pid in pids}
        return cls(cpu_seconds(pids), resident, sum(_proportional(pid) for pid in pids))


def peaks(pids: Iterable[int]) -> dict[int, int]:
    """The most bytes that were resident since the last :meth:`Usage.of`, by pid."""
    return {pid: _status(pid, "VmHWM") for pid in pids}


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time so far, of those that still run."""
    return sum((int(fields[11]) + int(fields[12])) * TICK for pid in pids if (fields := _stat(pid)))


def sockets(place: Place, pids: Iterable[int]) -> Sockets | None:
    """The TCP sockets of those processes at ``place``; None where ``ss`` cannot say."""
    if shutil.which("ss") is None:
        return None
    command = place.command(["ss", "--tcp", "--info", "--numeric", "--processes", "--no-header", "--oneline"])
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        return None
    return parse_sockets(listed.stdout, frozenset(pids))


def parse_sockets(text: str, pids: frozenset[int]) -> Sockets:
    """What ``ss`` says of the sockets of ``pids``."""
    found = {}
    for line in text.splitlines():
        if pids.isdisjoint(int(pid) for pid in re.findall(r"pid=(\d+)", line)):
            continue
        ends = " ".join(line.split()[3:5])
        found[ends] = (_number("bytes_acked", line), _number("bytes_received", line))
    return found


def moved(before: Sockets | None, after: Sockets | None) -> tuple[int, int] | None:
    """Bytes up and down between two looks, through sockets that were there at the second."""
    if before is None or after is None:
        return None
    pairs = [(now, before.get(ends, (0, 0))) for ends, now in after.items()]
    return sum(now[0] - then[0] for now, then in pairs), sum(now[1] - then[1] for now, then in pairs)


def _number(name: str, line: str) -> int:
    match = re.search(rf"\b{name}:(\d+)", line)
    return int(match[1]) if match else 0


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` after the name; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _status(pid: int, name: str) -> int:
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def _proportional(pid: int) -> int:
    try:
        match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0

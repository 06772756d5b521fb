"""Links as slow as one likes: a network namespace for each process, joined by a bridge, shaped by ``tc tbf``.

Everything is inside namespaces of our own, the bridge too, so that nothing of the machine's own network is touched
and removing the namespaces removes it all. Linux and root are needed; without a shaped link neither is.

What is shaped are Ethernet frames, so TCP carries at most 1448/1514 = 95.6 % of a rate as payload.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from psyche.errors import PsycheError

PREFIX = "psyche-bench"
"""Of our namespaces' names; then the owner's pid and start time, and a number."""
NETWORK = "10.213.0"
"""A private range. It exists inside our namespaces only."""
MAX_PLACES = 250
DEVICE = "wire0"
"""A namespace's interface to the bridge."""
FRAME = 1514
"""Bytes of the largest Ethernet frame without its checksum: what is counted."""
BURST_SECONDS = 0.0004
"""What may go at once, as bytes at the link's rate, though three frames at least: 1 % of half a megabyte. Measured here
at 100 Mbit/s: 96.1 Mbit/s of payload over 0.5 MB, 95.6 over 50 MB. With 16 KiB the former were 98.3."""
QUEUE_SECONDS = 0.05
"""What waits at a link at most, as bytes at its rate: a home router's buffer, not a bloated one."""


@dataclass(frozen=True)
class Link:
    """Bits a second from and to one process; None: as fast as the machine."""

    up: int | None = None
    down: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a process runs, and how others reach it."""

    address: str
    """IPv4."""
    device: str
    """The interface that has it."""
    namespace: str | None = None
    hub: str = ""
    """The namespace of the bridge, and there the end of this place's wire: set down, nothing reaches it any more."""
    port: str = ""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """``arguments``, so that they run there; the process itself has the pid of the one started."""
        return list(arguments) if self.namespace is None else ["ip", "netns", "exec", self.namespace, *arguments]


def on_loopback(count: int) -> list[Place]:
    """Places on 127.0.0.1, for processes that share the machine's network and are not shaped."""
    return [Place("127.0.0.1", "lo")] * count


@contextmanager
def shaped(links: Sequence[Link]) -> Iterator[list[Place]]:
    """A place for each link, all able to reach each other. They are gone when the block is left.

    What an earlier run left behind because it was killed is removed first. Raises :class:`PsycheError` where this
    machine cannot do it.
    """
    _require_tools(len(links))
    remove_stale()
    names = [f"{PREFIX}-{_mark(os.getpid())}-{number}" for number in range(len(links) + 1)]
    hub, *spots = names
    try:
        _make_hub(hub)
        for number, (name, link) in enumerate(zip(spots, links, strict=True), 1):
            _attach(name, hub, number, link)
        yield [Place(f"{NETWORK}.{number}", DEVICE, name, hub, port_of(number)) for number, name in enumerate(spots, 1)]
    finally:
        for name in names:
            _remove(name)


def remove_stale() -> None:
    """Remove namespaces of processes that are gone. Raises :class:`PsycheError` where they cannot be removed."""
    for name in namespaces():
        owner = name.removeprefix(f"{PREFIX}-").rpartition("-")[0]
        pid = owner.partition("-")[0]
        if not (pid.isdigit() and _mark(int(pid)) == owner):
            _remove(name)


def namespaces() -> list[str]:
    """The names of all namespaces that this program ever made and that still exist."""
    folder = Path("/run/netns")
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(PREFIX)) if folder.exists() else []


def congestion_control() -> str:
    """How TCP in a new namespace finds its speed: as on this machine. Only the first namespace may choose freely."""
    path = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return path.read_text().strip() if path.exists() else "unknown"


def burst_bytes(bits: int) -> int:
    """What may go at once on a link of that rate."""
    return max(round(bits / 8 * BURST_SECONDS), 3 * FRAME)


def queue_bytes(bits: int) -> int:
    """What may wait at a link of that rate: enough for one large segment, whatever the rate."""
    return max(round(bits / 8 * QUEUE_SECONDS), 65536)


def port_of(number: int) -> str:
    """The bridge's end of the wire to the place with that number."""
    return f"port{number}"


# ------------------------------------------------------------------------------------------ helpers


def _make_hub(hub: str) -> None:
    _run("ip", "netns", "add", hub)
    _run("ip", "-n", hub, "link", "add", "hub", "type", "bridge")
    _run("ip", "-n", hub, "link", "set", "hub", "up")


def _attach(name: str, hub: str, number: int, link: Link) -> None:
    """A namespace on the bridge. Its own end of the wire shapes what goes up, the bridge's end what comes down."""
    port = port_of(number)
    _run("ip", "netns", "add", name)
    _run("ip", "-n", name, "link", "add", DEVICE, "type", "veth", "peer", "name", port, "netns", hub)
    _run("ip", "-n", hub, "link", "set", port, "master", "hub", "up")
    _run("ip", "-n", name, "address", "add", f"{NETWORK}.{number}/24", "dev", DEVICE)
    for device in ("lo", DEVICE):
        _run("ip", "-n", name, "link", "set", device, "up")
    for namespace, device, bits in ((name, DEVICE, link.up), (hub, port, link.down)):
        if bits is not None:
            limits = ["burst", str(burst_bytes(bits)), "limit", str(queue_bytes(bits))]
            _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", "rate", f"{bits}bit", *limits)


def _require_tools(count: int) -> None:
    if not sys.platform.startswith("linux"):
        raise PsycheError("shaped links need Linux; leave out --rate to measure on the loopback interface")
    if os.geteuid() != 0:
        raise PsycheError("shaped links need root; run this with sudo, or leave out --rate")
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        raise PsycheError(f"shaped links need the program {missing[0]}: apt-get install iproute2, or leave out --rate")
    if count > MAX_PLACES:
        raise PsycheError(f"at most {MAX_PLACES} processes can have links of their own, not {count}")


def _mark(pid: int) -> str:
    """A process, told apart from a later one with the same pid; empty where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{pid}-{fields[19]}"  # the 22nd field of all: start time in clock ticks since boot


def _remove(name: str) -> None:
    if name in namespaces():
        _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise PsycheError(f"shaped links cannot be made here: {' '.join(command)}: {reason}")

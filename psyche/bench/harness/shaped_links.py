"""Shaped links: a network namespace for each process, connected by a bridge and limited by ``tc tbf``.

The bridge is in a namespace, too: the machine's own network is not changed, and removing the namespaces removes
everything. Needs Linux and root. The rate limits Ethernet frames, so TCP payload reaches at most
1448/1514 = 95.6 % of it.
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
"""Namespaces are named PREFIX-pid-starttime-number after the process that owns them."""
NETWORK = "10.213.0"
"""A private range, used inside the namespaces only."""
MAX_PLACES = 250
DEVICE = "wire0"
"""The interface of a namespace to the bridge."""
FRAME = 1514
"""Bytes of the largest Ethernet frame that ``tc`` counts: without its checksum."""
BURST_SECONDS = 0.0004
"""Size of a burst, as time at the link's rate; at least three frames. At 100 Mbit/s this gives 96.1 Mbit/s of payload
over 0.5 MB and 95.6 over 50 MB (measured before 2026-12); bursts of 16 KiB gave 98.3 over 0.5 MB."""
QUEUE_SECONDS = 0.05
"""Length of a link's queue, as time at its rate: that of a home router without buffer bloat."""


@dataclass(frozen=True)
class Link:
    """Rates from and to one process, in bit/s. ``None``: not limited."""

    up: int | None = None
    down: int | None = None


@dataclass(frozen=True)
class Place:
    """Where a process runs, and the address at which others reach it."""

    address: str
    """IPv4."""
    device: str
    """The interface that has the address."""
    namespace: str | None = None
    hub: str = ""
    """The namespace of the bridge."""
    port: str = ""
    """The bridge's end of the wire to this place. Setting it down disconnects the place."""

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command that runs ``arguments`` at this place. It execs: the pid does not change."""
        return list(arguments) if self.namespace is None else ["ip", "netns", "exec", self.namespace, *arguments]


def on_loopback(count: int) -> list[Place]:
    """Return ``count`` places on 127.0.0.1, without limits."""
    return [Place("127.0.0.1", "lo")] * count


@contextmanager
def shaped(links: Sequence[Link]) -> Iterator[list[Place]]:
    """Create a place for each link, all connected with each other, and remove them at the end of the block.

    Namespaces that a killed run left behind are removed first. Raises :class:`PsycheError` if this machine cannot
    shape links.
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
    """Remove namespaces whose owner no longer runs. Raises :class:`PsycheError` if one cannot be removed."""
    for name in namespaces():
        owner = name.removeprefix(f"{PREFIX}-").rpartition("-")[0]
        pid = owner.partition("-")[0]
        if not (pid.isdigit() and _mark(int(pid)) == owner):
            _remove(name)


def namespaces() -> list[str]:
    """List the existing namespaces that were created by this module."""
    folder = Path("/run/netns")
    return sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(PREFIX)) if folder.exists() else []


def congestion_control() -> str:
    """Name TCP's congestion control. A new namespace uses that of the machine."""
    path = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return path.read_text().strip() if path.exists() else "unknown"


def burst_bytes(bits: int) -> int:
    """Return the size of a burst on a link of ``bits`` bit/s."""
    return max(round(bits / 8 * BURST_SECONDS), 3 * FRAME)


def queue_bytes(bits: int) -> int:
    """Return the queue of a link of ``bits`` bit/s: at least one large segment."""
    return max(round(bits / 8 * QUEUE_SECONDS), 65536)


def port_of(number: int) -> str:
    """Name the bridge's end of the wire to place ``number``."""
    return f"port{number}"


# ------------------------------------------------------------------------------------------ helpers


def _make_hub(hub: str) -> None:
    _run("ip", "netns", "add", hub)
    _run("ip", "-n", hub, "link", "add", "hub", "type", "bridge")
    _run("ip", "-n", hub, "link", "set", "hub", "up")


def _attach(name: str, hub: str, number: int, link: Link) -> None:
    """Connect a namespace to the bridge. Its end of the wire limits uploads, the bridge's end downloads."""
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
        raise PsycheError(f"at most {MAX_PLACES} processes can have their own links, not {count}: lower --peers")


def _mark(pid: int) -> str:
    """Identify a process by pid and start time, because pids are reused. Empty if there is no such process."""
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
        raise PsycheError(f"shaped links cannot be created here: {' '.join(command)}: {reason}")

"""The port of last time, taken again after a restart: what others remember of a node, and invites, stay good.

Where everything starts again at once nobody has an address that is new to the others to tell them.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from pathlib import Path

from psyche.durable import write_durably

PORT = "port"
_ANY = re.compile(r"/(ip[46])/([^/]+)/tcp/0(?=/|$)")
_OWN = re.compile(r"/ip[46]/[^/]+/tcp/([1-9]\d{0,4})/p2p/[^/]+")
_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}


def last_port(listen: Sequence[str], directory: Path) -> tuple[str, ...]:
    """``listen`` with the port that was used last in ``directory`` wherever any would do, if it is free there."""
    try:
        port = int((directory / PORT).read_text())
    except (OSError, ValueError):
        return tuple(listen)
    return tuple(_again(one, port) for one in listen)


def keep_port(addresses: Sequence[str], directory: Path) -> None:
    """Remember where this process listens, by its own ``addresses``, loopback last: that one no router has changed."""
    ports = [found[1] for one in addresses if (found := _OWN.fullmatch(one))]
    if ports:
        write_durably(directory / PORT, ports[-1].encode())


def _again(listen: str, port: int) -> str:
    found = _ANY.match(listen)
    if found is None:
        return listen
    with socket.socket(_FAMILIES[found[1]]) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of last time may linger
        try:
            trial.bind((found[2], port))
        except (OSError, OverflowError):
            return listen
    return f"/{found[1]}/{found[2]}/tcp/{port}{listen[found.end() :]}"

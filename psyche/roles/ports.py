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
_ANY = re.compile(r"/tcp/0(?=/|$)")
_OWN = re.compile(r"/ip4/[\d.]+/tcp/(\d{1,5})/p2p/[^/]+")


def last_port(listen: Sequence[str], directory: Path) -> tuple[str, ...]:
    """``listen`` with the port that was used last in ``directory`` wherever any would do, if it is free."""
    try:
        port = int((directory / PORT).read_text())
    except (OSError, ValueError):
        return tuple(listen)
    return tuple(_ANY.sub(f"/tcp/{port}", one) for one in listen) if _free(port) else tuple(listen)


def keep_port(addresses: Sequence[str], directory: Path) -> None:
    """Remember where this process listens, by its own ``addresses``, loopback last: that one no router has changed."""
    ports = [found[1] for one in addresses if (found := _OWN.fullmatch(one))]
    if ports:
        write_durably(directory / PORT, ports[-1].encode())


def _free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of last time may linger
        try:
            trial.bind(("", port))
        except (OSError, OverflowError):
            return False
    return True

"""Multiaddresses as text, and the port a node listens at; does not load hivemind (which loads torch, in seconds)."""

from __future__ import annotations

import errno
import ipaddress
import re
import socket
from collections.abc import Sequence
from pathlib import Path

from psyche.durable import write_durably
from psyche.errors import PsycheError

PEER_ID = re.compile(r"12D3Koo[1-9A-HJ-NP-Za-km-z]{45}")
"""An Ed25519 PeerID. Its base58 is always 52 characters long and starts so."""

MAX_ADDRESS = 256
"""Characters of an address."""
MAX_ADDRESSES = 16
"""Addresses in an invite, and addresses of its own that a node remembers."""
PORT = "port"
"""Name of the file, in a node's directory, with the port it listened at last."""
_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")
_ANY_PORT = re.compile(r"/(ip[46])/([^/]+)/tcp/0(?=/|$)")
_OWN = re.compile(r"/ip[46]/[^/]+/tcp/([1-9]\d{0,4})/p2p/[^/]+")
_FAMILIES = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}


def split_address(text: str) -> tuple[str, str]:
    """``/ip4/203.0.113.7/tcp/4001/p2p/12D3Koo…`` as (everything before the last ``/p2p/``, PeerID).

    Also takes ip6 and dns hosts, QUIC, and addresses through a relay. Raises ValueError with a short reason.
    """
    if len(text) > MAX_ADDRESS:
        raise ValueError("the address is too long")
    transport, found, peer_id = text.rpartition("/p2p/")
    if not found:
        raise ValueError("/p2p/<PeerID> is missing at its end")
    if not PEER_ID.fullmatch(peer_id):
        raise ValueError(f"{peer_id!r} is not a PeerID of an Ed25519 key")
    direct = transport
    if transport.endswith("/p2p-circuit"):
        direct, _ = split_address(transport.removesuffix("/p2p-circuit"))
    _check_transport(direct)
    return transport, peer_id


def peer_of(text: str) -> str:
    """Return the PeerID that an address ends with. Raises ValueError as :func:`split_address` does."""
    return split_address(text)[1]


def is_loopback(text: str) -> bool:
    """Return whether only this machine can use the address."""
    parts = text.split("/")
    return len(parts) > 2 and parts[1] in ("ip4", "ip6") and ipaddress.ip_address(parts[2]).is_loopback


def with_last_port(listen: Sequence[str], directory: Path) -> tuple[str, ...]:
    """``listen`` with every port 0 replaced by the port last used in ``directory``, if that is free.

    A node that keeps its port is found again through what peers remember of it, and through old invites.
    """
    try:
        port = int((directory / PORT).read_text())
    except (OSError, ValueError):
        return tuple(listen)
    return tuple(_with_port(one, port) for one in listen)


def save_port(addresses: Sequence[str], directory: Path) -> None:
    """Save the port of this process's ``addresses`` (loopback last: no router has changed the port of that one)."""
    ports = [found[1] for one in addresses if (found := _OWN.fullmatch(one))]
    if ports:
        write_durably(directory / PORT, ports[-1].encode())


def check_port_free(address: str) -> None:
    """Raise :class:`PsycheError` where a TCP port is taken.

    p2pd listens with SO_REUSEPORT: a second one on the same port starts without complaint and takes half of the
    first one's callers, which then find the wrong PeerID.
    """
    match = re.fullmatch(r"/ip([46])/([^/]+)/tcp/(\d{1,5})", address)
    if not match or not 0 < int(match[3]) < 65536:
        return
    with socket.socket(_FAMILIES[f"ip{match[1]}"]) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((match[2], int(match[3])))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                message = f"port {match[3]} is in use by another program; choose another with --port"
                raise PsycheError(message) from None
            if error.errno == errno.EACCES:
                raise PsycheError(f"port {match[3]} needs root; choose one above 1023 with --port") from None


def _with_port(listen: str, port: int) -> str:
    found = _ANY_PORT.match(listen)
    if found is None:
        return listen
    with socket.socket(_FAMILIES[found[1]]) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may linger
        try:
            probe.bind((found[2], port))
        except (OSError, OverflowError):
            return listen
    return f"/{found[1]}/{found[2]}/tcp/{port}{listen[found.end() :]}"


def _check_transport(text: str) -> None:
    parts = text.split("/")
    if len(parts) not in (5, 6) or parts[0]:
        raise ValueError("it does not read /<ip4|ip6|dns|dns4|dns6>/<host>/<tcp|udp>/<port>")
    _, family, host, protocol, port, *rest = parts
    if not _host_fits(family, host):
        raise ValueError(f"{host!r} is not a valid host for /{family}")
    if (protocol, rest) not in (("tcp", []), ("udp", ["quic"]), ("udp", ["quic-v1"])):
        raise ValueError("the transport must be tcp/<port> or udp/<port>/quic-v1")
    if not _PORT.fullmatch(port) or not 0 < int(port) < 65536:
        raise ValueError(f"{port!r} is not a port")


def _host_fits(family: str, host: str) -> bool:
    try:
        if family == "ip4":
            return str(ipaddress.IPv4Address(host)) == host
        if family == "ip6":
            return ipaddress.IPv6Address(host).scope_id is None
    except ValueError:
        return False
    return family in ("dns", "dns4", "dns6") and _HOST.fullmatch(host) is not None

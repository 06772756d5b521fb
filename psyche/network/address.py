"""Multiaddresses of nodes, as text, checked without loading hivemind (which loads torch, which takes seconds)."""

from __future__ import annotations

import ipaddress
import re

PEER_ID = re.compile(r"12D3Koo[1-9A-HJ-NP-Za-km-z]{45}")
"""An Ed25519 PeerID. Its base58 is always 52 characters long and starts so."""

MAX_ADDRESS = 256
_HOST = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*")
_PORT = re.compile(r"0|[1-9][0-9]{0,4}")


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
    """The PeerID that an address ends with. Raises ValueError as :func:`split_address` does."""
    return split_address(text)[1]


def is_loopback(text: str) -> bool:
    """Whether only this machine can use the address."""
    parts = text.split("/")
    return len(parts) > 2 and parts[1] in ("ip4", "ip6") and ipaddress.ip_address(parts[2]).is_loopback


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

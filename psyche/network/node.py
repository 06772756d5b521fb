"""A node on the network: a libp2p daemon, a DHT node, calls and blobs, all in the caller's event loop.

Only ``processes``, which construct it, import this module; other rooms use :class:`~psyche.network.transport.Network`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import base58
from hivemind.dht.node import DHTNode
from hivemind.dht.protocol import ValidationError
from hivemind.p2p import PeerID
from hivemind.proto import p2pd_pb2
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from psyche.errors import PsycheError
from psyche.network.address import is_loopback, split_address
from psyche.network.bandwidth import Traffic
from psyche.network.daemon import Daemon, DaemonError
from psyche.network.discovery import REPEAT_SECONDS, TTL_SECONDS, Discovery, encode_addresses
from psyche.network.identity import Identity
from psyche.network.libp2p_transport import Libp2pTransport
from psyche.network.records import NoCache, RecordTable, RecordValidator
from psyche.network.rpc import Rpc
from psyche.network.streams import Streams, dial_reason

BOOTSTRAP_SECONDS = 8.0
"""Time to connect to the bootstrap nodes, all at once. With start and pings, creating a node takes up to 15 s."""
GRACE_SECONDS = 1.0
"""How much longer the other bootstrap nodes have once one has answered."""
REPORTED_FAILURES = 4
"""Bootstrap nodes whose failure is reported in full."""
MAX_RELAYS = 32
"""Relay addresses passed to the daemon on its command line."""
DHT_SECONDS = 3.0
"""Timeout of one DHT request."""
BLACKLIST_SECONDS = 30.0
"""An unresponsive peer is left out of DHT searches for so long, then for twice as long, and so on: each of its
timeouts costs a search DHT_SECONDS."""
PINGS = 2
"""Attempts: a bootstrap node on a loaded machine may miss one ping."""
OPEN_FILES = 8192
"""Every stream is a socket; many systems allow a process 1024 files unless it asks for more."""

log = logging.getLogger(__name__)


class NetworkNode:
    """Create it with :meth:`create`. Its parts are ``rpc``, ``blobs``, ``discovery`` and ``streams``.

    It runs in the event loop that created it, which must run on the main thread (see :class:`Daemon`).
    """

    def __init__(
        self,
        identity: Identity,
        daemon: Daemon,
        dht: Any,
        run_id: bytes,
        kinds: Sequence[str],
        *,
        spool: Path | None = None,
        max_upload: float | None = None,
        max_download: float | None = None,
    ) -> None:
        self.peer_id = identity.peer_id
        self.p2p, self.dht = daemon.p2p, dht
        self.streams = Streams(daemon, identity.peer_id)
        self.rpc = Rpc(self.streams)
        self.blobs = Libp2pTransport(self.streams, daemon.control, spool, max_upload, max_download)
        self.discovery = Discovery(dht, identity, run_id, kinds)
        self._daemon = daemon

    @classmethod
    async def create(
        cls,
        identity: Identity,
        *,
        run_id: bytes,
        kinds: Sequence[str],
        listen: Sequence[str],
        announce: Sequence[str] = (),
        bootstrap: Sequence[str] = (),
        remembered: Sequence[str] = (),
        relay: bool = True,
        spool: Path | None = None,
        max_upload: float | None = None,
        max_download: float | None = None,
    ) -> Self:
        """Start a node of the run ``run_id`` (32 bytes) and join the others through ``bootstrap``.

        ``kinds``: the kinds of announcements that nodes of this run make. ``listen``: multiaddresses to listen at
        (``/ip4/0.0.0.0/tcp/0`` picks a free port). ``announce``: addresses to publish instead of those. ``bootstrap``:
        addresses, ending in ``/p2p/<PeerID>``, of nodes in the run; a node with none but its own is the first.
        ``remembered``: addresses of peers from an earlier start, used like ``bootstrap``, but without ``bootstrap`` it
        is no error if none of them answers. ``relay``: a node that others cannot dial is reached through its bootstrap
        nodes, and relays for others unless ``max_upload`` is set. ``spool``: directory of blobs being transferred.
        ``max_upload``, ``max_download``: limits for blobs in bytes per second.

        Raises :class:`PsycheError`, within about 15 seconds, where it cannot listen or no bootstrap node answers
        (:class:`BootstrapError`).
        """
        configure_logging()
        _allow_open_files()
        invited = _by_peer(bootstrap, identity.peer_id)
        peers = _by_peer([*bootstrap, *remembered], identity.peer_id)
        known = [f"{address}/p2p/{peer_id}" for peer_id, addresses in peers.items() for address in addresses]
        relays = [address for address in known if "/p2p-circuit" not in address][:MAX_RELAYS] if relay else []
        # The daemon's relay cannot be rate-limited, so a node with a limit does not relay.
        serves = relay and max_upload is None
        daemon = await Daemon.start(identity, listen, announce, relays, relays_others=serves)
        dht = None
        try:
            dht = await _dht_node(daemon.p2p, RecordValidator(run_id, kinds))
            node = cls(
                identity,
                daemon,
                dht,
                run_id,
                kinds,
                spool=spool,
                max_upload=max_upload,
                max_download=max_download,
            )
            await node.blobs.start()
            if peers:
                await node._join(peers, needed=bool(invited))
        except BaseException:
            if dht is not None:
                await _quit_dht(dht)
            await daemon.close()
            raise
        return node

    def prefer(self, preferred: Callable[[str], bool]) -> None:
        self.streams.preferred = preferred

    @property
    def traffic(self) -> Traffic:
        """Bytes of calls and blobs, both ways."""
        return self.streams.traffic

    @property
    def alive(self) -> bool:
        """Whether the daemon is running. If not, the node is unusable: close it and create another."""
        return self._daemon.alive

    async def addresses(self) -> list[str]:
        """Multiaddresses at which others can reach this node, each ending in ``/p2p/<PeerID>``; loopback last."""
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY)
        response, _, writer = await self._daemon.request(request, BOOTSTRAP_SECONDS)
        writer.close()
        known = [f"{Multiaddr(raw)}/p2p/{self.peer_id}" for raw in response.identify.addrs]
        return sorted(dict.fromkeys(known), key=is_loopback)

    async def connected(self) -> dict[str, list[str]]:
        """Peers connected now: PeerID -> remote ends of the connections, which others may not be able to dial.

        Raises :class:`PsycheError`, or TimeoutError where the daemon is overloaded.
        """
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)
        response, _, writer = await self._daemon.request(request, BOOTSTRAP_SECONDS)
        writer.close()
        found: dict[str, list[str]] = {}
        for peer in response.peers:
            ends = found.setdefault(base58.b58encode(peer.id).decode(), [])
            ends += [str(Multiaddr(raw)) for raw in peer.addrs]
        return found

    async def connect(self, addresses: Sequence[str]) -> dict[str, str]:
        """Connect to the peers at ``addresses`` (with PeerIDs), all at once; return PeerID -> reason of each failure.

        Needed where the DHT cannot know a peer's address: for bootstrap nodes, and after a long absence.
        Raises :class:`PsycheError` for an invalid address.
        """
        peers = _by_peer(addresses, self.peer_id)
        failures = await asyncio.gather(*(self._dial(peer_id, where) for peer_id, where in peers.items()))
        return {peer_id: reason for peer_id, reason in zip(peers, failures, strict=True) if reason is not None}

    async def announce(self, kind: str) -> None:
        """Announce this node as ``kind``, with its addresses, until cancelled."""
        while True:
            with contextlib.suppress(TimeoutError):  # the daemon is overloaded: the next time is soon enough
                await self.discovery.announce(kind, encode_addresses(await self.addresses()), TTL_SECONDS)
            await asyncio.sleep(REPEAT_SECONDS)

    async def sources(self, first: Sequence[str]) -> list[str]:
        """PeerIDs to ask for content-addressed data: ``first``, then every announced peer; connected peers lead.

        Peers that would have to be dialled come last, because an old invite may name many that are gone.
        """
        known = dict.fromkeys([*first, *sorted(await self.discovery.announced())])
        connected = await self.connected()
        return sorted((peer for peer in known if peer != self.peer_id), key=lambda peer: peer not in connected)

    async def close(self) -> None:
        """Stop serving, then end the daemon."""
        self.rpc.close()
        await self.streams.close()
        self.blobs.close()
        await _quit_dht(self.dht)
        await self._daemon.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _dial(self, peer_id: str, addresses: Sequence[str]) -> str | None:
        """Connect to one peer; return the reason if that fails."""
        connect = p2pd_pb2.ConnectRequest(
            peer=base58.b58decode(peer_id),
            addrs=[Multiaddr(address).to_bytes() for address in addresses],
            timeout=round(BOOTSTRAP_SECONDS),
        )
        try:
            request = p2pd_pb2.Request(type=p2pd_pb2.Request.CONNECT, connect=connect)
            _, _, writer = await self._daemon.request(request, BOOTSTRAP_SECONDS)
        except TimeoutError:
            return "no answer"
        except DaemonError as error:
            return dial_reason(str(error))
        writer.close()
        return None

    async def _join(self, peers: dict[str, list[str]], *, needed: bool) -> None:
        """Connect to the bootstrap nodes and enter the DHT through those that answer first.

        ``DHTNode.create`` would fail where one of several disagrees, or wait for all of them.
        """
        pending = {asyncio.create_task(self._connect_and_ping(peer_id, where)) for peer_id, where in peers.items()}
        failures: list[str] = []
        answered = False
        try:
            while pending and not answered:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                reasons = [task.result() for task in done]
                failures += [reason for reason in reasons if reason is not None]
                answered = None in reasons
            if pending:
                await asyncio.wait(pending, timeout=GRACE_SECONDS)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        if answered:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DHT_SECONDS):
                    await self.dht.find_nearest_nodes([self.dht.node_id])
        elif needed:
            raise BootstrapError(_no_bootstrap(failures))

    async def _connect_and_ping(self, peer_id: str, addresses: list[str]) -> str | None:
        """Connect to one bootstrap node and ping its DHT node; return the reason if either fails."""
        where = f"{addresses[0]}/p2p/{peer_id}"
        reason = await self._dial(peer_id, addresses)
        if reason is not None:
            return f"{where}: {reason}"
        try:
            for _ in range(PINGS):
                if await self.dht.protocol.call_ping(PeerID.from_base58(peer_id), validate=True) is not None:
                    return None
        except ValidationError as error:
            if "local time" in str(error):
                return f"{where}: its clock and this machine's differ by over 3 s (synchronise this one by NTP)"
            return f"{where}: it cannot connect back to this machine (open the listening port in the firewall)"
        return f"{where}: it answers, but is not a psyche node of this run"


class BootstrapError(PsycheError):
    """No bootstrap node or remembered peer answered."""


def _no_bootstrap(failures: list[str]) -> str:
    """Return the error message for a start that no bootstrap node answered."""
    listed = "; ".join(failures[:REPORTED_FAILURES])
    more = f"; and {len(failures) - REPORTED_FAILURES} more" if len(failures) > REPORTED_FAILURES else ""
    return (
        f"none of {len(failures)} bootstrap nodes could be joined: {listed}{more}. "
        "Check this machine's network connection, or ask the run's operator or any member for a new invite "
        "(they run: psyche invite)"
    )


def configure_logging() -> None:
    """Keep hivemind's and libp2p's log output off the terminal unless ``PSYCHE_LOG=debug`` is set."""
    use_hivemind_log_handler("nowhere")
    if os.environ.get("PSYCHE_LOG", "").lower() == "debug":
        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
        for name in ("hivemind", "psyche.network"):
            logging.getLogger(name).setLevel(logging.DEBUG)
    else:
        logging.getLogger("hivemind").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").addFilter(_not_hivemind)


def _not_hivemind(record: logging.LogRecord) -> bool:
    """Filter out tracebacks of tasks that hivemind abandons, which peers can make fail.

    A cancelled search leaves behind a task that waits for an event; psyche creates no such task.
    """
    text = record.getMessage()
    return "/hivemind/" not in text and "coro=<Event.wait()" not in text


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _by_peer(addresses: Sequence[str], own: str) -> dict[str, list[str]]:
    """Addresses without their PeerID, by PeerID; this node's own are left out."""
    peers: dict[str, list[str]] = {}
    for text in addresses:
        try:
            transport, peer_id = split_address(text)
        except ValueError as error:
            raise PsycheError(f"invalid address {text[:120]!r}: {error}") from None
        if peer_id != own:
            peers.setdefault(peer_id, []).append(transport)
    return peers


async def _dht_node(p2p: Any, validator: RecordValidator) -> Any:
    dht = await DHTNode.create(
        p2p,
        record_validator=validator,
        wait_timeout=DHT_SECONDS,
        blacklist_time=BLACKLIST_SECONDS,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,
    )
    dht.protocol.storage, dht.protocol.cache = RecordTable(), NoCache()
    return dht


async def _quit_dht(dht: Any) -> None:
    with contextlib.suppress(Exception):  # the daemon may have ended already, and its handlers with it
        await asyncio.wait_for(dht.shutdown(), DHT_SECONDS)

"""One node on the network: a libp2p daemon, a DHT node, calls and blobs, all in the caller's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
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
from psyche.network.blobs import BlobServer
from psyche.network.daemon import Daemon, DaemonError
from psyche.network.discovery import Discovery
from psyche.network.identity import Identity
from psyche.network.limits import Limiter
from psyche.network.records import NoCache, RecordTable, RecordValidator
from psyche.network.rpc import Rpc
from psyche.network.spool import Spool
from psyche.network.streams import CALLS_PER_PEER, Streams, dial_reason
from psyche.network.traffic import Traffic

BOOTSTRAP_SECONDS = 8.0
"""How long bootstrap nodes have to be connected to, all at once. With start and pings it stays around 15 s."""
SLOWER_SECONDS = 1.0
"""How much longer the others have once one has answered."""
SHOWN = 4
"""Bootstrap nodes whose failure is told in full."""
MAX_RELAYS = 32
"""Addresses of relays: what the daemon is told on its command line."""
DHT_SECONDS = 3.0
"""How long one DHT request may take."""
SILENT_SECONDS = 30.0
"""A peer that did not answer is left out of DHT searches for so long, then twice as long, and so on. Each costs a
search DHT_SECONDS."""
DOWNLOADS = 128
"""Streams that blobs are fetched over at once, a thread and a chunk in memory each; more wait their turn."""
PINGS = 2
"""A bootstrap node on a loaded machine may miss one."""
OPEN_FILES = 8192
"""Every stream is a socket; many systems allow a process 1024 files unless it asks for more."""

log = logging.getLogger(__name__)


class NetworkNode:
    """Made by :meth:`create`. ``peer_id`` names it; ``rpc``, ``blobs``, ``discovery`` and ``streams`` are its parts.

    Everything runs in the loop that created it, which must run on the main thread (see :class:`Daemon`).
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
        self.spool = Spool(spool)
        self.blobs = BlobServer(self.streams, Limiter(max_upload))
        self.download_limit = Limiter(max_download)
        self._turns: dict[str, threading.Semaphore] = {}
        self.downloads = ThreadPoolExecutor(DOWNLOADS, "download")
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

        ``kinds`` are the kinds of announcements this run's nodes make; ``listen`` are multiaddresses to listen at
        (``/ip4/0.0.0.0/tcp/0`` takes a free port), ``announce`` those to tell others instead, ``bootstrap`` those,
        ending in ``/p2p/<PeerID>``, of nodes already there. With none but its own it is the first.
        ``remembered`` are addresses of peers from an earlier start: as good as ``bootstrap``, but if none was given
        it is no error that none of them answers.
        With ``relay`` a node that the others find they cannot dial is reached through those it joined by, and does the
        same for others unless ``max_upload`` is set.
        Blobs on their way are kept in ``spool``; they use at most ``max_upload`` and ``max_download`` bytes a second.
        Raises :class:`PsycheError` within about 15 seconds where it cannot listen or nobody answers.
        """
        quieten()
        _allow_open_files()
        invited = _by_peer(bootstrap, identity.peer_id)
        peers = _by_peer([*bootstrap, *remembered], identity.peer_id)
        known = [f"{address}/p2p/{peer_id}" for peer_id, addresses in peers.items() for address in addresses]
        relays = [address for address in known if "/p2p-circuit" not in address][:MAX_RELAYS] if relay else []
        # The daemon's relay knows of no limit: whoever has set one is no relay.
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

    @property
    def traffic(self) -> Traffic:
        """Bytes of calls and blobs, both ways."""
        return self.streams.traffic

    def download_turns(self, peer_id: str) -> threading.Semaphore:
        """Held while a stream to ``peer_id`` is open for a blob: it serves so many of ours at once, and no more."""
        return self._turns.setdefault(peer_id, threading.Semaphore(CALLS_PER_PEER))

    @property
    def control(self) -> Path:
        """The daemon's control socket."""
        return self._daemon.control

    @property
    def alive(self) -> bool:
        """Whether the daemon runs. If it does not, the node is lost: close it and create another."""
        return self._daemon.alive

    async def addresses(self) -> list[str]:
        """Where others can reach this node, each ending in ``/p2p/<PeerID>``; loopback last."""
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.IDENTIFY)
        response, _, writer = await self._daemon.request(request, BOOTSTRAP_SECONDS)
        writer.close()
        known = [f"{Multiaddr(raw)}/p2p/{self.peer_id}" for raw in response.identify.addrs]
        return sorted(dict.fromkeys(known), key=is_loopback)

    async def connected(self) -> dict[str, list[str]]:
        """The peers that this node is connected to now: PeerID -> far ends of the connections, which need not be
        addresses that others can dial. Raises :class:`PsycheError`, or TimeoutError where the daemon is overloaded."""
        request = p2pd_pb2.Request(type=p2pd_pb2.Request.LIST_PEERS)
        response, _, writer = await self._daemon.request(request, BOOTSTRAP_SECONDS)
        writer.close()
        found: dict[str, list[str]] = {}
        for peer in response.peers:
            ends = found.setdefault(base58.b58encode(peer.id).decode(), [])
            ends += [str(Multiaddr(raw)) for raw in peer.addrs]
        return found

    async def connect(self, addresses: Sequence[str]) -> dict[str, str]:
        """Connect to the peers at ``addresses`` (with PeerIDs), all at once: those that failed, and why.

        Needed where the DHT cannot know a peer's address: for bootstrap nodes, and again when one was away long.
        Raises :class:`PsycheError` for an address that is not valid.
        """
        peers = _by_peer(addresses, self.peer_id)
        failures = await asyncio.gather(*(self._dial(peer_id, where) for peer_id, where in peers.items()))
        return {peer_id: reason for peer_id, reason in zip(peers, failures, strict=True) if reason is not None}

    async def close(self) -> None:
        """Leave: stop serving, then end the daemon."""
        self.rpc.close()
        await self.streams.close()
        self.blobs.close()
        self.downloads.shutdown(wait=False, cancel_futures=True)
        await _quit_dht(self.dht)
        await self._daemon.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _dial(self, peer_id: str, addresses: Sequence[str]) -> str | None:
        """Connect to one peer; the reason if that fails."""
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

        ``DHTNode.create`` would give up where one of several disagrees, or wait for all of them.
        """
        pending = {asyncio.create_task(self._greet(peer_id, where)) for peer_id, where in peers.items()}
        failures: list[str] = []
        answered = False
        try:
            while pending and not answered:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                reasons = [task.result() for task in done]
                failures += [reason for reason in reasons if reason is not None]
                answered = None in reasons
            if pending:
                await asyncio.wait(pending, timeout=SLOWER_SECONDS)
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        if answered:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DHT_SECONDS):
                    await self.dht.find_nearest_nodes([self.dht.node_id])
        elif needed:
            raise NobodyThere(_nobody(failures))

    async def _greet(self, peer_id: str, addresses: list[str]) -> str | None:
        """Connect to one bootstrap node and ping its DHT node; the reason if either fails."""
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
                return f"{where}: its clock and this machine's differ by more than 3 s (set this one by NTP)"
            return f"{where}: it cannot reach this machine back (open the listening port in the firewall)"
        return f"{where}: it answers, but not as a psyche node"


class NobodyThere(PsycheError):
    """None of the addresses that a node has of others answered."""


def _nobody(failures: list[str]) -> str:
    """A person's sentence for a start that nobody answered."""
    shown = "; ".join(failures[:SHOWN])
    more = f"; and {len(failures) - SHOWN} more" if len(failures) > SHOWN else ""
    return (
        f"no bootstrap node could be joined, {len(failures)} tried: {shown}{more}. "
        "Check this machine's network, or ask the run's operator or any member (psyche invite) for a new invite"
    )


def quieten() -> None:
    """Keep hivemind's and libp2p's chatter out of the user's terminal; ``PSYCHE_LOG=debug`` lets all of it through."""
    use_hivemind_log_handler("nowhere")
    if os.environ.get("PSYCHE_LOG", "").lower() == "debug":
        logging.basicConfig(format="%(asctime)s %(name)s: %(message)s")
        for name in ("hivemind", "psyche.network"):
            logging.getLogger(name).setLevel(logging.DEBUG)
    else:
        logging.getLogger("hivemind").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").addFilter(_not_hivemind)


def _not_hivemind(record: logging.LogRecord) -> bool:
    """hivemind drops tasks without looking at them, and a peer can make them fail: no tracebacks for that.

    A search that is given up leaves behind a task that waits for an event; we make none of those.
    """
    text = record.getMessage()
    return "/hivemind/" not in text and "coro=<Event.wait()" not in text


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _by_peer(addresses: Sequence[str], own: str) -> dict[str, list[str]]:
    """Addresses without their PeerID, by PeerID; ours left out."""
    peers: dict[str, list[str]] = {}
    for text in addresses:
        try:
            transport, peer_id = split_address(text)
        except ValueError as error:
            raise PsycheError(f"the address {text[:120]!r} is not valid: {error}") from None
        if peer_id != own:
            peers.setdefault(peer_id, []).append(transport)
    return peers


async def _dht_node(p2p: Any, validator: RecordValidator) -> Any:
    dht = await DHTNode.create(
        p2p,
        record_validator=validator,
        wait_timeout=DHT_SECONDS,
        blacklist_time=SILENT_SECONDS,
        cache_locally=False,
        cache_nearest=0,
        cache_on_store=False,
        cache_refresh_before_expiry=0,
        reuse_get_requests=False,
    )
    dht.protocol.storage, dht.protocol.cache = RecordTable(), NoCache()
    return dht


async def _quit_dht(dht: Any) -> None:
    with contextlib.suppress(Exception):  # the daemon may be gone already; then so are its handlers
        await asyncio.wait_for(dht.shutdown(), DHT_SECONDS)

"""Streams between peers: every read is bounded, every wait has a limit, every byte is counted.

A stream carries bytes over libp2p. Both sides speak in fixed-length fields and frames (u32 length + bytes); the
length is checked before the bytes are read. What a server sends starts with a status byte: OK, or REFUSED and a
reason. Half-closing is not used: the daemon takes the end of one direction for the end of both. So the server
lingers until the caller, who knows when it has everything, hangs up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import base58
from hivemind.proto import p2pd_pb2
from typing_extensions import Buffer

from psyche.errors import PsycheError
from psyche.network.address import PEER_ID
from psyche.network.bandwidth import Traffic
from psyche.network.daemon import Daemon, DaemonError
from psyche.network.transport import STALL_SECONDS, Busy, Refused, Unreachable, Violation

PROGRESS = 1 << 14
"""Bytes that must move within every ``stall`` seconds."""
REQUEST_SECONDS = 10.0
"""A caller's first bytes must arrive within this; a stream held open for nothing costs a slot."""
DIAL_SECONDS = 10.0
LINGER_SECONDS = 2.0
MAX_REASON = 200
MAX_CODE = 32
"""Bytes of a refusal's code."""

CALLS_PER_PEER = 8
"""Streams one of ours keeps open to one peer, for one protocol; more wait their turn."""
SERVED_PER_PEER = 2 * CALLS_PER_PEER
"""Twice what an honest caller opens, because we learn that a stream ended a little later than it does."""

OK, REFUSED = 0, 1
PROTOCOL_PREFIX = "/psyche/1/"

log = logging.getLogger(__name__)


class Stream:
    """One open stream to or from ``peer_id``. Reads and writes raise :class:`Unreachable` when it ends or stalls."""

    def __init__(
        self,
        peer_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        traffic: Traffic,
        closed: Callable[[], None] = lambda: None,
    ) -> None:
        """``closed`` is called when this side hangs up."""
        self.peer_id = peer_id
        self._reader, self._writer, self._traffic, self._closed = reader, writer, traffic, closed

    def close(self) -> None:
        """Hang up, once."""
        self._writer.close()
        self._closed()
        self._closed = lambda: None

    async def read(self, size: int, stall: float) -> bytes:
        """Exactly ``size`` bytes."""
        data = bytearray(size)
        await self.read_into(memoryview(data), stall)
        return bytes(data)

    async def read_into(self, target: memoryview, stall: float) -> None:
        """Fill ``target``. Gives up when ``stall`` seconds bring neither PROGRESS bytes nor the rest of it."""
        got = mark = 0
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(stall) as clock:
                while got < len(target):
                    piece = await self._reader.read(len(target) - got)
                    if not piece:
                        raise Unreachable(self.peer_id, "closed the connection")
                    target[got : got + len(piece)] = piece
                    got += len(piece)
                    self._traffic.down(self.peer_id, len(piece))
                    if got - mark >= PROGRESS:
                        mark = got
                        clock.reschedule(loop.time() + stall)
        except TimeoutError:
            raise Unreachable(self.peer_id, f"stalled (under {PROGRESS} bytes in {stall:g} s)") from None
        except OSError:
            raise Unreachable(self.peer_id, "closed the connection") from None

    async def read_frame(self, limit: int, stall: float) -> bytes:
        """Return a frame of at most ``limit`` bytes; a longer one raises :class:`Violation` before it is read."""
        size = int.from_bytes(await self.read(4, stall), "big")
        if size > limit:
            raise Violation(f"a message over the limit of {limit} bytes")
        return await self.read(size, stall)

    async def read_request(self, limit: int) -> bytes:
        """Server: the caller's first frame, which must be here in full within REQUEST_SECONDS."""
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                return await self.read_frame(limit, REQUEST_SECONDS)
        except TimeoutError:
            raise Unreachable(self.peer_id, "was too slow to send its request") from None

    async def next_request(self, limit: int) -> bytes | None:
        """Server: another frame of a caller that may hang up instead; None if it does, or is silent for too long."""
        try:
            return await self.read_frame(limit, STALL_SECONDS)
        except Unreachable:
            return None

    async def write(self, *parts: Buffer, stall: float = STALL_SECONDS) -> None:
        """Send ``parts`` in order; the peer must take PROGRESS bytes every ``stall`` seconds."""
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                for start in range(0, len(view), PROGRESS):
                    piece = view[start : start + PROGRESS]
                    self._writer.write(piece)
                    self._traffic.up(self.peer_id, len(piece))
                    async with asyncio.timeout(stall):
                        await self._writer.drain()
        except TimeoutError:
            raise Unreachable(self.peer_id, f"took under {PROGRESS} bytes in {stall:g} s") from None
        except OSError:
            raise Unreachable(self.peer_id, "closed the connection") from None

    async def write_frame(self, data: bytes) -> None:
        """Send a frame."""
        await self.write(len(data).to_bytes(4, "big") + data)

    async def accept(self) -> None:
        """Server: announce that what was asked for follows."""
        await self.write(bytes((OK,)))

    async def refuse(self, reason: str, code: str = "", *, busy: bool = False) -> None:
        """Server: refuse the request."""
        text = reason.encode()[:MAX_REASON].decode(errors="ignore").encode()
        label = code.encode("ascii", "replace")[:MAX_CODE]
        await self.write(bytes((REFUSED, busy, len(label), len(text))) + label + text, stall=LINGER_SECONDS)

    async def expect(self, stall: float) -> None:
        """Caller: return if the server accepts, raise :class:`Refused` (or Busy) with its reason if not."""
        status = (await self.read(1, stall))[0]
        if status == REFUSED:
            busy, *sizes = await self.read(3, stall)
            raise refusal(busy, sizes, await self.read(refusal_size(sizes), stall))
        if status != OK:
            raise Violation(f"status byte {status}")

    @property
    def descriptor(self) -> int:
        """Descriptor of the socket to the daemon. It must have one writer only."""
        return int(self._writer.get_extra_info("socket").fileno())

    async def linger(self) -> None:
        """Server: wait a moment for the caller to hang up; hanging up first may destroy what it has not read."""
        with contextlib.suppress(TimeoutError, OSError):
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._reader.read(PROGRESS):
                    pass


class Streams:
    """Opens and serves streams of one node. ``rejections`` counts, by reason, what callers were refused."""

    def __init__(self, daemon: Daemon, peer_id: str) -> None:
        self.peer_id = peer_id
        self.traffic = Traffic()
        self.rejections: Counter[str] = Counter()
        self._daemon = daemon
        self._gates: dict[tuple[str, str], asyncio.Semaphore] = {}
        self._serving: dict[str, dict[str, list[asyncio.Task[Any]]]] = {}
        """Streams that are served, by name of the server and PeerID, the oldest first."""
        self._evicted: set[asyncio.Task[Any]] = set()
        self.preferred: Callable[[str], bool] = lambda peer_id: False
        """Returns whether a peer is served before others; the actor that owns this node sets it."""
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    @contextlib.asynccontextmanager
    async def open(self, peer_id: str, name: str) -> AsyncIterator[Stream]:
        """:meth:`dial`, and hang up at the end of the block."""
        stream = await self.dial(peer_id, name)
        try:
            yield stream
        finally:
            stream.close()

    async def dial(self, peer_id: str, name: str) -> Stream:
        """Return a stream to the server ``name`` at ``peer_id``, which the caller closes.

        Waits while CALLS_PER_PEER are open, then at most DIAL_SECONDS for the peer to answer. Raises
        :class:`Unreachable`, or :class:`Refused` where the peer has no such server.
        """
        if not PEER_ID.fullmatch(peer_id):
            raise Unreachable(peer_id[:80], "is not a PeerID")
        gate = self._gates.setdefault((peer_id, name), asyncio.Semaphore(CALLS_PER_PEER))
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(
                peer=base58.b58decode(peer_id), proto=[PROTOCOL_PREFIX + name], timeout=round(DIAL_SECONDS)
            ),
        )
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(gate)
            try:
                _, reader, writer = await self._daemon.request(request, DIAL_SECONDS)
            except TimeoutError:
                raise Unreachable(peer_id, f"did not answer within {DIAL_SECONDS:g} s") from None
            except DaemonError as error:
                if "protocols not supported" in str(error):
                    raise Refused(f"it does not serve {name}") from None
                raise Unreachable(peer_id, f"cannot be reached: {dial_reason(str(error))}") from None
            stack.pop_all()  # the gate is the stream's now
            return Stream(peer_id, reader, writer, self.traffic, gate.release)

    async def serve(self, name: str, handler: Callable[[Stream], Awaitable[None]], *, at_once: int) -> None:
        """Answer streams opened for ``name``, at most ``at_once`` of them at a time.

        When all are taken, the peer with the most streams loses its oldest to a peer with fewer; a preferred peer takes
        one from any other. So no number of keys shuts preferred peers out. Who gets none is told that we are busy.
        What ``handler`` raises becomes a refusal, and is counted.
        """

        async def accept(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if self._closing:  # the daemon may hand one over until it ends
                writer.close()
                return
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            try:
                stream = Stream(info.peer_id.to_base58(), reader, writer, self.traffic)
                await self._answer(name, stream, handler, at_once)
            except asyncio.CancelledError:
                # asyncio 3.11 prints a traceback for each cancelled handler of a server
                if not self._closing and task not in self._evicted:
                    raise
            finally:
                self._evicted.discard(task)
                writer.close()

        await self._daemon.p2p.add_binary_stream_handler(PROTOCOL_PREFIX + name, accept)

    def served(self, name: str, peer_id: str | None = None) -> int:
        """Return how many streams of the server ``name`` are open now, of one peer or of all."""
        serving = self._serving.get(name, {})
        return sum(map(len, serving.values())) if peer_id is None else len(serving.get(peer_id, ()))

    def reject(self, reason: str) -> None:
        """Count one rejection. Reasons beyond the first 256 different ones are counted together."""
        known = reason in self.rejections or len(self.rejections) < 256
        self.rejections[reason if known else "other"] += 1

    async def close(self) -> None:
        """End what is being served."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _has_slot(self, serving: dict[str, list[asyncio.Task[Any]]], peer_id: str, at_once: int) -> bool:
        """Return whether another stream of ``peer_id`` is served; end a stream of another peer for it if needed."""
        mine = len(serving.get(peer_id, ()))
        if mine >= SERVED_PER_PEER:
            return False
        if sum(map(len, serving.values())) < at_once:
            return True

        def rank(peer: str, streams: int) -> tuple[bool, int]:
            return not self.preferred(peer), streams

        victim = max(serving, key=lambda peer: rank(peer, len(serving[peer])))
        if rank(victim, len(serving[victim])) <= rank(peer_id, mine + 1):
            return False
        task = serving[victim][0]
        _remove(serving, victim, task)
        self._evicted.add(task)
        task.cancel()
        return True

    async def _answer(
        self, name: str, stream: Stream, handler: Callable[[Stream], Awaitable[None]], at_once: int
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving = self._serving.setdefault(name, {})
        busy = not self._has_slot(serving, stream.peer_id, at_once)
        reason, code = None, ""
        if busy:
            reason = "busy"
        else:
            serving.setdefault(stream.peer_id, []).append(task)
            try:
                await handler(stream)
            except Unreachable as error:
                self.reject(f"{name}: {error.reason}")
                return
            except Refused as error:
                reason, code = str(error), error.code
            except Violation as error:
                reason = str(error)
            except (OSError, PsycheError) as error:  # a full disk is no bug of ours, and not the peer's business
                log.warning("%s cannot be answered: %s", name, error)
                reason = "internal error"
            except Exception:
                log.exception("the handler of %s failed", name)
                reason = "internal error"
            finally:
                if task in serving.get(stream.peer_id, ()):  # an evicted one has been removed before
                    _remove(serving, stream.peer_id, task)
        with contextlib.suppress(Unreachable):
            if reason is not None:
                self.reject(f"{name}: {reason}")
                await stream.refuse(reason, code, busy=busy)
            await stream.linger()


def _remove(serving: dict[str, list[asyncio.Task[Any]]], peer_id: str, task: asyncio.Task[Any]) -> None:
    serving[peer_id].remove(task)
    if not serving[peer_id]:
        del serving[peer_id]


def refusal_size(sizes: Sequence[int]) -> int:
    """Return bytes of a refusal after its header. ``sizes``: of code and reason, as the header has them."""
    code, reason = sizes
    return min(code, MAX_CODE) + min(reason, MAX_REASON)


def refusal(busy: int, sizes: Sequence[int], data: Buffer) -> Refused:
    """Decode what follows a refusal's header. Anything a peer sends gives a :class:`Refused` of bounded size."""
    text, split = bytes(data), min(sizes[0], MAX_CODE)
    reason, code = text[split:].decode(errors="replace"), text[:split].decode("ascii", "replace")
    return (Busy if busy else Refused)(reason, code)


def dial_reason(message: str) -> str:
    """Return the essence of libp2p's many-line report of a failed dial."""
    for sign, words in (
        ("connection refused", "connection refused"),
        ("peer id mismatch", "another peer answers at its address"),
        ("no addresses", "its address is not known"),
        ("routing: not found", "its address is not known"),
        ("failed to find any peer in table", "its address is not known"),
        ("dial to self", "it is this node itself"),
        ("deadline exceeded", "no answer"),
        ("i/o timeout", "no answer"),
    ):
        if sign in message:
            return words
    return " ".join(message.split())[:MAX_REASON]

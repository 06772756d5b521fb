"""Bulk transfers by blocking calls on worker threads: twice as fast as asyncio's streams, and off the event loop.

A :class:`Pipe` is the local daemon's unix socket of one libp2p stream. A call on it ends with progress, with the
stream, by ``close`` from any thread, or by the clock: a peer that moves less than PROGRESS bytes in ``stall`` seconds
has stalled, however often it sends a byte.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import base58
from hivemind.proto import p2pd_pb2

from psyche.network.bandwidth import QUANTUM, UNLIMITED, Limiter, Traffic
from psyche.network.streams import (
    DIAL_SECONDS,
    OK,
    PROGRESS,
    PROTOCOL_PREFIX,
    REFUSED,
    dial_reason,
    refusal,
    refusal_size,
)
from psyche.network.transport import Refused, Unreachable, Violation

MAX_CONTROL = 1 << 16
"""Bytes of the daemon's answer to a request for a stream."""
SOCKET_BUFFER = 1 << 20
"""Buffer of the unix socket to the daemon: larger means fewer context switches."""


class Pipe:
    """A stream with ``peer_id`` on a blocking socket. Methods raise :class:`Unreachable` when it ends or stalls."""

    def __init__(
        self,
        peer_id: str,
        connection: socket.socket,
        traffic: Traffic,
        *,
        up: Limiter = UNLIMITED,
        down: Limiter = UNLIMITED,
    ) -> None:
        self.peer_id = peer_id
        self._socket, self._traffic, self._up, self._down = connection, traffic, up, down

    @classmethod
    def open(cls, control: Path, peer_id: str, name: str, traffic: Traffic, down: Limiter) -> Pipe:
        """Return a new stream to the server ``name`` at a peer, through the daemon whose control socket is ``control``.

        Raises :class:`Unreachable`, or :class:`Refused` where the peer has no such server.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        pipe = cls(peer_id, connection, traffic, down=down)
        try:
            connection.settimeout(DIAL_SECONDS)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BUFFER)
            connection.connect(str(control))
            pipe._dial(name)
        except TimeoutError:
            pipe.close()
            raise Unreachable(peer_id, f"did not answer within {DIAL_SECONDS:g} s") from None
        except OSError:
            pipe.close()
            raise Unreachable(peer_id, "cannot be reached: the local libp2p daemon is gone") from None
        except BaseException:
            pipe.close()
            raise
        return pipe

    @classmethod
    def of_descriptor(cls, peer_id: str, descriptor: int, traffic: Traffic, up: Limiter) -> Pipe:
        """Return a second handle of a stream that the event loop holds, for a thread to write to."""
        return cls(peer_id, socket.socket(fileno=os.dup(descriptor)), traffic, up=up)

    def interrupt(self) -> None:
        """End the stream; whoever is blocked in it is woken. From any thread, any number of times."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of this handle; a stream that the event loop holds, too, stays open. When nobody is in it any more."""
        self._socket.close()

    def send(self, data: memoryview, stall: float) -> None:
        """Send all of ``data``, as fast as the limit allows."""
        sent = mark = 0
        deadline = time.monotonic() + stall
        while sent < len(data):
            piece = data[sent : sent + QUANTUM]
            deadline += self._up.take(self.peer_id, len(piece))
            done = 0
            while done < len(piece):
                done += self._step(lambda: self._socket.send(piece[done:]), deadline, stall)  # noqa: B023
                if sent + done - mark >= PROGRESS or sent + done == len(data):
                    mark, deadline = sent + done, time.monotonic() + stall
            sent += done
            self._traffic.up(self.peer_id, done)

    def read(self, size: int, stall: float) -> bytearray:
        """Exactly ``size`` bytes."""
        data = bytearray(size)
        self.read_into(memoryview(data), stall)
        return data

    def read_into(self, target: memoryview, stall: float) -> None:
        """Fill ``target``. Bytes that the limit does not allow yet stay with the sender."""
        got = mark = 0
        deadline = time.monotonic() + stall
        while got < len(target):
            most = QUANTUM if self._down.rate is not None else len(target) - got
            piece = target[got : got + most]
            count = self._step(lambda: self._socket.recv_into(piece), deadline, stall)  # noqa: B023
            got += count
            self._traffic.down(self.peer_id, count)
            deadline += self._down.take(self.peer_id, count)  # what we hold back is not the peer's fault
            if got - mark >= PROGRESS:
                mark, deadline = got, time.monotonic() + stall

    def expect(self, stall: float) -> None:
        """Return if the server accepts, raise :class:`Refused` (or Busy) with its reason if not."""
        status = self.read(1, stall)[0]
        if status == REFUSED:
            busy, *sizes = self.read(3, stall)
            raise refusal(busy, sizes, self.read(refusal_size(sizes), stall))
        if status != OK:
            raise Violation(f"status byte {status}")

    def _step(self, move: Callable[[], int], deadline: float, stall: float) -> int:
        """Make one call that moves at least a byte, within the time that is left."""
        left = deadline - time.monotonic()
        if left <= 0:
            raise Unreachable(self.peer_id, f"stalled (under {PROGRESS} bytes in {stall:g} s)")
        try:
            self._socket.settimeout(left)
            count = move()
        except TimeoutError:
            raise Unreachable(self.peer_id, f"stalled (under {PROGRESS} bytes in {stall:g} s)") from None
        except OSError:
            raise Unreachable(self.peer_id, "closed the connection") from None
        if count == 0:
            raise Unreachable(self.peer_id, "closed the connection")
        return count

    def _dial(self, name: str) -> None:
        request = p2pd_pb2.Request(
            type=p2pd_pb2.Request.STREAM_OPEN,
            streamOpen=p2pd_pb2.StreamOpenRequest(
                peer=base58.b58decode(self.peer_id), proto=[PROTOCOL_PREFIX + name], timeout=round(DIAL_SECONDS)
            ),
        ).SerializeToString()
        self._socket.sendall(_varint(len(request)) + request)
        response = p2pd_pb2.Response()
        response.ParseFromString(self._control_frame())
        if response.type == p2pd_pb2.Response.ERROR:
            if "protocols not supported" in response.error.msg:
                raise Refused(f"it does not serve {name}")
            raise Unreachable(self.peer_id, f"cannot be reached: {dial_reason(response.error.msg)}")

    def _control_frame(self) -> bytes:
        """Return the daemon's length-prefixed answer, and not a byte of what the peer sends after it."""
        size = shift = 0
        while True:
            byte = self._control_bytes(1)[0]
            size |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift > 28:
                raise OSError("not a length")
        if size > MAX_CONTROL:
            raise OSError("too long an answer")
        return self._control_bytes(size)

    def _control_bytes(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self._socket.recv(size - len(data))
            if not piece:
                raise OSError("the daemon hung up")
            data += piece
        return data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)

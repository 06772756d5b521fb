"""The processes of one system as the bench sees them: started in their places, asked in turn, measured and ended."""

from __future__ import annotations

import contextlib
import select
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from psyche.bench.exchange.peer_process import (
    HANG_SECONDS,
    Call,
    Connected,
    Done,
    Failed,
    PeerSpec,
    Ready,
    Reply,
    Verified,
    decode_reply,
    encode,
)
from psyche.bench.harness.child_processes import STOP_SECONDS, last_line, reap, spawn
from psyche.bench.harness.resource_usage import Sockets, Usage, cpu_seconds, peaks, sockets, traffic, tree
from psyche.bench.harness.shaped_links import Place
from psyche.errors import PsycheError

R = TypeVar("R", bound=Reply)


class PeerHandle:
    """A process of a system."""

    def __init__(self, spec: PeerSpec, place: Place) -> None:
        self.spec, self.place = spec, place
        self._log = Path(spec.folder) / "output.log"
        pipe = subprocess.PIPE
        self.process = spawn(["psyche.bench.exchange"], place, self._log, stdin=pipe, stdout=pipe)
        self._unread = b""
        self._send(encode(spec))

    def tell(self, call: Call) -> None:
        """Send a call; :meth:`hear` returns the answer."""
        self._send(encode(call))

    def hear(self, kind: type[R]) -> R:
        """Receive an answer. Raises :class:`PsycheError` if there is none or it is a failure."""
        reply = decode_reply(self._line())
        if isinstance(reply, Failed):
            raise PsycheError(f"{self} failed: {reply.reason}")
        assert isinstance(reply, kind)
        return reply

    def quit(self) -> None:
        """Ask the process to end."""
        with contextlib.suppress(PsycheError):
            self._send(encode(Call("quit")))

    def reap(self, deadline: float) -> None:
        """Wait until ``deadline`` (monotonic) for the process to end, then kill it with its whole session."""
        reap(self.process, deadline)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def __str__(self) -> str:
        return f"{self.spec.system} {self.spec.codec}, process {self.spec.number}"

    def _send(self, line: bytes) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line + b"\n")
        except BrokenPipeError:
            raise self._ended() from None

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        source, deadline = self.process.stdout, time.monotonic() + HANG_SECONDS
        while b"\n" not in self._unread:
            readable, _, _ = select.select([source], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise PsycheError(f"{self} did not answer for {HANG_SECONDS:g} s")
            piece = source.read(1 << 16)
            if not piece:
                raise self._ended()
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _ended(self) -> PsycheError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)  # its pipe is closed, so it is about to end
        return PsycheError(f"{self} ended with code {self.process.returncode}: {last_line(self._log)}")


class PeerGroup:
    """All processes of one system: those that exchange, and a coordinator if the system has one."""

    def __init__(self, spec: PeerSpec, places: Sequence[Place], coordinator: Place | None) -> None:
        """Start the processes; ``spec`` lacks number and place. Raises :class:`PsycheError`."""
        self.spec = spec
        self.members: list[PeerHandle] = []
        self._all: list[PeerHandle] = []
        try:
            if coordinator is not None:
                self._start(-1, coordinator)
            self.members = [self._start(number, place) for number, place in enumerate(places)]
            self.names = self._connect()
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, place: Place) -> PeerHandle:
        folder = str(Path(self.spec.folder) / ("coordinator" if number < 0 else f"{number}"))
        spec = msgspec.structs.replace(
            self.spec, number=number, address=place.address, device=place.device, folder=folder
        )
        self._all.append(PeerHandle(spec, place))
        return self._all[-1]

    def _connect(self) -> tuple[str, ...]:
        first, *others = self._all
        first.tell(Call("connect", ("",)))
        connected = [first.hear(Connected)]
        for handle in others:
            handle.tell(Call("connect", (connected[0].rendezvous,)))
        connected += [handle.hear(Connected) for handle in others]
        return tuple(one.name for one in connected[-len(self.members) :])

    def ask(self, call: Call, kind: type[R]) -> list[R]:
        """Ask all processes that exchange at once, and return their answers."""
        for handle in self.members:
            handle.tell(call)
        return [handle.hear(kind) for handle in self.members]

    def close(self) -> None:
        """End all processes."""
        handles, self._all = self._all, []
        for handle in handles:
            handle.quit()
        deadline = time.monotonic() + STOP_SECONDS
        for handle in handles:
            handle.reap(deadline)


@dataclass(frozen=True)
class PeerResult:
    """One exchange as one peer experienced it."""

    done: Done
    verified: Verified
    cpu_seconds: float
    peak: int
    """Peak memory of its processes, bytes."""
    growth: int
    """Peak memory less the memory before the exchange, bytes."""
    bytes_up: int | None
    bytes_down: int | None


@dataclass(frozen=True)
class MeasuredExchange:
    """One exchange."""

    peers: Sequence[PeerResult]
    matchmaking_seconds: float

    def seconds(self, numbers: Sequence[int]) -> float:
        """From the first peer's start until the last of the peers ``numbers`` is done."""
        return max(self.peers[n].done.ended for n in numbers) - min(peer.done.began for peer in self.peers)


def measured_exchange(group: PeerGroup) -> MeasuredExchange:
    """Measure one exchange. Raises :class:`PsycheError` if it fails."""
    ready = group.ask(Call("prepare"), Ready)
    pids = [tree(handle.process.pid) for handle in group.members]
    sockets_before = _sockets(group, pids)
    before = [Usage.of(some) for some in pids]
    done = group.ask(Call("exchange"), Done)
    spent = [cpu_seconds(some) for some in pids]
    highest = [peaks(some) for some in pids]
    sockets_after = _sockets(group, pids)
    verified = group.ask(Call("verify", group.names), Verified)
    peers = []
    for number, usage in enumerate(before):
        growth = sum(max(0, peak - usage.resident[pid]) for pid, peak in highest[number].items())
        up, down = traffic(sockets_before[number], sockets_after[number]) or (None, None)
        peers.append(
            PeerResult(
                done=done[number],
                verified=verified[number],
                cpu_seconds=spent[number] - usage.cpu_seconds,
                peak=usage.proportional + growth,
                growth=growth,
                bytes_up=up,
                bytes_down=down,
            )
        )
    return MeasuredExchange(peers, max(one.seconds for one in ready))


def _sockets(group: PeerGroup, pids: Sequence[Sequence[int]]) -> list[Sockets | None]:
    return [sockets(handle.place, some) for handle, some in zip(group.members, pids, strict=True)]

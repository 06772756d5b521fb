"""The processes of one system, from the bench's side: started where they belong, asked in turn, reaped."""

from __future__ import annotations

import contextlib
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import msgspec

from psyche.bench.exchange.links import Place
from psyche.bench.exchange.participant import PATIENCE
from psyche.bench.exchange.reap import reap
from psyche.bench.exchange.talk import Command, Failed, Meet, Met, Quit, Reply, Spec, decode_reply, encode
from psyche.errors import PsycheError

STOP_SECONDS = 15.0

R = TypeVar("R", bound=Reply)


class Child:
    """A process of a system."""

    def __init__(self, spec: Spec, place: Place) -> None:
        self.spec, self.place = spec, place
        folder = Path(spec.folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._output = folder / "output.log"
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                place.command([sys.executable, "-m", "psyche.bench.exchange"]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                bufsize=0,
                start_new_session=True,
            )
        self._unread = b""
        self._send(encode(spec))

    def tell(self, command: Command) -> None:
        """Send a command; :meth:`hear` is what it answers."""
        self._send(encode(command))

    def hear(self, kind: type[R]) -> R:
        """The answer. Raises :class:`PsycheError` where there is none or it is a failure."""
        reply = decode_reply(self._line())
        if isinstance(reply, Failed):
            raise PsycheError(f"{self} failed: {reply.reason}")
        assert isinstance(reply, kind)
        return reply

    def quit(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(PsycheError):
            self._send(encode(Quit()))

    def reap(self, deadline: float) -> None:
        """Wait until ``deadline`` (monotonic) for it to end, then end it, and all of its session."""
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
            raise self._gone() from None

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        source, deadline = self.process.stdout, time.monotonic() + PATIENCE
        while b"\n" not in self._unread:
            readable, _, _ = select.select([source], [], [], max(0.0, deadline - time.monotonic()))
            if not readable:
                raise PsycheError(f"{self} has said nothing for {PATIENCE:g} s")
            piece = source.read(1 << 16)
            if not piece:
                raise self._gone()
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _gone(self) -> PsycheError:
        words = self._output.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)  # its pipe is closed, so it is about to end
        return PsycheError(f"{self} ended with code {self.process.returncode}: {words[-1]}")


class Crew:
    """All processes of one system that exchange, and the one that leads them where the system has such a one."""

    def __init__(self, spec: Spec, places: Sequence[Place], lead: Place, *, led: bool) -> None:
        """``spec`` is that of the process number 0 but for its place. Raises :class:`PsycheError`."""
        self.spec = spec
        self.members: list[Child] = []
        self._all: list[Child] = []
        try:
            if led:
                self._start(-1, lead)
            self.members = [self._start(number, place) for number, place in enumerate(places)]
            self.names = self._introduce()
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, place: Place) -> Child:
        folder = str(Path(self.spec.folder) / ("lead" if number < 0 else f"{number}"))
        spec = msgspec.structs.replace(
            self.spec, number=number, address=place.address, device=place.device, folder=folder
        )
        self._all.append(Child(spec, place))
        return self._all[-1]

    def _introduce(self) -> tuple[str, ...]:
        first, *others = self._all
        first.tell(Meet(""))
        met = [first.hear(Met)]
        for child in others:
            child.tell(Meet(met[0].meeting))
        met += [child.hear(Met) for child in others]
        return tuple(one.name for one in met[-len(self.members) :])

    def ask(self, command: Command, kind: type[R]) -> list[R]:
        """What each of those that exchange answers, all asked at once."""
        for child in self.members:
            child.tell(command)
        return [child.hear(kind) for child in self.members]

    def close(self) -> None:
        """End all of them, once."""
        children, self._all = self._all, []
        for child in children:
            child.quit()
        deadline = time.monotonic() + STOP_SECONDS
        for child in children:
            child.reap(deadline)


@contextmanager
def crew(spec: Spec, places: Sequence[Place], lead: Place, *, led: bool) -> Iterator[Crew]:
    """A crew whose processes are gone when the block is left."""
    running = Crew(spec, places, lead, led=led)
    try:
        yield running
    finally:
        running.close()

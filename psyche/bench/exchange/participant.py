"""What a process of a system under measurement can do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

from psyche.bench.exchange.talk import Done, Met, Ready, Spec, Verified

PATIENCE = 600.0
"""Seconds after which something that should have happened counts as a hang."""


class Process(ABC):
    """A process of a system. The methods are called one after another, in the order of a run."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec

    def run(self, serve: Callable[[], None]) -> None:
        """Own the main thread while ``serve`` takes commands, on this thread or another."""
        serve()

    @abstractmethod
    def meet(self, meeting: str) -> Met:
        """Start, and connect with the others."""

    @abstractmethod
    def close(self) -> None:
        """Leave nothing behind."""


class Participant(Process):
    """One that exchanges."""

    @abstractmethod
    def prepare(self) -> Ready:
        """Everything that does not count, with this process's vector in place."""

    @abstractmethod
    def exchange(self) -> Done:
        """What counts."""

    @abstractmethod
    def verify(self, names: tuple[str, ...]) -> Verified:
        """How far the result is from the truth."""

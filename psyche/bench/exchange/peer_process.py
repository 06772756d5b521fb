"""The interface of a process under measurement, and the messages between it and the bench.

A message is one line of JSON, over the process's stdin and stdout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import msgspec

HANG_SECONDS = 600.0
"""A process that gives no answer for so long counts as hung."""


class PeerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The role of a process; its first line."""

    system: str
    number: int
    """From 0; its vector follows from it. −1: a coordinator, which has no vector."""
    peers: int
    parameters: int
    address: str
    """IPv4 address of the process."""
    device: str
    """Network interface of the address."""
    folder: str
    """Folder for its files."""
    threads: int
    """Threads of torch."""
    codec: str
    exchange: str = ""
    reducers: int = 0


class Call(msgspec.Struct, frozen=True):
    """A command: the name of a method of the process and its arguments. The reply is what the method returns."""

    method: Literal["connect", "prepare", "exchange", "verify", "quit"]
    arguments: tuple[str, ...] = ()


class Connected(msgspec.Struct, frozen=True, tag=True):
    """The process runs."""

    rendezvous: str
    name: str
    """Name of this process in its system."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The exchange can begin."""

    seconds: float
    """Time that the system itself needed, such as for matchmaking."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """An exchange is over. Times are of the machine's monotonic clock, which all its processes share."""

    began: float
    ended: float
    phases: dict[str, float]
    """Seconds."""
    payload_bytes: int
    """Encoded size of this process's vector."""


class Verified(msgspec.Struct, frozen=True, tag=True):
    """The result was compared."""

    averaged: int
    """Peers whose vectors are in the result."""
    relative_error: float
    """Relative L2 error of the result against the mean over those."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The command failed."""

    reason: str


Reply = Connected | Ready | Done | Verified | Failed

encode = msgspec.json.encode
decode_call = msgspec.json.Decoder(Call).decode
decode_reply = msgspec.json.Decoder(Reply).decode
decode_spec = msgspec.json.Decoder(PeerSpec).decode


class PeerProcess(ABC):
    """A process of a system. The methods are called one after another in this order."""

    def __init__(self, spec: PeerSpec) -> None:
        self.spec = spec

    def run(self, serve: Callable[[], None]) -> None:
        """Use the main thread while ``serve`` answers commands, on this thread or another."""
        serve()

    @abstractmethod
    def connect(self, rendezvous: str) -> Connected:
        """Start, and connect with the others.

        ``rendezvous`` is what the first process of the system answered; empty for that process.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop all processes and threads."""


class AveragingPeer(PeerProcess):
    """A process that exchanges a vector."""

    @abstractmethod
    def prepare(self) -> Ready:
        """Load this peer's vector, and do everything else that does not count."""

    @abstractmethod
    def exchange(self) -> Done:
        """Exchange now; this is measured."""

    @abstractmethod
    def verify(self, *names: str) -> Verified:
        """Compare the result with the true mean. ``names`` are those of peers 0, 1, …"""

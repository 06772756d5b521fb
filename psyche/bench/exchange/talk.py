"""What the bench and its processes say to each other: one line of JSON a message, over stdin and stdout."""

from __future__ import annotations

import msgspec


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is to be; its first line."""

    system: str
    number: int
    """From 0; what it brings to the average follows from it. −1: it leads, and brings nothing."""
    peers: int
    parameters: int
    address: str
    """Its own, IPv4."""
    device: str
    """The network interface of the address."""
    folder: str
    """For its files."""
    threads: int
    """For torch."""
    codec: str
    exchange: str = ""
    reducers: int = 0


class Meet(msgspec.Struct, frozen=True, tag=True):
    """Start. ``meeting`` is what the first process of the system answered; empty for that one itself."""

    meeting: str


class Prepare(msgspec.Struct, frozen=True, tag=True):
    """Get ready for the next exchange, up to the moment when it can begin."""


class Exchange(msgspec.Struct, frozen=True, tag=True):
    """Begin now."""


class Verify(msgspec.Struct, frozen=True, tag=True):
    """Compare the result with the truth. ``names`` are those of peers 0, 1, …"""

    names: tuple[str, ...]


class Quit(msgspec.Struct, frozen=True, tag=True):
    """Tidy up and end."""


class Met(msgspec.Struct, frozen=True, tag=True):
    meeting: str
    name: str
    """What the system calls this process."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    seconds: float
    """What getting ready took of this system's own doing, such as finding the others; 0 where that is nothing."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """An exchange is over. Times are of the machine's monotonic clock, which its processes share."""

    began: float
    ended: float
    phases: dict[str, float]
    """Seconds."""
    payload_bytes: int
    """Of what this process brought, encoded."""


class Verified(msgspec.Struct, frozen=True, tag=True):
    averaged: int
    """Peers whose vectors are in the result."""
    relative_error: float
    """Of the result, against the mean over those."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    reason: str


Command = Meet | Prepare | Exchange | Verify | Quit
Reply = Met | Ready | Done | Verified | Failed

encode = msgspec.json.encode
decode_command = msgspec.json.Decoder(Command).decode
decode_reply = msgspec.json.Decoder(Reply).decode
decode_spec = msgspec.json.Decoder(Spec).decode

"""Format numbers, peers and text that comes from peers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.filesize import decimal

_BARS = "▁▂▃▄▅▆▇█"


def clean(text: str, limit: int = 200) -> str:
    """Put ``text`` on one line without control characters, so that a peer cannot control a terminal."""
    printable = "".join(char if char.isprintable() else " " for char in text)
    line = " ".join(printable.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def peer_name(peer: str) -> str:
    """Return the end of a PeerID; all PeerIDs start alike."""
    return "…" + clean(peer)[-6:]


def donor_name(donor: str) -> str:
    """Return the short name of a PeerID; words such as "the members" stay as they are."""
    is_peer = len(donor) >= 40 and donor.isalnum()
    return peer_name(donor) if is_peer else clean(donor)


def root_name(root: str) -> str:
    """Return the first digits of a hash."""
    return clean(root)[:4] + "…" if root else "–"


def amount(count: float) -> str:
    """Return a count with about three digits: 980, 30.7k, 1.9M, 72.0B."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(count) >= max(scale, 1e4):
            return f"{count / scale:.1f}{unit}"
    return f"{count:.0f}"


def size(count: float) -> str:
    """Return bytes in decimal units."""
    return str(decimal(int(count)))


def number(value: float | None, form: str = ".3f") -> str:
    """Return a measurement, or a dash for ``None``. Absurdly large ones stay short."""
    return "–" if value is None else format(value, form if abs(value) < 1e6 else ".1e")


def rate(value: float | None) -> str:
    """Tokens per second."""
    return f"{number(value, '.0f')} tok/s"


def plural(count: int, noun: str) -> str:
    """``1 round``, ``2 rounds``."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """Return the last ``width`` values as bars, lowest to highest."""
    recent = values[-width:]
    low, high = min(recent, default=0.0), max(recent, default=0.0)
    span = (high - low) or 1.0
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1))] for value in recent)

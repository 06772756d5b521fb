"""How fast a line is and how large a disk, as people write it."""

from __future__ import annotations

import re

_RATE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgKMG]?)((?i:bit)|B)(?:/s)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgtKMGT]?)(i?)[bB]")
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def bits_per_second(text: str) -> int:
    """``100mbit``, ``1.5 Mbit/s`` or ``2.5MB`` as bits a second. Raises ``ValueError``, for ``100mb`` too: it could be
    either."""
    match = _RATE.fullmatch(text.strip())
    bits = match and float(match[1]) * _SCALES[match[2].lower()] * (1 if match[3] != "B" else 8)
    if not bits or bits < 1:
        raise ValueError(f"{text!r} is not a rate such as 20mbit, 800kbit or 2.5MB (a second)")
    return round(bits)


def bytes_per_second(text: str | None) -> float | None:
    """The same as bytes a second; None, no limit, stays None."""
    return None if text is None else bits_per_second(text) / 8


def byte_count(text: str) -> int:
    """``20GB``, ``1.5 TB`` or ``512MiB`` as bytes. Raises ``ValueError``."""
    match = _SIZE.fullmatch(text.strip())
    size = round(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].lower()]) if match else 0
    if size == 0:
        raise ValueError(f"{text!r} is not a size such as 20GB or 512MiB")
    return size

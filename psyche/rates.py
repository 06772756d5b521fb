"""How fast a line is, as people write it."""

from __future__ import annotations

import re

_RATE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgKMG]?)((?i:bit)|B)(?:/s)?")
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


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

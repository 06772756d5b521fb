"""Rates, sizes and hours as people write them: ``20mbit``, ``6gb``, ``22:00-07:00``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

_RATE = re.compile(r"(\d+(?:\.\d+)?) ?([kmgKMG]?)((?i:bit)|B)(?:/s)?")
_SCALES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b", re.IGNORECASE)
_RANGE = re.compile(r"\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s*")
_DAY = 24 * 60


def bits_per_second(text: str) -> int:
    """Parse ``100mbit``, ``1.5 Mbit/s`` or ``2.5MB`` as bits a second. Raises ``ValueError``; also for ``100mb``,
    which is ambiguous."""
    match = _RATE.fullmatch(text.strip())
    bits = match and float(match[1]) * _SCALES[match[2].lower()] * (1 if match[3] != "B" else 8)
    if not bits or bits < 1:
        raise ValueError(f"{text!r} is not a rate such as 20mbit, 800kbit or 2.5MB (per second)")
    return round(bits)


def bytes_per_second(text: str | None) -> float | None:
    """Parse a rate as bytes a second; None (no limit) stays None."""
    return None if text is None else bits_per_second(text) / 8


def byte_count(text: str) -> int:
    """Parse ``6gb``, ``6GiB`` or ``800 MB`` as bytes: powers of 1024 with an i, else of 1000. Raises ``ValueError``."""
    match = _SIZE.fullmatch(text.strip())
    bytes_ = match and float(match[1]) * (1024 if match[3] else 1000) ** "_kmgt".index(match[2].lower() or "_")
    if not bytes_ or bytes_ < 1:
        raise ValueError(f"{text!r} is not a size such as 6gb or 800MiB")
    return int(bytes_)


@dataclass(frozen=True)
class Hours:
    """Half-open ranges of minutes of a day; a range that ends before it begins passes midnight."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Hours:
        """Parse ``22:00-07:00``, or several ranges separated by commas. Raises ``ValueError``."""
        ranges = []
        for part in text.split(","):
            match = _RANGE.fullmatch(part)
            begin, end = ((60 * int(match[n]) + int(match[n + 1])) for n in (1, 3)) if match else (0, 0)
            valid = match and int(match[2]) < 60 and int(match[4]) < 60 and begin < _DAY and end <= _DAY
            if not valid or begin == end % _DAY:
                raise ValueError(f"{text!r} is not a range of hours such as 22:00-07:00 or 12:00-13:30,22:00-07:00")
            ranges.append((begin, end % _DAY))
        return cls(tuple(ranges))

    def __contains__(self, moment: datetime) -> bool:
        return any((_minute(moment) - begin) % _DAY < (end - begin) % _DAY for begin, end in self.ranges)

    def next_opening(self, moment: datetime) -> str:
        """Return when the next range after ``moment`` begins, such as ``22:00``."""
        begin = min((begin for begin, _ in self.ranges), key=lambda begin: (begin - _minute(moment)) % _DAY)
        return f"{begin // 60:02}:{begin % 60:02}"


def _minute(moment: datetime) -> int:
    return 60 * moment.hour + moment.minute

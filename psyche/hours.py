"""Hours of the day, as people write them: ``22:00-07:00``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

_RANGE = re.compile(r"\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s*")
_DAY = 24 * 60


@dataclass(frozen=True)
class Hours:
    """Ranges of minutes of a day, each with its beginning and without its end; over midnight where that comes first."""

    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Hours:
        """``22:00-07:00``, or several with commas between them. Raises ``ValueError``."""
        ranges = []
        for part in text.split(","):
            match = _RANGE.fullmatch(part)
            begin, end = ((60 * int(match[n]) + int(match[n + 1])) for n in (1, 3)) if match else (0, 0)
            valid = match and int(match[2]) < 60 and int(match[4]) < 60 and begin < _DAY and end <= _DAY
            if not valid or begin == end % _DAY:
                raise ValueError(f"{text!r} are no hours such as 22:00-07:00 or 12:00-13:30,22:00-07:00")
            ranges.append((begin, end % _DAY))
        return cls(tuple(ranges))

    def __contains__(self, moment: datetime) -> bool:
        return any((_minute(moment) - begin) % _DAY < (end - begin) % _DAY for begin, end in self.ranges)

    def next_opening(self, moment: datetime) -> str:
        """When they begin next after ``moment``, such as ``22:00``."""
        begin = min((begin for begin, _ in self.ranges), key=lambda begin: (begin - _minute(moment)) % _DAY)
        return f"{begin // 60:02}:{begin % 60:02}"


def _minute(moment: datetime) -> int:
    return 60 * moment.hour + moment.minute

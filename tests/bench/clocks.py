"""A clock for what may take only so long."""

from __future__ import annotations


class Clock:
    """Moves only when told to, or by ``tick`` each time it is looked at."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 1000.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

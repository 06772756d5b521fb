"""Runs cases in children that die at every change they make to the disk; ``dying.c`` is preloaded into this process.

One process imports, and forks a child for every death: what they leave behind is judged by whoever started it.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.durability.cases import CASES, DurabilityCase

MANNERS = ("killed", "torn", "lost")
DIED, UNSYNCED = 77, 3


def sweep(case: DurabilityCase, value: int, place: Path) -> None:
    """Let the writer of ``value`` die at each of its calls. Folders below ``place`` are named by call and manner."""
    origin = place / "origin"
    origin.mkdir(parents=True)
    for before in range(1, value):
        _in_child(lambda before=before: case.write(origin, before))  # type: ignore[misc]
    endings: dict[str, int] = {}
    for call in itertools.count(1):
        for number, manner in enumerate(MANNERS):
            folder = place / f"{call}-{manner}"
            shutil.copytree(origin, folder)
            endings[folder.name] = _in_child(lambda: _armed(case, value, folder, call, number))  # noqa: B023
        if DIED not in endings.values() or not any(endings[f"{call}-{manner}"] == DIED for manner in MANNERS):
            break
    (place / "endings.json").write_text(json.dumps(endings))


def _armed(case: DurabilityCase, value: int, folder: Path, call: int, manner: int) -> int:
    preloaded = ctypes.CDLL(None)
    preloaded.armed(call, manner, os.fsencode(folder))
    case.write(folder, value)
    return UNSYNCED if preloaded.unsynced() and case.durable else 0


def _in_child(do: Callable[[], int | None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = do() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for case in CASES:
        if case.name in sys.argv[2:]:
            for value in range(1, case.last + 1):
                sweep(case, value, Path(sys.argv[1]) / case.name / str(value))

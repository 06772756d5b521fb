"""Preparations that die by SIGKILL just before their n-th fsync or replace: the moments at which the disk changes for
good.

One process imports, and forks a child for every death. The disk is not waited for: SIGKILL takes nothing away that was
written, and what power cuts take is another test's (``tests/durability``).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from psyche.config import Data
from psyche.data import encoding
from psyche.data import prepare as module


class ClosedAudit(NamedTuple):
    """Of a child; root and calls are those of one that lived."""

    signal: int
    root: str = ""
    calls: int = 0


def endings(data: Data, cache: Path, deaths: Sequence[int], *, fresh: bool = False) -> list[ClosedAudit]:
    """Prepare ``data`` in ``cache`` once for each of ``deaths``, dying at that moment; at 0 it lives.

    ``fresh``: whoever is to die begins without what those before it left.
    """
    arguments = [data.model_dump_json(), str(cache), json.dumps(deaths), json.dumps(fresh)]
    said = subprocess.check_output([sys.executable, "-m", __name__, *arguments], text=True)
    return [ClosedAudit(*json.loads(line)) for line in said.splitlines()]


def armed(die_at: int) -> Callable[[], int]:
    """Let this process die at its ``die_at``-th moment, never where that is 0. Returns what tells how many there
    were."""
    calls = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given)

        return call

    os.fsync = counted(lambda descriptor: None)
    os.replace = counted(os.replace)
    return lambda: calls


def in_little_pieces() -> None:
    """So that there is much to interrupt: some 60 batches, and journals, of the corpus of these tests."""
    encoding.BATCH_CHARACTERS = 5000
    module.JOURNAL_BYTES = 4096


def _child(data: Data, cache: Path, die_at: int) -> ClosedAudit:
    reading, writing = os.pipe()
    pid = os.fork()  # there is no thread yet
    if not pid:
        calls = armed(die_at)
        root = module.prepare(data, cache, vocab_limit=65536, shard_bytes=4096).root.hex()
        os.write(writing, json.dumps([root, calls()]).encode())
        os._exit(0)
    os.close(writing)
    with open(reading) as pipe:
        said = pipe.read()
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended <= 0
    return ClosedAudit(-ended, *json.loads(said or "[]"))


def _main() -> None:
    data, cache = Data.model_validate_json(sys.argv[1]), Path(sys.argv[2])
    deaths, fresh = json.loads(sys.argv[3]), json.loads(sys.argv[4])
    in_little_pieces()
    for die_at in deaths:
        if die_at and fresh:
            shutil.rmtree(cache, ignore_errors=True)
        print(json.dumps(_child(data, cache, die_at)), flush=True)


if __name__ == "__main__":
    _main()

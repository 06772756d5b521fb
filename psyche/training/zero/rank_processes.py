"""The rank processes of a DeepSpeedEngine, as their leader sees them: start, order, watch, end.

When a rank dies, the engine fails and nothing else does: the other ranks wait for it in a collective and are killed,
too. torch.distributed, CUDA and DeepSpeed are loaded only in the ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Lock
from typing import Never

from psyche.durable import disk_errors
from psyche.errors import PsycheError
from psyche.training.zero.rank_messages import Order, OrderDone, OrderFailed, Stop, decode_answer, encode

DIRECTORY = "ranks"
"""Subdirectory of the node's directory for the output of the ranks."""
STOP_SECONDS = 3.0
GRACE_SECONDS = 1.0
"""A rank can report that another one is gone before the kernel does."""
SMALLER = "lower node.micro_batch, use a higher node.deepspeed.stage, or set node.deepspeed.offload to cpu"


class RankProcesses:
    """One process per device (``cpu``, ``cuda:2``). :meth:`ask` may be called from any thread."""

    def __init__(self, devices: Sequence[str], shared: int, size: int, directory: Path) -> None:
        """``shared`` is the descriptor of the flat vector (``size`` elements); output goes below ``directory``."""
        self._logs = directory / DIRECTORY
        self._asking = Lock()
        self._lost = ""
        """Why the ranks have ended; empty while they run."""
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self.close = weakref.finalize(self, _end, self._processes, self._connections)
        """End the ranks. Called automatically when this object is collected and when the process exits."""
        with disk_errors(directory, "--directory"):
            self._logs.mkdir(parents=True, exist_ok=True)
        # the rendezvous is an anonymous file that only the ranks can open: it needs no port and leaves nothing behind
        store = os.memfd_create("psyche-rendezvous")
        try:
            for rank in range(len(devices)):
                self._start(rank, devices, (shared, size, store))
        finally:
            os.close(store)

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [process.pid for process in self._processes]

    def ask(self, orders: Sequence[Order]) -> list[OrderDone]:
        """Send each rank its order and wait for all answers.

        Once a rank has died or failed, ends all of them; this and every later call then raises :class:`PsycheError`.
        """
        with self._asking:
            if self._lost:
                raise PsycheError(self._lost)
            for connection, order in zip(self._connections, orders, strict=True):
                with contextlib.suppress(OSError):  # the rank is dead, which reading its answer will show
                    connection.send_bytes(encode(order))
            answers: dict[int, OrderDone] = {}
            while len(answers) < len(orders):
                pending = {c: rank for rank, c in enumerate(self._connections) if rank not in answers}
                for ready in wait(list(pending)):
                    assert isinstance(ready, Connection)
                    rank = pending[ready]
                    answers[rank] = self._answer(rank, ready)
            return [answers[rank] for rank in range(len(orders))]

    def _answer(self, rank: int, connection: Connection) -> OrderDone:
        answer: OrderDone | OrderFailed
        try:
            answer = decode_answer(connection.recv_bytes())
        except (EOFError, OSError):
            answer = OrderFailed("it closed its connection")
        if isinstance(answer, OrderFailed):
            self._lose(rank, answer)
        return answer

    def _lose(self, rank: int, failed: OrderFailed) -> Never:
        """End all ranks and raise. A rank that died is the cause, rather than one that reports an error about it."""
        until = time.monotonic() + GRACE_SECONDS
        while not (dead := [r for r, one in enumerate(self._processes) if one.poll()]) and time.monotonic() < until:
            time.sleep(0.01)
        cause = self._death(dead[0]) if dead else self._failure(rank, failed)
        self._lost = cause
        self.close()
        raise PsycheError(cause)

    def _death(self, rank: int) -> str:
        name, code = self._name(rank), self._processes[rank].returncode
        if code == -signal.SIGKILL:
            return f"{name} was killed (SIGKILL): if dmesg shows that memory ran out, {SMALLER}; then join again"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{name} ended with {how}: read {self._log(rank)}, and join again"

    def _failure(self, rank: int, failed: OrderFailed) -> str:
        if failed.out_of_memory:
            return f"{self._name(rank)} ran out of memory: {SMALLER}"
        return f"{self._name(rank)} failed: {failed.text} (more in {self._log(rank)}); join again"

    def _name(self, rank: int) -> str:
        return f"rank {rank} of {len(self._processes)}"

    def _log(self, rank: int) -> Path:
        return self._logs / f"rank-{rank}.log"

    def _start(self, rank: int, devices: Sequence[str], inherited: tuple[int, int, int]) -> None:
        shared, size, store = inherited
        ours, theirs = socket.socketpair()
        with theirs, disk_errors(self._logs, "--directory"), self._log(rank).open("wb") as output:
            self._connections.append(Connection(ours.detach()))
            numbers = (theirs.fileno(), shared, size, store, os.getpid())
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "psyche.training.zero.rank_main", *map(str, numbers)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=os.environ | _environment(rank, devices),
                    pass_fds=(theirs.fileno(), shared, store),
                    process_group=0,  # Ctrl-C goes to the leader only
                )
            )


def _environment(rank: int, devices: Sequence[str]) -> dict[str, str]:
    """Return the variables that DeepSpeed and torch.distributed read. Ranks of one node use the loopback interface
    only."""
    kind, _, index = devices[rank].partition(":")
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(len(devices)),
        "LOCAL_RANK": index or str(rank),
        "DS_ACCELERATOR": kind,
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",  # DeepSpeed calls deprecated functions of torch: several warnings per step
    }


def _end(processes: Sequence[subprocess.Popen[bytes]], connections: Sequence[Connection]) -> None:
    """Ask the processes to stop, wait, kill those that are left, and reap them."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.send_bytes(encode(Stop()))
        connection.close()
    until = time.monotonic() + STOP_SECONDS
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

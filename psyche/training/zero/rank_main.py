"""The process of one rank: ``python -m psyche.training.zero.rank_main``, started only by :class:`RankProcesses`.

A thread that receives the orders also watches the parent process from the start, because a rank must not outlive it.
"""

from __future__ import annotations

import os
import sys
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from psyche.training.zero.rank_messages import (
    Evaluate,
    Fit,
    Order,
    OrderDone,
    OrderFailed,
    Read,
    Resume,
    Shift,
    Start,
    Step,
    Stop,
    Write,
    decode_order,
    encode,
)

if TYPE_CHECKING:
    from psyche.training.zero.rank_trainer import Trainer

PARENT_CHECK_SECONDS = 1.0
"""Interval of checks that the parent exists. Its socket closes with it, unless a forked process holds a copy."""


def main() -> None:
    ours, shared, size, store, parent = map(int, sys.argv[1:])
    connection, orders = Connection(ours), SimpleQueue[Order]()
    Thread(target=_listen, args=(connection, orders, parent), daemon=True).start()
    trainer = None
    while True:
        order, answer = orders.get(), OrderDone()
        try:
            if isinstance(order, Start):
                trainer = _trainer(order, shared, size, store)
            else:
                assert trainer is not None
                answer = _execute(order, trainer)
        except Exception as error:
            traceback.print_exc()
            connection.send_bytes(encode(_failed(error)))
        else:
            connection.send_bytes(encode(answer))


def _listen(connection: Connection, orders: SimpleQueue[Order], parent: int) -> None:
    """Receive orders until the parent is gone, then exit the process, whatever its main thread is doing."""
    while True:
        try:
            if connection.poll(PARENT_CHECK_SECONDS):
                order = decode_order(connection.recv_bytes())
                if isinstance(order, Stop):
                    os._exit(0)
                orders.put(order)
        except (EOFError, OSError):
            os._exit(0)
        if os.getppid() != parent:
            os._exit(0)


def _trainer(order: Start, shared: int, size: int, store: int) -> Trainer:
    from psyche.training.zero.rank_trainer import Trainer
    from psyche.training.zero.shared_vector import SharedVector

    return Trainer(order, SharedVector(shared, size).tensor, f"/proc/self/fd/{store}")


def _execute(order: Order, trainer: Trainer) -> OrderDone:
    match order:
        case Step(rows, total, lr):
            return OrderDone(loss=trainer.step(rows, total, lr))
        case Evaluate(rows):
            return OrderDone(*trainer.evaluate(rows))
        case Fit(length):
            return OrderDone(sequences=trainer.fit(length))
        case Read(kind):
            trainer.read(kind)
        case Write(kind, parts):
            trainer.write(kind, parts)
        case Shift(parts):
            trainer.shift(parts)
        case Resume(steps):
            trainer.resume(steps)
    return OrderDone()


def _failed(error: Exception) -> OrderFailed:
    import torch

    text = " ".join(str(error).split())[:500]
    return OrderFailed(f"{type(error).__name__}: {text}", isinstance(error, (torch.OutOfMemoryError, MemoryError)))


if __name__ == "__main__":
    main()

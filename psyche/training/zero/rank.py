"""One rank: ``python -m psyche.training.zero.rank``, started by :class:`psyche.training.zero.ranks.Ranks` only.

What this process must not outlive is watched from its first moment on, by a thread that takes the orders, too.
"""

from __future__ import annotations

import os
import sys
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING

from psyche.training.zero.wire import (
    Done,
    Evaluate,
    Failed,
    Fit,
    Order,
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
    from psyche.training.zero.trainer import Trainer

LOOK_SECONDS = 1.0
"""Between looks at whether the parent is there. Its end of the socket closes with it, unless a fork holds that, too."""


def main() -> None:
    ours, shared, size, store, parent = map(int, sys.argv[1:])
    connection, orders = Connection(ours), SimpleQueue[Order]()
    Thread(target=_listen, args=(connection, orders, parent), daemon=True).start()
    trainer = None
    while True:
        order, answer = orders.get(), Done()
        try:
            if isinstance(order, Start):
                trainer = _trainer(order, shared, size, store)
            else:
                assert trainer is not None
                answer = _carry_out(order, trainer)
        except Exception as error:
            traceback.print_exc()
            connection.send_bytes(encode(_failed(error)))
        else:
            connection.send_bytes(encode(answer))


def _listen(connection: Connection, orders: SimpleQueue[Order], parent: int) -> None:
    """Take orders until there is nobody to give them. Ends the process, whatever its other thread is in."""
    while True:
        try:
            if connection.poll(LOOK_SECONDS):
                order = decode_order(connection.recv_bytes())
                if isinstance(order, Stop):
                    os._exit(0)
                orders.put(order)
        except (EOFError, OSError):
            os._exit(0)
        if os.getppid() != parent:
            os._exit(0)


def _trainer(order: Start, shared: int, size: int, store: int) -> Trainer:
    from psyche.training.zero.shared import SharedVector
    from psyche.training.zero.trainer import Trainer

    return Trainer(order, SharedVector(shared, size).tensor, f"/proc/self/fd/{store}")


def _carry_out(order: Order, trainer: Trainer) -> Done:
    match order:
        case Step(rows, total, lr):
            return Done(loss=trainer.step(rows, total, lr))
        case Evaluate(rows):
            return Done(*trainer.evaluate(rows))
        case Fit(length):
            return Done(sequences=trainer.fit(length))
        case Read(kind):
            trainer.read(kind)
        case Write(kind, parts):
            trainer.write(kind, parts)
        case Shift(parts):
            trainer.shift(parts)
        case Resume(steps):
            trainer.resume(steps)
    return Done()


def _failed(error: Exception) -> Failed:
    import torch

    text = " ".join(str(error).split())[:500]
    return Failed(f"{type(error).__name__}: {text}", isinstance(error, (torch.OutOfMemoryError, MemoryError)))


if __name__ == "__main__":
    main()

"""Run ``psyche join`` and record every byte its process writes to a socket, before encryption.

The libp2p daemon encrypts what this process gives it over local sockets. The bytes of each socket go to one file, in
the order sent, in the directory of the first argument, so that a text sent in two parts is found, too.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from psyche.cli import main


def tap(directory: Path) -> None:
    """Record from now on."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = threading.Lock()

    def record(kind: str, source: object, data: Any) -> None:
        name = f"{os.getpid()}-{kind}-{id(source)}"
        with lock, (directory / name).open("ab") as file:
            file.write(memoryview(data).cast("B"))

    def sending(method: Callable[..., Any]) -> Callable[..., Any]:
        def send(self: socket.socket, data: Any, *arguments: Any) -> Any:
            sent = method(self, data, *arguments)
            record("socket", self, memoryview(data).cast("B")[: sent if isinstance(sent, int) else None])
            return sent

        return send

    def sendmsg(self: socket.socket, buffers: Any, *arguments: Any) -> int:
        sent = original_sendmsg(self, buffers, *arguments)
        record("socket", self, b"".join(buffers)[:sent])
        return sent

    def write(self: asyncio.StreamWriter, data: Any) -> None:
        record("writer", self, data)
        original_write(self, data)

    original_sendmsg, original_write = socket.socket.sendmsg, asyncio.StreamWriter.write
    for name in ("send", "sendall", "sendto"):
        setattr(socket.socket, name, sending(getattr(socket.socket, name)))
    socket.socket.sendmsg = sendmsg  # type: ignore[assignment, method-assign]
    asyncio.StreamWriter.write = write  # type: ignore[method-assign]


if __name__ == "__main__":
    tap(Path(sys.argv.pop(1)))
    sys.argv[0:1] = ["psyche", "join"]
    main()

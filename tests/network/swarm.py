"""Real nodes on 127.0.0.1. Run as a script, one node in a process of its own that can be killed."""

import asyncio
import contextlib
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.numerics.digest import CHUNK, index_blob

RUN = bytes(range(32))
KINDS = ("member", "coordinator")
LOCAL = ("/ip4/127.0.0.1/tcp/0",)


async def start(directory: Path, name: str, bootstrap: Sequence[str] = (), **options: Any) -> NetworkNode:
    identity = Identity.load_or_create(directory / f"{name}.key")
    options = {"listen": LOCAL, "run_id": RUN, "kinds": KINDS} | options
    return await NetworkNode.create(identity, bootstrap=bootstrap, **options)


@contextlib.asynccontextmanager
async def swarm(directory: Path, size: int) -> AsyncIterator[list[NetworkNode]]:
    """Yield ``size`` nodes; all others joined through the first."""
    async with contextlib.AsyncExitStack() as stack:
        nodes: list[NetworkNode] = []
        for number in range(size):
            bootstrap = await nodes[0].addresses() if nodes else ()
            nodes.append(await stack.enter_async_context(await start(directory, f"n{number}", bootstrap)))
        yield nodes


def with_swarm(directory: Path, size: int, scenario: Callable[[list[NetworkNode]], Awaitable[None]]) -> None:
    async def main() -> None:
        async with swarm(directory, size) as nodes:
            await scenario(nodes)

    asyncio.run(main())


def spawn_child(directory: Path, data: bytes, hang_at: int = -1) -> tuple[subprocess.Popen[str], int, list[str]]:
    """Start a node that serves a blob but hangs on one chunk; return process, daemon pid and addresses."""
    file = directory / "child.blob"
    file.write_bytes(data)
    command = [sys.executable, __file__, str(directory), str(file), str(hang_at)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    return process, pid, process.stdout.readline().split()


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; the test's timeout ends an endless wait."""
    while not condition():  # noqa: ASYNC110  # the condition sets no event
        await asyncio.sleep(0.01)


async def be_child(directory: Path, data: bytes, hang_at: int) -> None:
    """Run the node that ``spawn_child`` starts."""

    def read(number: int) -> bytes:
        if number == hang_at:
            time.sleep(3600)
        return data[number * CHUNK : (number + 1) * CHUNK]

    node = await start(directory, "child")
    index = index_blob(data)
    node.blobs.add(index, read)
    print(node._daemon.process.pid, flush=True)
    print(*await node.addresses(), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(be_child(Path(sys.argv[1]), Path(sys.argv[2]).read_bytes(), int(sys.argv[3])))

"""A cancelled fetch leaves no unretrieved exceptions behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from psyche.network.bandwidth import Traffic
from psyche.network.libp2p_transport import Libp2pTransport
from psyche.network.transport import Unreachable


def test_a_source_that_fails_after_the_fetch_was_cancelled_twice_logs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C cancels tasks that are cancelled already; a source lost afterwards must not log a traceback."""
    begun, over = threading.Event(), threading.Event()

    def pull(transport: object, download: object, source: str) -> None:
        begun.set()
        over.wait(20)
        raise Unreachable(source, "connection refused")

    monkeypatch.setattr(Libp2pTransport, "_pull", pull)
    complaints: list[str] = []

    async def scenario() -> None:
        streams = SimpleNamespace(traffic=Traffic(), peer_id="me")
        transport = Libp2pTransport(streams, Path("control"), None, None, None)  # type: ignore[arg-type]
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        download = SimpleNamespace(finished=False, received=0, cancel=lambda: None, fault=None, root=b"")
        fetching = asyncio.create_task(transport._run(download, ["a peer"], 1, None))  # type: ignore[arg-type]
        await asyncio.to_thread(begun.wait, 20)
        for _ in range(2):
            fetching.cancel()
            await asyncio.sleep(0.05)
        with contextlib.suppress(asyncio.CancelledError):
            await fetching
        over.set()
        await asyncio.to_thread(transport._downloads.shutdown)
        del fetching
        await asyncio.sleep(0.05)
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert not complaints

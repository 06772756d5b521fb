"""Fetching that is given up leaves nothing behind that anybody would have to look at."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from psyche.network import fetch as module
from psyche.network.streams import Unreachable


def test_sources_of_a_fetch_that_was_cancelled_twice_may_fail_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C cancels what is cancelled already; a source that is lost afterwards is no traceback in the log."""
    begun, over = threading.Event(), threading.Event()

    def pull(network: object, download: object, source: str) -> None:
        begun.set()
        over.wait(20)
        raise Unreachable(source, "connection refused")

    monkeypatch.setattr(module, "_pull", pull)
    complaints: list[str] = []

    async def scenario(network: object) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context["message"]))
        download = SimpleNamespace(finished=False, received=0, cancel=lambda: None, fault=None, root=b"")
        fetching = asyncio.create_task(module._run(network, download, ["a peer"], 1, None))  # type: ignore[arg-type]
        await asyncio.to_thread(begun.wait, 20)
        for _ in range(2):
            fetching.cancel()
            await asyncio.sleep(0.05)
        with contextlib.suppress(asyncio.CancelledError):
            await fetching
        over.set()
        await asyncio.to_thread(network.downloads.shutdown)  # type: ignore[attr-defined]
        del fetching
        await asyncio.sleep(0.05)
        gc.collect()
        await asyncio.sleep(0)

    asyncio.run(scenario(SimpleNamespace(downloads=ThreadPoolExecutor(1))))
    assert not complaints

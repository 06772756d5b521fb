"""Shared by node and coordinator processes: joining the network, background tasks, the first events of a log."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from psyche.config import Manifest, Node
from psyche.config.units import bytes_per_second
from psyche.durable import disk_errors
from psyche.ledger.history import HistoryFetcher
from psyche.ledger.writer import LedgerWriter
from psyche.network.address import save_port, with_last_port
from psyche.network.discovery import KINDS
from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.network.peer_book import PeerBook
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog


async def connect(
    identity: Identity, run_id: bytes, node: Node, directory: Path, book: PeerBook, bootstrap: tuple[str, ...]
) -> NetworkNode:
    """Start this process's network node, on the port of its last start where the configuration names none.

    It dials the ``bootstrap`` addresses and those in ``book``. Raises ``BootstrapError`` when none of them answers.
    """
    network = await NetworkNode.create(
        identity,
        run_id=run_id,
        kinds=KINDS,
        listen=with_last_port(node.listen, directory),
        announce=node.announce,
        bootstrap=bootstrap,
        remembered=book.addresses(),
        relay=node.relay == "auto",
        spool=directory,
        max_upload=bytes_per_second(node.max_upload),
        max_download=bytes_per_second(node.max_download),
    )
    try:
        with disk_errors(directory, "--directory"):
            save_port(await network.addresses(), directory)
    except BaseException:
        await network.close()
        raise
    return network


@contextlib.asynccontextmanager
async def background_tasks(warn: Callable[[str], None], *work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run ``work`` in tasks while the block runs; cancel them at its end. A task that fails is only warned of."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            warn(f"{task.get_name()} has stopped ({type(error).__name__}: {error}); the rest goes on")

    tasks = [asyncio.create_task(one, name=getattr(one, "__name__", "a task")) for one in work]
    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def keep_history(
    network: NetworkNode, manifest: Manifest, ledger: LedgerWriter, *, follow: bool
) -> Coroutine[Any, Any, None]:
    """Return the background task that completes this process's ledger from its peers; see :class:`HistoryFetcher`."""

    async def peers() -> Sequence[str]:
        found = await network.sources(manifest.resolved.coordinators)
        return [peer for peer in found if peer != network.peer_id]

    return HistoryFetcher(manifest, network.rpc, ledger, peers, follow=follow).run()


def warn_in(log: EventLog) -> Callable[[str], None]:
    """Return a function that writes a warning to ``log``."""
    return lambda text: log.emit(events.Notice(level="warning", text=text))


def run_started(manifest: Manifest, invite: str = "") -> events.RunStarted:
    """Describe the run: the first event of every log."""
    run = manifest.run
    return events.RunStarted(
        run_id=manifest.run_id.hex(),
        name=run.name,
        parameters=manifest.resolved.parameters,
        peers=run.rounds.start_members,
        rounds=run.rounds.total,
        inner_steps=run.rounds.inner_steps,
        codec=run.codec.name,
        invite=invite,
    )

"""What a coordinator that did not launch the run does from start to end: it stands by, and leads when nobody does."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

from psyche.config import MANIFEST, Node
from psyche.coordinator.coordinator import Coordinator
from psyche.data.provision import fetch_manifest, serve_manifest
from psyche.durable import disk_errors, write_durably
from psyche.errors import PsycheError
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.ledger.writer import writing
from psyche.network.address import split_address
from psyche.network.identity import IDENTITY, Identity
from psyche.network.invite import Invite
from psyche.network.peer_book import PEERS, PeerBook, remember
from psyche.network.presence import announce, sources
from psyche.network.probes import serve_probes
from psyche.processes.background import beside, warning
from psyche.processes.node import connect, run_started
from psyche.telemetry.event_log import LOG_NAME, EventLog, Listener
from psyche.telemetry.monitor import Monitor
from psyche.telemetry.wandb_run import swarm_run


async def stand_by(invite: Invite, node: Node, directory: Path, listener: Listener) -> None:
    """Be one of the run's coordinators until it ends. Holds no text and no tensors. Raises ``PsycheError``."""
    identity = Identity.load_or_create(directory / IDENTITY)
    log = EventLog(directory / LOG_NAME, identity.peer_id, (listener,))
    warn = warning(log)
    book = PeerBook(directory / PEERS)
    network = await connect(identity, invite.run_id, node, directory, book, invite.addresses)
    background = announce(network, "coordinator"), remember(network, book, invite.addresses)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(log.close)
        await stack.enter_async_context(network)
        await stack.enter_async_context(beside(warn, *background))
        hosts = await sources(network, tuple(split_address(address)[1] for address in invite.addresses))
        manifest, signed = await fetch_manifest(network, invite.run_id, hosts)
        if identity.peer_id not in manifest.resolved.coordinators:
            raise PsycheError(
                f"{identity.peer_id} (the key in {directory}) is no coordinator of the run {manifest.run.name}: its "
                "launch names them, under run.standbys; `psyche key` prints a directory's"
            )
        with disk_errors(directory, "--directory"):
            write_durably(directory / MANIFEST, manifest.encode())
        await serve_probes(network)
        await serve_manifest(network, signed)
        log.emit(run_started(manifest))

        def leads() -> None:
            """From now on the run's dashboards are this coordinator's to feed."""
            log.subscribe(Monitor(manifest.run, manifest.resolved.parameters, log.emit))
            wandb = swarm_run(node.wandb, directory, manifest, log.emit)
            log.subscribe(wandb)
            stack.push_async_callback(asyncio.to_thread, wandb.close)

        ledger = await asyncio.to_thread(Ledger.open, directory / LEDGER, manifest.run_id)
        writer = await stack.enter_async_context(writing(ledger, warn))
        await Coordinator(manifest, identity, network, log, writer, directory, leads).run()

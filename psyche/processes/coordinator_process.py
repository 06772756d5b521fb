"""The coordinator's process from start to end: one that launches a run, and one that stands by to take over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

from psyche.config import MANIFEST, Config, Manifest, Node
from psyche.coordinator.coordinator import Coordinator
from psyche.data.prepare import Progress, prepare
from psyche.data.provision import fetch_manifest, serve_file, serve_manifest, serve_provisions, sign_manifest
from psyche.data.token_store import TokenStore
from psyche.diloco.launch import Launch, launch
from psyche.durable import disk_errors, write_durably
from psyche.errors import PsycheError
from psyche.ledger.chain_sync import serve_chain
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.ledger.writer import writing
from psyche.network.address import MAX_ADDRESSES, split_address
from psyche.network.connection_probes import serve_probes
from psyche.network.identity import IDENTITY, Identity
from psyche.network.invite import Invite
from psyche.network.peer_book import PEERS, PeerBook, maintain_peer_book
from psyche.processes.connect import background_tasks, connect, keep_history, run_started, warn_in
from psyche.telemetry import events
from psyche.telemetry.event_log import LOG_NAME, EventLog, Listener, read_events
from psyche.telemetry.monitor import Monitor
from psyche.telemetry.wandb_run import swarm_run

GENESIS = "genesis.bin"
"""File of the initial outer state, in the directory of the coordinator that launched the run."""
INVITE = "invite"
"""File of the run's invite, in the same directory."""


async def coordinate(
    config: Config, directory: Path, listener: Listener, progress: Callable[[Progress], None] | None = None
) -> None:
    """Launch the configured run, or resume the one in ``directory``, and lead it to its end.

    Writes the invite to ``directory/invite`` once others can join. Raises ``PsycheError``.
    """
    identity = Identity.load_or_create(directory / IDENTITY)
    manifest, store, heldout = await asyncio.to_thread(_launch_or_resume, config, directory, identity, progress)
    book = PeerBook(directory / PEERS)
    network = await connect(identity, manifest.run_id, config.node, directory, book, ())
    monitor = Monitor(manifest.run, manifest.resolved.parameters, lambda event: log.emit(event))
    if (directory / LOG_NAME).exists():  # a restart: totals continue
        monitor.resume(read_events(directory / LOG_NAME))
    log = EventLog(directory / LOG_NAME, identity.peer_id, (listener, monitor))
    warn = warn_in(log)
    wandb = swarm_run(config.node.wandb, directory, manifest, log.emit)
    log.subscribe(wandb)
    async with network, background_tasks(warn, network.announce("coordinator"), maintain_peer_book(network, book, ())):
        await serve_probes(network)
        await serve_provisions(network, sign_manifest(manifest, identity), store)
        # A node whose random number generator gives another initial state fetches this one.
        serve_file(network, directory / GENESIS, bytes.fromhex(manifest.resolved.genesis))
        invite = Invite(manifest.run_id, tuple((await network.addresses())[:MAX_ADDRESSES])).encode()
        with disk_errors(directory, "--directory"):
            write_durably(directory / INVITE, invite.encode())
        log.emit(run_started(manifest, invite))
        if heldout is not None:
            log.emit(events.GenesisJudged(heldout_loss=heldout[0] / heldout[1], heldout_tokens=heldout[1]))
        try:
            ledger = await asyncio.to_thread(Ledger.open, directory / LEDGER, manifest.run_id)
            async with (
                writing(ledger, warn) as writer,
                background_tasks(warn, keep_history(network, manifest, writer, follow=True)),
            ):
                await serve_chain(network, writer)
                await Coordinator(manifest, identity, network, log, writer, directory).run()
        finally:
            await asyncio.to_thread(wandb.close)
            log.close()


def _launch_or_resume(
    config: Config, directory: Path, identity: Identity, progress: Callable[[Progress], None] | None
) -> tuple[Manifest, TokenStore, tuple[float, int] | None]:
    """Return the manifest and token store of this directory's run; for a new run also its first held-out loss."""
    path = directory / MANIFEST
    if path.exists():
        manifest = Manifest.decode(path.read_bytes())
        if manifest.run != config.run or identity.peer_id not in manifest.resolved.coordinators:
            raise PsycheError(
                f"{directory} holds another run ({manifest.run.name}, with other settings or another key); "
                "choose another --directory, or remove this one to start again"
            )
        run = config.run
        store = prepare(run.data, config.node.cache.expanduser(), vocab_limit=run.model.vocab_size, progress=progress)
        return manifest, TokenStore.open(store.path, bytes.fromhex(manifest.resolved.store)), None
    new: Launch = launch(config, identity.peer_id, progress)
    with disk_errors(directory, "--directory"):
        directory.mkdir(parents=True, exist_ok=True)
        write_durably(directory / GENESIS, bytes(new.genesis.buffer))
        write_durably(path, new.manifest.encode())
    return new.manifest, new.store, new.heldout


async def stand_by(invite: Invite, node: Node, directory: Path, listener: Listener) -> None:
    """Be a standby coordinator until the run ends; lead it while no other coordinator does.

    Holds no training data and no tensors. Raises ``PsycheError``.
    """
    identity = Identity.load_or_create(directory / IDENTITY)
    log = EventLog(directory / LOG_NAME, identity.peer_id, (listener,))
    warn = warn_in(log)
    book = PeerBook(directory / PEERS)
    network = await connect(identity, invite.run_id, node, directory, book, invite.addresses)
    background = network.announce("coordinator"), maintain_peer_book(network, book, invite.addresses)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(log.close)
        await stack.enter_async_context(network)
        await stack.enter_async_context(background_tasks(warn, *background))
        hosts = await network.sources(tuple(split_address(address)[1] for address in invite.addresses))
        manifest, signed = await fetch_manifest(network, invite.run_id, hosts)
        if identity.peer_id not in manifest.resolved.coordinators:
            raise PsycheError(
                f"{identity.peer_id} (the key in {directory}) is not a coordinator of the run {manifest.run.name}: "
                "list its PeerID (`psyche key DIRECTORY` prints it) under run.standbys before launching a run"
            )
        with disk_errors(directory, "--directory"):
            write_durably(directory / MANIFEST, manifest.encode())
        await serve_probes(network)
        await serve_manifest(network, signed)
        log.emit(run_started(manifest))

        def on_leading() -> None:
            """Feed the run's dashboards from now on."""
            log.subscribe(Monitor(manifest.run, manifest.resolved.parameters, log.emit))
            wandb = swarm_run(node.wandb, directory, manifest, log.emit)
            log.subscribe(wandb)
            stack.push_async_callback(asyncio.to_thread, wandb.close)

        ledger = await asyncio.to_thread(Ledger.open, directory / LEDGER, manifest.run_id)
        writer = await stack.enter_async_context(writing(ledger, warn))
        await serve_chain(network, writer)
        await stack.enter_async_context(background_tasks(warn, keep_history(network, manifest, writer, follow=True)))
        await Coordinator(manifest, identity, network, log, writer, directory, on_leading).run()

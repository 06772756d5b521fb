"""A node's process from start to end: connect, get what the run needs, train until the run ends or the node leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import torch

from psyche.config import MANIFEST, Manifest, Node
from psyche.config.ethereum_address import address_bytes
from psyche.data.provision import fetch_manifest, fetch_required_files, find_store, serve_provisions, shard_cache
from psyche.data.shard_prefetch import ShardPrefetcher, SwarmShardPrefetcher
from psyche.data.shard_sources import ShardSources, mirrors_of
from psyche.data.token_store import TokenStore
from psyche.diloco.checkpoint import load_latest
from psyche.diloco.replica import Replica
from psyche.durable import disk_errors, write_durably
from psyche.errors import PsycheError
from psyche.federated.private_training import open_privacy_budget, open_private_training
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.ledger.writer import backfill, writing
from psyche.network.address import split_address
from psyche.network.connection_probes import serve_probes
from psyche.network.identity import IDENTITY, Identity
from psyche.network.invite import Invite
from psyche.network.node import BootstrapError, NetworkNode
from psyche.network.peer_book import PEERS, PeerBook, maintain_peer_book
from psyche.numerics.backends.selection import backend_on
from psyche.numerics.outer import OuterState
from psyche.processes.connect import background_tasks, connect, keep_history, run_started, warn_in
from psyche.processes.process_lock import registered
from psyche.telemetry import events
from psyche.telemetry.event_log import LOG_NAME, EventLog, Listener
from psyche.telemetry.wandb_run import own_run
from psyche.tools.preflight import check_machine, report_findings, warn_of_connection
from psyche.training.engine_choice import EngineChoice, choose_engine, make_engine
from psyche.training.models import check_size, preload
from psyche.worker.coordinator_client import PATIENCE_SECONDS
from psyche.worker.leaving import LeaveRequest
from psyche.worker.worker import Worker

RETRY_SECONDS = 2.0


async def join(
    invite: Invite,
    node: Node,
    directory: Path,
    listener: Callable[[str], Listener],
    leave_request: LeaveRequest | None = None,
) -> None:
    """Join a run and take part until it ends or ``leave_request`` is made.

    Resumes from the checkpoint in ``directory`` if there is one. ``listener`` makes the event listener from this node's
    PeerID. Raises ``PsycheError``.
    """
    identity = Identity.load_or_create(directory / IDENTITY)
    log = EventLog(directory / LOG_NAME, identity.peer_id, (listener(identity.peer_id),))
    log.emit(events.PhaseChanged(round=0, phase="joining"))
    warn = warn_in(log)
    book = PeerBook(directory / PEERS)
    async with background_tasks(warn, asyncio.to_thread(preload)):
        network = await _connect(invite, node, directory, identity, book, warn)
        background = network.announce("member"), maintain_peer_book(network, book, invite.addresses)
        # After connect(), which locks the key: a second process in this directory must not register as its node.
        async with (
            network,
            registered(directory),
            background_tasks(warn, *background, warn_of_connection(network, node, warn)),
        ):
            try:
                await _run_worker(invite, node, directory, identity, network, log, leave_request)
            except PsycheError as error:
                log.emit(events.Notice(level="error", text=str(error)))
                raise
            finally:
                log.close()


async def _connect(
    invite: Invite, node: Node, directory: Path, identity: Identity, book: PeerBook, warn: Callable[[str], None]
) -> NetworkNode:
    """Connect to the run's network. A node that was in the run before waits for other members to appear.

    After an outage of the whole run some node is the first to come back. A new node does not wait: its invite is
    probably wrong.
    """
    until = time.monotonic() + (PATIENCE_SECONDS if (directory / MANIFEST).exists() else 0.0)
    warned = False
    while True:
        try:
            return await connect(identity, invite.run_id, node, directory, book, invite.addresses)
        except BootstrapError:
            if time.monotonic() >= until:
                raise
            if not warned:
                warn(f"no other member of the run is reachable; retrying for {PATIENCE_SECONDS / 60:.0f} minutes")
            warned = True
            await asyncio.sleep(RETRY_SECONDS)


async def _fetch_manifest(
    invite: Invite, directory: Path, network: NetworkNode, warn: Callable[[str], None]
) -> tuple[list[str], Manifest, bytes]:
    """Return the peers that serve the run's files, the manifest, and the manifest as signed by its coordinator.

    A node that was in the run before retries while no peer answers: after an outage all of them start at once.
    """
    until, warned = time.monotonic() + (PATIENCE_SECONDS if (directory / MANIFEST).exists() else 0.0), False
    while True:
        hosts = await network.sources(tuple(split_address(address)[1] for address in invite.addresses))
        try:
            manifest, signed = await fetch_manifest(network, invite.run_id, hosts)
        except PsycheError as error:
            if time.monotonic() >= until:
                raise
            if not warned:
                warn(f"{error}; retrying for {PATIENCE_SECONDS / 60:.0f} minutes")
            warned = True
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return hosts, manifest, signed


async def _run_worker(
    invite: Invite,
    node: Node,
    directory: Path,
    identity: Identity,
    network: NetworkNode,
    log: EventLog,
    leave_request: LeaveRequest | None,
) -> None:
    """Fetch what the run needs from its peers, then train until the run ends."""
    warn = warn_in(log)
    hosts, manifest, signed = await _fetch_manifest(invite, directory, network, warn)
    log.emit(run_started(manifest))
    await asyncio.to_thread(check_size, manifest.run.model, manifest.resolved.flat_size)
    choice = await asyncio.to_thread(choose_engine, node, manifest.resolved.flat_size, manifest.run.inner.optimizer)
    log.emit(engine_notice(choice))
    found = await find_store(network, manifest, node, hosts)
    budget = await asyncio.to_thread(open_privacy_budget, manifest, node, directory)
    report_findings(check_machine(manifest, node, choice, directory, found), warn)
    with disk_errors(directory, "--directory"):
        write_durably(directory / MANIFEST, manifest.encode())

    def downloading(received: int, total: int) -> None:
        log.emit(events.Downloading(what="the text to train on", received=received, total=total))

    async def obtain_data() -> SwarmShardPrefetcher:
        shard_sources = ShardSources(network, mirrors_of(manifest, node), hosts, warn)
        await fetch_required_files(found, manifest, shard_sources, downloading)
        await serve_probes(network)
        offers = await serve_provisions(network, signed, found.store)
        return SwarmShardPrefetcher(manifest.run, found.store.train, shard_cache(node), shard_sources, offers, log)

    restoring = asyncio.to_thread(_restore_replica, manifest, found.store, node, choice, directory, identity, log)
    prefetcher: ShardPrefetcher
    (replica, certificates), prefetcher = await asyncio.gather(restoring, obtain_data())
    if node.payout is not None:
        replica.payout = address_bytes(node.payout)
    if budget is not None:
        prefetcher = ShardPrefetcher()  # it trains on its own data only
        replica.private = await asyncio.to_thread(open_private_training, manifest, node, directory, found.store, budget)
        log.emit(replica.private.account(replica.chain.rounds))
    wandb = own_run(node.wandb, directory, manifest, identity.peer_id, log.emit)
    if wandb is not None:
        log.subscribe(wandb)
    try:
        ledger = await asyncio.to_thread(Ledger.open, directory / LEDGER, manifest.run_id)
        async with (
            writing(ledger, warn) as writer,
            background_tasks(warn, keep_history(network, manifest, writer, follow=False)),
        ):
            await asyncio.to_thread(backfill, ledger, manifest, replica.chain, certificates, warn)
            last = certificates[-1] if certificates else None
            await Worker(
                replica, node, directory, identity, network, log, writer, last, leave_request, prefetcher
            ).run()
    finally:
        if wandb is not None:
            await asyncio.to_thread(wandb.close)


def _restore_replica(
    manifest: Manifest,
    store: TokenStore,
    node: Node,
    choice: EngineChoice,
    directory: Path,
    identity: Identity,
    log: EventLog,
) -> tuple[Replica, tuple[bytes, ...]]:
    """Build this node's replica from its newest checkpoint, or the initial state, with the saved certificates."""
    if node.threads is not None:
        torch.set_num_threads(node.threads)
    engine = make_engine(manifest.run, node, choice, directory, end=store.index.pad)
    if engine.layout.digest.hex() != manifest.resolved.layout:
        raise PsycheError(
            "this machine's version of transformers gives the model another parameter layout than the run's manifest: "
            "install the versions in psyche's constraints.txt"
        )
    backend = backend_on(_outer_device(node, choice.device))
    theta = torch.empty(engine.layout.size)
    engine.read(theta)
    secret = identity.secret_digest(b"salt")
    checkpoint = load_latest(directory / "checkpoints", manifest.run_id, warn_in(log))
    if checkpoint is None:
        return Replica(manifest, engine, store, OuterState.initial(theta), identity.peer_id, secret, backend), ()
    replica = Replica(manifest, engine, store, OuterState(checkpoint.outer), identity.peer_id, secret, backend)
    if replica.chain.state_root != checkpoint.chain.state_root:
        raise PsycheError(
            f"the newest checkpoint in {directory / 'checkpoints'} does not match its state root: remove it and rejoin"
        )
    replica.chain = checkpoint.chain
    if replica.residual is not None and checkpoint.residual is not None:
        replica.residual.copy_(checkpoint.residual)
    engine.load_state(checkpoint.inner)
    return replica, checkpoint.certificates


def _outer_device(node: Node, device: torch.device) -> torch.device:
    if node.outer_state == "cpu":
        return torch.device("cpu")
    if device.type == "cpu":
        raise PsycheError("node.outer_state is gpu, but this node trains on the CPU: set it to cpu")
    return device


def engine_notice(choice: EngineChoice) -> events.Notice:
    """Say which engine was chosen and why; a warning where a setting would improve on it."""
    if choice.remedy:
        return events.Notice(level="warning", text=f"{choice.reason}; {choice.remedy}")
    return events.Notice(level="info", text=choice.reason)

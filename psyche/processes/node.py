"""What a process of a run does from start to end: the coordinator's, and a node's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import torch

from psyche.config import MANIFEST, Config, Manifest, Node
from psyche.config.ethereum_address import address_bytes
from psyche.coordinator.coordinator import Coordinator
from psyche.data.prepare import Progress, prepare
from psyche.data.provision import (
    fetch_manifest,
    find_store,
    obtain_basis,
    serve_file,
    serve_provisions,
    shard_cache,
    sign_manifest,
)
from psyche.data.shard_prefetch import ShardSupply, Supply
from psyche.data.shard_sources import ShardSources, mirrors_of
from psyche.data.store import TokenStore
from psyche.diloco.checkpoint import load_latest
from psyche.diloco.replica import Replica
from psyche.durable import disk_errors, write_durably
from psyche.errors import PsycheError
from psyche.federated.private_training import check_private, open_private
from psyche.launch.launch import Launch, launch
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.ledger.writer import backfill, writing
from psyche.network.address import split_address
from psyche.network.identity import IDENTITY, Identity
from psyche.network.invite import MAX_ADDRESSES, Invite
from psyche.network.node import NetworkNode, NobodyThere
from psyche.network.peer_book import PEERS, PeerBook, remember
from psyche.network.ports import keep_port, last_port
from psyche.network.presence import KINDS, announce, sources
from psyche.network.probes import serve_probes
from psyche.numerics.backends.selection import backend_on
from psyche.numerics.outer import OuterState
from psyche.processes.background import beside, warning
from psyche.processes.process_lock import registered
from psyche.rates import bytes_per_second
from psyche.telemetry import events
from psyche.telemetry.event_log import LOG_NAME, EventLog, Listener, read_events
from psyche.telemetry.monitor import Monitor
from psyche.telemetry.wandb_run import own_run, swarm_run
from psyche.tools.preflight import check_machine, tell, warn_of_connection
from psyche.training.choice import Choice, choose, make_engine
from psyche.training.models import preload
from psyche.worker.coordinator_client import PATIENCE_SECONDS
from psyche.worker.leaving import LeaveRequest
from psyche.worker.worker import Worker

GENESIS = "genesis.bin"
INVITE = "invite"
RETRY_SECONDS = 2.0


# ---------------------------------------------------------------------------------- the coordinator


async def coordinate(
    config: Config, directory: Path, listener: Listener, progress: Callable[[Progress], None] | None = None
) -> None:
    """Launch the configured run, or take up again the one in ``directory``, and lead it to its end.

    The invite is written to ``directory/invite`` once others can join. Raises ``PsycheError``.
    """
    identity = Identity.load_or_create(directory / IDENTITY)
    manifest, store, heldout = await asyncio.to_thread(_launched, config, directory, identity, progress)
    book = PeerBook(directory / PEERS)
    network = await connect(identity, manifest.run_id, config.node, directory, book, ())
    monitor = Monitor(manifest.run, manifest.resolved.parameters, lambda event: log.emit(event))
    if (directory / LOG_NAME).exists():  # a restart: totals go on from where they were
        monitor.resume(read_events(directory / LOG_NAME))
    log = EventLog(directory / LOG_NAME, identity.peer_id, (listener, monitor))
    warn = warning(log)
    wandb = swarm_run(config.node.wandb, directory, manifest, log.emit)
    log.subscribe(wandb)
    async with network, beside(warn, announce(network, "coordinator"), remember(network, book, ())):
        await serve_probes(network)
        await serve_provisions(network, sign_manifest(manifest, identity), store)
        # Nodes whose random numbers differ from ours fetch the initial state.
        serve_file(network, directory / GENESIS, bytes.fromhex(manifest.resolved.genesis))
        invite = Invite(manifest.run_id, tuple((await network.addresses())[:MAX_ADDRESSES])).encode()
        with disk_errors(directory, "--directory"):
            write_durably(directory / INVITE, invite.encode())
        log.emit(run_started(manifest, invite))
        if heldout is not None:
            log.emit(events.GenesisJudged(heldout_loss=heldout[0] / heldout[1], heldout_tokens=heldout[1]))
        try:
            ledger = await asyncio.to_thread(Ledger.open, directory / LEDGER, manifest.run_id)
            async with writing(ledger, warn) as writer:
                await Coordinator(manifest, identity, network, log, writer, directory).run()
        finally:
            await asyncio.to_thread(wandb.close)
            log.close()


def _launched(
    config: Config, directory: Path, identity: Identity, progress: Callable[[Progress], None] | None
) -> tuple[Manifest, TokenStore, tuple[float, int] | None]:
    """The manifest and store of this directory's run; launched now if it is new."""
    path = directory / MANIFEST
    if path.exists():
        manifest = Manifest.decode(path.read_bytes())
        if manifest.run != config.run or identity.peer_id not in manifest.resolved.coordinators:
            raise PsycheError(
                f"{directory} holds another run ({manifest.run.name}, with other settings or another key); "
                "choose another --directory, or remove it to start anew"
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


# ------------------------------------------------------------------------------------------- a node


async def join(
    invite: Invite,
    node: Node,
    directory: Path,
    listener: Callable[[str], Listener],
    leave_request: LeaveRequest | None = None,
) -> None:
    """Join a run and take part until it ends, or ``leave_request`` says to leave.

    ``listener`` makes the event listener from this node's PeerID.

    Goes on from the checkpoint in ``directory`` if there is one. Raises ``PsycheError``.
    """
    identity = Identity.load_or_create(directory / IDENTITY)
    log = EventLog(directory / LOG_NAME, identity.peer_id, (listener(identity.peer_id),))
    log.emit(events.PhaseChanged(round=0, phase="joining"))
    warn = warning(log)
    book = PeerBook(directory / PEERS)
    async with beside(warn, asyncio.to_thread(preload)):
        network = await _come(invite, node, directory, identity, book, warn)
        background = announce(network, "member"), remember(network, book, invite.addresses)
        # Registered once the key is ours: of two that are started in one directory only the first is to be found.
        async with network, registered(directory), beside(warn, *background, warn_of_connection(network, node, warn)):
            try:
                await _take_part(invite, node, directory, identity, network, log, leave_request)
            except PsycheError as error:
                log.emit(events.Notice(level="error", text=str(error)))
                raise
            finally:
                log.close()


async def _come(
    invite: Invite, node: Node, directory: Path, identity: Identity, book: PeerBook, warn: Callable[[str], None]
) -> NetworkNode:
    """This node's place in the run's network. One that was in the run before waits for others to be there.

    After a power cut of everything somebody is the first. A newcomer's invite is wrong, more likely.
    """
    until = time.monotonic() + (PATIENCE_SECONDS if (directory / MANIFEST).exists() else 0.0)
    told = False
    while True:
        try:
            return await connect(identity, invite.run_id, node, directory, book, invite.addresses)
        except NobodyThere:
            if time.monotonic() >= until:
                raise
            if not told:
                minutes = f"{PATIENCE_SECONDS / 60:.0f} minutes"
                warn(f"none of the run's other members can be reached; trying again for {minutes}")
            told = True
            await asyncio.sleep(RETRY_SECONDS)


async def _ask_for_manifest(
    invite: Invite, directory: Path, network: NetworkNode, warn: Callable[[str], None]
) -> tuple[list[str], Manifest, bytes]:
    """Whom to ask for what the run needs, and its manifest. A node that was in the run before asks again where those
    who are there do not answer: they may be as busy as it is."""
    until, told = time.monotonic() + (PATIENCE_SECONDS if (directory / MANIFEST).exists() else 0.0), False
    while True:
        hosts = await sources(network, tuple(split_address(address)[1] for address in invite.addresses))
        try:
            manifest, signed = await fetch_manifest(network, invite.run_id, hosts)
        except PsycheError as error:
            if time.monotonic() >= until:
                raise
            if not told:
                warn(f"{error}; trying again for {PATIENCE_SECONDS / 60:.0f} minutes")
            told = True
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return hosts, manifest, signed


async def _take_part(
    invite: Invite,
    node: Node,
    directory: Path,
    identity: Identity,
    network: NetworkNode,
    log: EventLog,
    leave_request: LeaveRequest | None,
) -> None:
    """Get what the run needs from those who are there, and work until it ends."""
    warn = warning(log)
    hosts, manifest, signed = await _ask_for_manifest(invite, directory, network, warn)
    log.emit(run_started(manifest))
    choice = await asyncio.to_thread(choose, node, manifest.resolved.flat_size, manifest.run.inner.optimizer)
    log.emit(engine_chosen(choice))
    found = await find_store(network, manifest, node, hosts)
    budget = await asyncio.to_thread(check_private, manifest, node, directory)
    tell(check_machine(manifest, node, choice, directory, found), warn)
    with disk_errors(directory, "--directory"):
        write_durably(directory / MANIFEST, manifest.encode())

    def downloading(received: int, total: int) -> None:
        log.emit(events.Downloading(what="the text to train on", received=received, total=total))

    async def provide() -> ShardSupply:
        suppliers = ShardSources(network, mirrors_of(manifest, node), hosts, warn)
        await obtain_basis(found, manifest, suppliers, downloading)
        await serve_probes(network)
        offers = await serve_provisions(network, signed, found.store)
        return ShardSupply(manifest.run, found.store.train, shard_cache(node), suppliers, offers, log)

    making = asyncio.to_thread(_replica, manifest, found.store, node, choice, directory, identity, log)
    supply: Supply
    (replica, certificates), supply = await asyncio.gather(making, provide())
    if node.payout is not None:
        replica.payout = address_bytes(node.payout)
    if budget is not None:
        supply = Supply()  # of the run's text it trains on none
        replica.private = await asyncio.to_thread(open_private, manifest, node, directory, found.store, budget)
        log.emit(replica.private.account(replica.chain.rounds))
    wandb = own_run(node.wandb, directory, manifest, identity.peer_id, log.emit)
    if wandb is not None:
        log.subscribe(wandb)
    try:
        ledger = await asyncio.to_thread(Ledger.open, directory / LEDGER, manifest.run_id)
        async with writing(ledger, warn) as writer:
            await asyncio.to_thread(backfill, ledger, manifest, replica.chain, certificates, warn)
            last = certificates[-1] if certificates else None
            await Worker(replica, node, directory, identity, network, log, writer, last, leave_request, supply).run()
    finally:
        if wandb is not None:
            await asyncio.to_thread(wandb.close)


def _replica(
    manifest: Manifest,
    store: TokenStore,
    node: Node,
    choice: Choice,
    directory: Path,
    identity: Identity,
    log: EventLog,
) -> tuple[Replica, tuple[bytes, ...]]:
    """This node's tensors, as the last checkpoint left them or as the run begins; and what certificates it held."""
    if node.threads is not None:
        torch.set_num_threads(node.threads)
    engine = make_engine(manifest.run, node, choice, directory, end=store.index.pad)
    if engine.layout.digest.hex() != manifest.resolved.layout:
        raise PsycheError(
            "this machine's transformers lays the model out differently from the run's: "
            "install the versions in psyche's constraints.txt"
        )
    backend = backend_on(_outer_device(node, choice.device))
    theta = torch.empty(engine.layout.size)
    engine.read(theta)
    secret = identity.secret_digest(b"salt")
    checkpoint = load_latest(directory / "checkpoints", manifest.run_id, warning(log))
    if checkpoint is None:
        return Replica(manifest, engine, store, OuterState.initial(theta), identity.peer_id, secret, backend), ()
    replica = Replica(manifest, engine, store, OuterState(checkpoint.outer), identity.peer_id, secret, backend)
    if replica.chain.state_root != checkpoint.chain.state_root:
        raise PsycheError("the checkpoint's tensors are not those its state_root names; remove it and join again")
    replica.chain = checkpoint.chain
    if replica.residual is not None and checkpoint.residual is not None:
        replica.residual.copy_(checkpoint.residual)
    engine.load_state(checkpoint.inner)
    return replica, checkpoint.certificates


def _outer_device(node: Node, trains_on: torch.device) -> torch.device:
    if node.outer_state == "cpu":
        return torch.device("cpu")
    if trains_on.type == "cpu":
        raise PsycheError("node.outer_state is gpu, but this node trains on the CPU: set it to cpu, or use a GPU")
    return trains_on


# -------------------------------------------------------------------------------------------- both


async def connect(
    identity: Identity, run_id: bytes, node: Node, directory: Path, book: PeerBook, bootstrap: tuple[str, ...]
) -> NetworkNode:
    """This process's place in the run's network, as ``node`` has it, and where it was last time."""
    network = await NetworkNode.create(
        identity,
        run_id=run_id,
        kinds=KINDS,
        listen=last_port(node.listen, directory),
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
            keep_port(await network.addresses(), directory)
    except BaseException:
        await network.close()
        raise
    return network


def engine_chosen(choice: Choice) -> events.Notice:
    """What a log says of the engine."""
    if choice.mend:
        return events.Notice(level="warning", text=f"{choice.why}; {choice.mend}")
    return events.Notice(level="info", text=choice.why)


def run_started(manifest: Manifest, invite: str = "") -> events.RunStarted:
    """What a log says of its run first."""
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

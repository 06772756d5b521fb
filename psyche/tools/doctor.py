"""``psyche doctor``: try out everything that a run needs of this machine and its line."""

from __future__ import annotations

import asyncio
import contextlib
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from psyche.config import Manifest, Node
from psyche.config.units import bytes_per_second
from psyche.data.provision import FoundStore, fetch_manifest, find_store, required_files
from psyche.errors import PsycheError
from psyche.network.address import check_port_free, split_address
from psyche.network.bandwidth import MEASURED_BYTES
from psyche.network.discovery import KINDS
from psyche.network.identity import IDENTITY, Identity, in_use
from psyche.network.invite import Invite
from psyche.network.node import NetworkNode
from psyche.network.peer_book import PEERS, PeerBook
from psyche.network.transport import FetchError
from psyche.telemetry.formatting import size
from psyche.tools.checks import Finding, check_disk, check_rate, check_speed, check_versions
from psyche.tools.preflight import check_connection, check_machine, port_of
from psyche.training.devices import pick_device
from psyche.training.engine_choice import EngineChoice, choose_engine, describe_device, make_engine

TRAIN_SECONDS = 2.0
"""Duration of the speed measurement, after one warm-up step."""
FETCH_BYTES = 32 << 20
"""Largest file to fetch for measuring the line."""
FETCH_SECONDS = 20.0
SMALL_DISK = 2 << 30
"""Disk space to check for when no invite says which run it is."""

Report = Callable[[Finding], None]


async def examine(invite: Invite | None, node: Node, directory: Path, report: Report) -> None:
    """Run all checks that are possible and ``report`` each finding; failures are findings, not exceptions.

    Connects to the run under a temporary key, so that a node of this machine can keep running. Leaves no files.
    """
    report(check_versions())
    report(_device(node))
    running = in_use(directory / IDENTITY)
    report(_port(node, running))
    if invite is None:
        report(check_disk("a run's files", directory, SMALL_DISK, "--directory"))
    with tempfile.TemporaryDirectory(prefix="psyche-doctor-") as scratch:
        listen = ["/ip4/0.0.0.0/tcp/0"] if running else node.listen
        try:
            network = await NetworkNode.create(
                Identity.load_or_create(Path(scratch) / IDENTITY),
                run_id=bytes(32) if invite is None else invite.run_id,
                kinds=KINDS,
                listen=listen,
                announce=node.announce,
                bootstrap=() if invite is None else invite.addresses,
                relay=node.relay == "auto",
                spool=Path(scratch),
                max_download=bytes_per_second(node.max_download),
            )
        except PsycheError as error:
            report(Finding("network", "fail", "the network node did not start or reached no peer", str(error)))
            return
        async with network:
            port = port_of(await network.addresses())
            report(Finding("network", "ok", f"the libp2p daemon runs and listens on port {port}"))
            if invite is not None:
                await _visit(network, invite, node, directory, Path(scratch), report)


async def _visit(
    network: NetworkNode, invite: Invite, node: Node, directory: Path, scratch: Path, report: Report
) -> None:
    """Run the checks that need the run's network."""
    hosts = await network.sources(tuple(split_address(address)[1] for address in invite.addresses))
    connected = len(await network.connected())
    report(Finding("peers", "ok", f"{connected} connected, {len(hosts)} known"))
    own = PeerBook(directory / PEERS).own if in_use(directory / IDENTITY) else ()
    connection, _ = await check_connection(network, node, port_of(own) or None)
    for finding in connection:
        report(finding)
    try:
        manifest, _ = await fetch_manifest(network, invite.run_id, hosts)
        found = await find_store(network, manifest, node, hosts)
    except PsycheError as error:
        report(Finding("run", "fail", "its manifest or training data cannot be fetched", str(error)))
        return
    parameters = manifest.resolved.parameters
    report(Finding("run", "ok", f"{manifest.run.name}, {parameters:,} parameters, codec {manifest.run.codec.name}"))
    try:
        choice = await asyncio.to_thread(choose_engine, node, manifest.resolved.flat_size, manifest.run.inner.optimizer)
    except PsycheError as error:
        report(Finding("engine", "fail", "this node's settings do not fit its devices", str(error)))
        return
    report(Finding("engine", "warn" if choice.remedy else "ok", choice.reason, choice.remedy))
    machine = check_machine(manifest, node, choice, directory, found)
    for finding in machine:
        report(finding)
    report(await _measure_line(network, manifest, found, hosts))
    if all(finding.level != "fail" for finding in machine):
        report(await asyncio.to_thread(_measure_speed, manifest, node, choice, scratch))


def _device(node: Node) -> Finding:
    try:
        device, text = pick_device(node.device), describe_device(node)
    except PsycheError as error:
        return Finding("device", "fail", f"node.device is {node.device}, node.gpus is {node.gpus}", str(error))
    if device.type == "cuda":
        return Finding("device", "ok", text)
    if Path("/proc/driver/nvidia/version").exists() and node.device == "auto":
        fix = "install the CUDA build of torch that fits the driver: see https://pytorch.org/get-started/locally"
        return Finding("device", "warn", "an NVIDIA driver is installed, but torch finds no GPU", fix)
    return Finding("device", "ok", text)


def _port(node: Node, running: bool) -> Finding:
    for address in node.listen:
        try:
            check_port_free(address)
        except PsycheError as error:
            if running:
                return Finding("port", "ok", f"{address} is in use by the node that runs here")
            return Finding("port", "fail", f"cannot listen on {address}", str(error))
    if all(re.search(r"/tcp/0$", address) for address in node.listen):
        return Finding("port", "ok", "any free port, kept between starts; set --port to forward one in a router")
    return Finding("port", "ok", f"{', '.join(node.listen)} is free")


async def _measure_line(network: NetworkNode, manifest: Manifest, found: FoundStore, hosts: list[str]) -> Finding:
    """Fetch and verify one file that every node has, and discard it."""
    files = [item for item, _ in required_files(found.store, manifest) if item.bytes <= FETCH_BYTES]
    if not files:
        return Finding("transfer", "ok", f"not measured: every file of the training data is above {size(FETCH_BYTES)}")
    largest = max(files, key=lambda item: item.bytes)
    root, count = bytes.fromhex(largest.root), largest.bytes
    began, before = time.monotonic(), network.traffic.bytes_down
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FETCH_SECONDS):
                await network.blobs.fetch_bytes(root, sources=hosts, size=count, max_size=count)
    except FetchError as error:
        return Finding("transfer", "warn", "no peer could send a file of the training data", str(error))
    received = network.traffic.bytes_down - before
    return check_rate(manifest, received, received / (time.monotonic() - began), MEASURED_BYTES)


def _measure_speed(manifest: Manifest, node: Node, choice: EngineChoice, scratch: Path) -> Finding:
    """Train the run's model on random tokens for TRAIN_SECONDS."""
    run = manifest.run
    if node.threads is not None:
        torch.set_num_threads(node.threads)
    try:
        engine = make_engine(run, node, choice, scratch)
        shape = (run.inner.batch_size, run.data.sequence_length)
        batch = torch.randint(0, run.model.vocab_size, shape).numpy()
        engine.step(batch, run.inner.lr)
        steps, began = 0, time.monotonic()
        while steps == 0 or time.monotonic() - began < TRAIN_SECONDS:
            engine.step(batch, run.inner.lr)
            steps += 1
    except (torch.OutOfMemoryError, MemoryError):
        fix = "set node.micro_batch to 1, free memory, or use a larger machine"
        return Finding("speed", "fail", "one inner step did not fit into memory", fix)
    except PsycheError as error:
        return Finding("speed", "fail", "the model cannot be built on this machine", str(error))
    return check_speed(manifest, steps * run.tokens_per_step / (time.monotonic() - began))

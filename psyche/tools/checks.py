"""Checks of a machine before it trains: each returns what it found and, where something is wrong, how to fix it.

The checks get measured numbers as arguments, so that every outcome can be tested.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

from psyche.config import Manifest, Node, Run
from psyche.network.connection_probes import Offset
from psyche.numerics.codecs.registry import codec
from psyche.telemetry.formatting import size
from psyche.training.engine_choice import EngineChoice
from psyche.training.zero.zero_memory import OVERHEAD, rank_bytes

Level = Literal["ok", "warn", "fail"]
CLOCK_WARN = 1.5
"""Clock offset in seconds from which to warn. Bootstrap nodes refuse peers that differ by more than 3."""
AUDIT_BUNDLES = 3
"""Rounds whose audit bundles are on disk: the current one, the one before (it may still be drawn for an audit), and one
that is being audited."""
RANK_BYTES = 500 << 20
"""Memory of a rank without any tensor: Python, torch, transformers and DeepSpeed."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    ``level`` is ok, warn (works, but not well or not surely) or fail (cannot work); ``fix`` is empty for ok.
    """

    check: str
    level: Level
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Requirements:
    """Bytes that a run needs on a node."""

    host: int
    """Main memory."""
    device: int
    """Memory of each training GPU; 0 on a CPU."""
    directory: int
    """Disk space for checkpoints, payloads and audit bundles."""


def requirements(manifest: Manifest, node: Node, choice: EngineChoice) -> Requirements:
    """Estimate the memory of :class:`Replica` and the chosen engine, and the disk space of their files."""
    run, elements = manifest.run, manifest.resolved.flat_size
    encoder = codec(run.codec.name)
    residual = 4 * elements * encoder.error_feedback
    on_gpu = choice.device.type == "cuda"
    engine_device, engine_host = _engine_bytes(elements, choice)
    outer = 3 * 4 * elements + residual  # θ, m, the local parameters, the error feedback
    evaluation = 4 * elements  # the local parameters, set aside while θ is evaluated
    payloads = encoder.payload_bytes(elements) * (run.rounds.start_members + 1)
    checkpoint = (2 + 2) * 4 * elements + residual
    outer_on_gpu = node.outer_state == "gpu" and on_gpu
    trace_point, bundles = _audit_bytes(run, elements)
    return Requirements(
        host=(8 * elements if outer_on_gpu else outer)
        + (evaluation + engine_host + trace_point + (0 if on_gpu else engine_device * len(choice.devices))),
        device=(engine_device + (outer if outer_on_gpu else 0)) if on_gpu else 0,
        directory=checkpoint * (node.checkpoints_kept + 1) + payloads + bundles,
    )


def _audit_bytes(run: Run, elements: int) -> tuple[int, int]:
    """Return the bytes of memory for one trace point, and of disk for the audit bundles."""
    if not run.audits.rate:
        return 0, 0
    trace_point = 3 * 4 * elements  # parameters, and two moments
    every = run.audits.trace_steps or run.rounds.inner_steps
    points = 1 + -(-run.rounds.inner_steps // every)
    return trace_point, AUDIT_BUNDLES * (points * trace_point + 2 * 4 * elements)  # and θ, and the error feedback


def _engine_bytes(elements: int, choice: EngineChoice) -> tuple[int, int]:
    """Return the engine's bytes on each training device, and those in main memory besides."""
    if choice.stage is None:
        return 4 * 4 * elements, 0  # parameters, gradients, AdamW's two moments
    ranks = len(choice.devices)
    each = rank_bytes(elements, choice.stage, ranks, offload=choice.offload)
    shared = 4 * elements  # the flat vector shared by the ranks
    return each.device, shared + ranks * (each.host + RANK_BYTES)


def check_versions() -> Finding:
    """Check Python and the libraries whose versions are pinned."""
    # Pinned exactly: results bit for bit, or the libp2p daemon, depend on the version.
    pinned = dict(
        text.split("==") for text in metadata.requires("psyche") or () if re.fullmatch(r"[\w-]+==[\w.]+", text)
    )
    found = {name: metadata.version(name) for name in pinned}
    text = f"Python {sys.version.split()[0]}, " + ", ".join(f"{name} {version}" for name, version in found.items())
    wrong = [f"{name}=={pinned[name]}" for name, version in found.items() if version.split("+")[0] != pinned[name]]
    if wrong:
        return Finding("versions", "warn", text, f"pip install -c constraints.txt {' '.join(wrong)}")
    return Finding("versions", "ok", text)


def check_disk(what: str, path: Path, needed: int, key: str) -> Finding:
    """Check for ``needed`` free bytes at ``path``, which need not exist yet; ``key`` is the setting that moves it."""
    place = path.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{size(free)} free at {place}, {size(needed)} needed for {what}"
    fix = f"free {size(needed - free)} there, or set another path with {key}"
    if free < needed:
        return Finding(f"disk: {what}", "fail", text, fix)
    if free < OVERHEAD * needed:
        return Finding(
            f"disk: {what}", "warn", text, f"little space is left: free some, or set another path with {key}"
        )
    return Finding(f"disk: {what}", "ok", text)


def check_memory(name: str, needed: int, free: int, fix: str) -> Finding:
    """Check that tensors of ``needed`` bytes fit into ``free`` bytes."""
    text = f"{size(free)} free, {size(needed)} needed for this model's tensors"
    if free < needed:
        return Finding(name, "fail", text, fix)
    if free < OVERHEAD * needed:
        return Finding(name, "warn", text, f"activations may not fit: set node.micro_batch to 1, or {fix}")
    return Finding(name, "ok", text)


def check_clock(offset: Offset | None) -> Finding:
    """Check this clock against the peers' clocks."""
    if offset is None:
        return Finding("clock", "ok", "not compared: no peer answered")
    ahead = "ahead of" if offset.seconds >= 0 else "behind"
    text = f"{abs(offset.seconds):.2f} s {ahead} {offset.peers} peers (± {offset.error:.2f})"
    if abs(offset.seconds) > CLOCK_WARN + offset.error:
        fix = (
            "synchronise this clock by NTP: timedatectl set-ntp true (peers refuse nodes that are off by more than 3 s)"
        )
        return Finding("clock", "warn", text, fix)
    return Finding("clock", "ok", text)


def check_reach(verdict: bool | None, seen: str, port: int, own: Sequence[str], relay: bool) -> Finding:
    """Check whether peers can dial this node, from their ``verdict`` or else guessed from its ``own`` addresses."""
    relayed = any("/p2p-circuit" in text for text in own)
    if verdict:
        return Finding("reachability", "ok", f"peers can dial {seen} port {port}")
    if verdict is None:
        hosts = [
            text.split("/")[2] for text in own if text.startswith(("/ip4/", "/ip6/")) and "p2p-circuit" not in text
        ]
        private = all(ip_address(host).is_private for host in hosts)
        found = "not tested by any peer; all own addresses are private" if private else "not tested by any peer"
        if not private:
            return Finding("reachability", "ok", found)
    else:
        found = f"peers cannot dial {seen} port {port}"
    way = "connections go through a slower relay" if relayed else (
        "connections will go through a slower relay" if relay else "other nodes cannot fetch from this one"
    )  # fmt: skip
    fix = (
        f"start with --port {port}, open TCP port {port} in the firewall (ufw allow {port}/tcp) and forward it to "
        f"this machine in the router; if the public address differs, set "
        f"node.announce: [/ip4/{seen or '<address>'}/tcp/{port}]"
    )
    return Finding("reachability", "warn", f"{found}: {way}", fix)


def check_speed(manifest: Manifest, tokens_per_second: float) -> Finding:
    """Check that a round's inner steps fit into deadlines.round_max."""
    run = manifest.run
    seconds = run.rounds.inner_steps * run.tokens_per_step / tokens_per_second
    text = f"{tokens_per_second:,.0f} tokens/s: {seconds:.0f} s for the {run.rounds.inner_steps} inner steps of a round"
    if seconds > run.deadlines.round_max:
        fix = "use a GPU or more --threads; otherwise rounds close without this node, or it is given fewer steps"
        return Finding("speed", "warn", f"{text}, which may take {run.deadlines.round_max:.0f} s", fix)
    return Finding("speed", "ok", text)


def check_rate(manifest: Manifest, received: int, rate: float, measurable: int) -> Finding:
    """Check that a round's payloads arrive within deadlines.exchange_max at ``rate`` bytes a second, as measured."""
    if received < measurable:
        text = f"{size(received)} fetched: too little to measure the line"
        return Finding("transfer", "ok", text)
    run = manifest.run
    payload = codec(run.codec.name).payload_bytes(manifest.resolved.flat_size)
    seconds = payload * max(1, run.rounds.start_members - 1) / rate
    text = f"{size(int(rate))}/s from peers: {seconds:.0f} s for the payloads of a round"
    if seconds > run.deadlines.exchange_max:
        fix = "use a faster line; on this one the exchange closes before this node has all payloads"
        return Finding("transfer", "warn", f"{text}, which may take {run.deadlines.exchange_max:.0f} s", fix)
    return Finding("transfer", "ok", text)

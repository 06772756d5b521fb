"""What can be wrong with a machine before it trains: each check says what it found and, where that is bad, the mend.

They judge numbers that others measured, so that every outcome can be tested.
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
from psyche.network.probes import Offset
from psyche.numerics.codecs.registry import codec
from psyche.telemetry.formatting import size
from psyche.training.choice import Choice
from psyche.training.zero.memory import ROOM, rank_bytes

Level = Literal["ok", "warn", "fail"]
CLOCK_WARN = 1.5
"""Seconds. Bootstrap nodes turn away who differs by more than 3."""
KITS = 3
"""Rounds: the one that is trained for, the one before, of which it is not known yet whether it is audited, and one that
is."""
RANK_BYTES = 500 << 20
"""A rank before it has any tensor: Python, torch, transformers and DeepSpeed."""


@dataclass(frozen=True)
class Finding:
    """``level``: ok; warn, it works but not well or not surely; fail, it cannot work. ``mend`` is empty where ok."""

    check: str
    level: Level
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Needs:
    """Bytes that a run needs of a node."""

    host: int
    """Memory of the machine."""
    device: int
    """Memory of the GPU that trains, of each where there are several; 0 where the CPU does."""
    directory: int
    """Disk for checkpoints and for payloads on their way."""


def needs_of(manifest: Manifest, node: Node, choice: Choice) -> Needs:
    """What the tensors of :class:`Replica` and the chosen engine take, and the files they become."""
    run, elements = manifest.run, manifest.resolved.flat_size
    encoder = codec(run.codec.name)
    residual = 4 * elements * encoder.error_feedback
    on_gpu = choice.device.type == "cuda"
    trains, beside = _trained(elements, choice)
    outer = 3 * 4 * elements + residual  # θ, m, the snapshot of what trained, the error feedback
    judged = 4 * elements  # parameters put aside while the held-out set is judged, or drawn at the start
    payloads = encoder.payload_bytes(elements) * (run.rounds.start_members + 1)
    checkpoint = (2 + 2) * 4 * elements + residual
    both = node.outer_state == "gpu" and on_gpu
    point, bundles = _audited(run, elements)
    return Needs(
        host=(8 * elements if both else outer)
        + (judged + beside + point + (0 if on_gpu else trains * len(choice.devices))),
        device=(trains + (outer if both else 0)) if on_gpu else 0,
        directory=checkpoint * (node.checkpoints_kept + 1) + payloads + bundles,
    )


def _audited(run: Run, elements: int) -> tuple[int, int]:
    """Bytes of memory for one trace point, and of disk for what auditors need of this node."""
    if not run.audits.rate:
        return 0, 0
    point = 3 * 4 * elements  # parameters, and two moments
    every = run.audits.trace_steps or run.rounds.inner_steps
    points = 1 + -(-run.rounds.inner_steps // every)
    return point, KITS * (points * point + 2 * 4 * elements)  # and θ, and the error feedback


def _trained(elements: int, choice: Choice) -> tuple[int, int]:
    """Bytes on each device that trains; and of the machine's memory, beside them."""
    if choice.stage is None:
        return 4 * 4 * elements, 0  # parameters, gradients, AdamW's two moments
    ranks = len(choice.devices)
    each = rank_bytes(elements, choice.stage, ranks, offload=choice.offload)
    shared = 4 * elements  # the vector through which ranks and leader see parameters
    return each.device, shared + ranks * (each.host + RANK_BYTES)


def check_versions() -> Finding:
    """Python and the libraries whose versions matter."""
    # What the project pins, it pins because bits or the daemon depend on it.
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
    """Room for ``needed`` bytes below ``path``, which need not exist yet; ``key`` is how to choose another place."""
    place = path.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    text = f"{size(free)} free at {place}, {size(needed)} needed for {what}"
    mend = f"free {size(needed - free)} there, or choose another place with {key}"
    if free < needed:
        return Finding(f"disk: {what}", "fail", text, mend)
    if free < ROOM * needed:
        return Finding(f"disk: {what}", "warn", text, f"that is tight: free some space there, or use {key}")
    return Finding(f"disk: {what}", "ok", text)


def check_memory(name: str, needed: int, free: int, mend: str) -> Finding:
    """Tensors of ``needed`` bytes in ``free`` bytes of memory."""
    text = f"{size(free)} free, {size(needed)} needed for this model's tensors"
    if free < needed:
        return Finding(name, "fail", text, mend)
    if free < ROOM * needed:
        return Finding(name, "warn", text, f"activations may not fit: set node.micro_batch to 1, or {mend}")
    return Finding(name, "ok", text)


def check_clock(offset: Offset | None) -> Finding:
    """This clock against the peers'."""
    if offset is None:
        return Finding("clock", "ok", "not compared: no peer told its time")
    ahead = "ahead of" if offset.seconds >= 0 else "behind"
    text = f"{abs(offset.seconds):.2f} s {ahead} {offset.peers} peers (± {offset.error:.2f})"
    if abs(offset.seconds) > CLOCK_WARN + offset.error:
        mend = "set this machine's clock by NTP: timedatectl set-ntp true (peers turn away who is off by more than 3 s)"
        return Finding("clock", "warn", text, mend)
    return Finding("clock", "ok", text)


def check_reach(verdict: bool | None, seen: str, port: int, own: Sequence[str], relay: bool) -> Finding:
    """Whether others can dial this node: as peers found, or as its ``own`` addresses let one guess."""
    relayed = any("/p2p-circuit" in text for text in own)
    if verdict:
        return Finding("reachability", "ok", f"peers can dial {seen} port {port}")
    if verdict is None:
        hosts = [
            text.split("/")[2] for text in own if text.startswith(("/ip4/", "/ip6/")) and "p2p-circuit" not in text
        ]
        private = all(ip_address(host).is_private for host in hosts)
        found = "no peer could try; all own addresses are private" if private else "no peer could try"
        if not private:
            return Finding("reachability", "ok", found)
    else:
        found = f"peers cannot dial {seen} port {port}"
    way = "it is reached through a relay, more slowly" if relayed else (
        "it will be reached through a relay, more slowly" if relay else "others cannot fetch from it"
    )  # fmt: skip
    mend = (
        f"start with --port {port}, let TCP port {port} in (ufw allow {port}/tcp), and in your router forward it to "
        f"this machine; where the outside address differs, set node.announce: [/ip4/{seen or '<address>'}/tcp/{port}]"
    )
    return Finding("reachability", "warn", f"{found}: {way}", mend)


def check_speed(manifest: Manifest, tokens_per_second: float) -> Finding:
    """Whether a round's inner steps fit into its longest time."""
    run = manifest.run
    seconds = run.rounds.inner_steps * run.tokens_per_step / tokens_per_second
    text = f"{tokens_per_second:,.0f} tokens/s: {seconds:.0f} s for the {run.rounds.inner_steps} steps of a round"
    if seconds > run.deadlines.round_max:
        mend = "use a GPU or more --threads; as it is, this machine's rounds close without it, or it gets fewer steps"
        return Finding("speed", "warn", f"{text}, which may take {run.deadlines.round_max:.0f}", mend)
    return Finding("speed", "ok", text)


def check_rate(manifest: Manifest, received: int, rate: float, tell_from: int) -> Finding:
    """Whether a round's payloads arrive in its exchange's longest time, at ``rate`` bytes a second as measured."""
    if received < tell_from:
        text = f"{size(received)} fetched: too little to tell how fast the line is"
        return Finding("transfer", "ok", text)
    run = manifest.run
    payload = codec(run.codec.name).payload_bytes(manifest.resolved.flat_size)
    seconds = payload * max(1, run.rounds.start_members - 1) / rate
    text = f"{size(int(rate))}/s from peers: {seconds:.0f} s for the payloads of a round"
    if seconds > run.deadlines.exchange_max:
        mend = "use a faster line; on this one the exchange ends before this node has what it needs"
        return Finding("transfer", "warn", f"{text}, which may take {run.deadlines.exchange_max:.0f}", mend)
    return Finding("transfer", "ok", text)

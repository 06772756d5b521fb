"""The cheap checks that every start of ``psyche join`` makes: nothing is said of what is well."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from psyche.config import Manifest, Node
from psyche.data.provision import Found
from psyche.errors import PsycheError
from psyche.network.address import split_address
from psyche.network.node import NetworkNode
from psyche.network.probes import clock_offset, reachable
from psyche.tools.checks import Finding, check_clock, check_disk, check_memory, check_reach, needs_of
from psyche.training.choice import Choice
from psyche.training.memory import available_memory

TRIES_SECONDS = (5.0, 15.0, 30.0)
"""Peers that join at the same moment start to answer a little later."""


def check_machine(manifest: Manifest, node: Node, choice: Choice, directory: Path, found: Found) -> list[Finding]:
    """Disk and memory against what the run needs of this node."""
    needs = needs_of(manifest, node, choice)
    kept = sum(path.stat().st_size for path in (directory / "checkpoints").glob("round-*"))
    findings = [
        check_disk("checkpoints and payloads", directory, max(0, needs.directory - kept), "--directory"),
        check_disk("the text", node.cache, found.missing, "node.cache, or allow it less with node.data_cache"),
        check_memory("memory", needs.host, available_memory(), "close other programs, or use a machine with more"),
    ]
    if needs.device:
        mend = "free the GPU (nvidia-smi shows who uses it), or set node.outer_state to cpu"
        if choice.stage is not None and not choice.offload:
            mend += ", or node.deepspeed.offload to cpu"
        if node.max_gpu_memory is not None:
            mend += ", or raise --max-gpu-memory"
        findings.append(check_memory("GPU memory", needs.device, choice.free, mend))
    elif node.max_gpu_memory is not None:
        text = f"{node.max_gpu_memory} of a GPU allowed, and this node trains on the CPU"
        findings.append(Finding("GPU memory", "warn", text, "leave --max-gpu-memory out, or choose a --device"))
    return findings


async def check_connection(network: NetworkNode, node: Node, port: int | None = None) -> tuple[list[Finding], bool]:
    """Clock and reachability as connected peers see them, and whether they could tell both.

    ``port`` is the one to be reached at; that of ``network`` by default.
    """
    peers = sorted(await network.connected())
    own = await network.addresses()
    at = port_of(own) if port is None else port
    offset, (verdict, seen) = await asyncio.gather(clock_offset(network, peers), reachable(network, peers, at))
    findings = [check_clock(offset), check_reach(verdict, seen, at, own, node.relay == "auto")]
    return findings, offset is not None and verdict is not None


async def warn_of_connection(network: NetworkNode, node: Node, warn: Callable[[str], None]) -> None:
    """Say once what is wrong with clock and reachability; joining does not wait for it."""
    findings: list[Finding] = []
    for pause in TRIES_SECONDS:
        await asyncio.sleep(pause)
        with contextlib.suppress(PsycheError, TimeoutError):  # a daemon too busy to answer is asked once more
            findings, sure = await check_connection(network, node)
            if sure:
                break
    tell(findings, warn)


def tell(findings: Sequence[Finding], warn: Callable[[str], None]) -> None:
    """Pass on what is not well. Raises :class:`PsycheError` for the first thing that cannot work."""
    for finding in findings:
        if finding.level == "fail":
            raise PsycheError(f"{finding.check}: {finding.found}; {finding.mend}")
        if finding.level == "warn":
            warn(f"{finding.check}: {finding.found}; {finding.mend}")


def port_of(addresses: Sequence[str]) -> int:
    """The TCP port of the first direct address; 0 where there is none."""
    for text in addresses:
        parts = split_address(text)[0].split("/")
        if "p2p-circuit" not in parts and parts[3] == "tcp":
            return int(parts[4])
    return 0

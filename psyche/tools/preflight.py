"""Quick checks at every start of ``psyche join``; only problems are reported."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from psyche.config import Manifest, Node
from psyche.data.provision import FoundStore
from psyche.errors import PsycheError
from psyche.network.address import split_address
from psyche.network.connection_probes import clock_offset, reachable
from psyche.network.transport import Network
from psyche.tools.checks import Finding, check_clock, check_disk, check_memory, check_reach, requirements
from psyche.training.engine_choice import EngineChoice
from psyche.training.memory import available_memory

TRIES_SECONDS = (5.0, 15.0, 30.0)
"""Pauses before each attempt: peers that join at the same time take some seconds to answer."""


def check_machine(
    manifest: Manifest, node: Node, choice: EngineChoice, directory: Path, found: FoundStore
) -> list[Finding]:
    """Check disk and memory against what the run needs on this node."""
    needs = requirements(manifest, node, choice)
    kept = sum(path.stat().st_size for path in (directory / "checkpoints").glob("round-*"))
    findings = [
        check_disk("checkpoints and payloads", directory, max(0, needs.directory - kept), "--directory"),
        check_disk("training data", node.cache, found.missing, "node.cache, or limit it with node.data_cache"),
        check_memory(
            "memory", needs.host, available_memory(), "close other programs, or use a machine with more memory"
        ),
    ]
    if needs.device:
        fix = "free GPU memory (nvidia-smi lists the processes), or set node.outer_state to cpu"
        if choice.stage is not None and not choice.offload:
            fix += ", or node.deepspeed.offload to cpu"
        if node.max_gpu_memory is not None:
            fix += ", or raise --max-gpu-memory"
        findings.append(check_memory("GPU memory", needs.device, choice.free, fix))
    elif node.max_gpu_memory is not None:
        text = f"--max-gpu-memory is {node.max_gpu_memory}, but this node trains on the CPU"
        findings.append(Finding("GPU memory", "warn", text, "drop --max-gpu-memory, or choose a GPU with --device"))
    return findings


async def check_connection(network: Network, node: Node, port: int | None = None) -> tuple[list[Finding], bool]:
    """Check clock and reachability with the connected peers; also return whether they answered both questions.

    ``port`` is the port to test; by default the one that ``network`` listens on.
    """
    peers = sorted(await network.connected())
    own = await network.addresses()
    tested = port_of(own) if port is None else port
    offset, (verdict, seen) = await asyncio.gather(clock_offset(network, peers), reachable(network, peers, tested))
    findings = [check_clock(offset), check_reach(verdict, seen, tested, own, node.relay == "auto")]
    return findings, offset is not None and verdict is not None


async def warn_of_connection(network: Network, node: Node, warn: Callable[[str], None]) -> None:
    """Warn once of problems with clock and reachability, without delaying the join."""
    findings: list[Finding] = []
    for pause in TRIES_SECONDS:
        await asyncio.sleep(pause)
        with contextlib.suppress(PsycheError, TimeoutError):  # a busy daemon is asked again
            findings, complete = await check_connection(network, node)
            if complete:
                break
    report_findings(findings, warn)


def report_findings(findings: Sequence[Finding], warn: Callable[[str], None]) -> None:
    """``warn`` of each warning. Raises :class:`PsycheError` for the first failure."""
    for finding in findings:
        if finding.level == "fail":
            raise PsycheError(f"{finding.check}: {finding.found}; {finding.fix}")
        if finding.level == "warn":
            warn(f"{finding.check}: {finding.found}; {finding.fix}")


def port_of(addresses: Sequence[str]) -> int:
    """Return the TCP port of the first direct address, or 0."""
    for text in addresses:
        parts = split_address(text)[0].split("/")
        if "p2p-circuit" not in parts and parts[3] == "tcp":
            return int(parts[4])
    return 0

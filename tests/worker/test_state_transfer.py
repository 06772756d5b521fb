"""State transfer: from all donors in parallel, and chunks stay useful while the run continues."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest
import torch

from psyche.network.bandwidth import Limiter
from psyche.network.download import chunk_order
from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.network.transport import FetchError
from psyche.numerics.digest import CHUNK, BlobIndex, chunked
from psyche.numerics.outer import OuterSettings, OuterState, outer_step
from psyche.worker.state_transfer import PartialState, paired_chunks, serve_state
from tests.network.swarm import spawn_child, until, with_swarm

SIZE = 5 * CHUNK // 4 + 3 * 4096
"""Parameters: θ and m are a little more than five chunks each, so that m begins within a chunk."""


def state(seed: int) -> OuterState:
    return OuterState(torch.randn(2, SIZE, generator=torch.Generator().manual_seed(seed)))


def step(outer: OuterState) -> None:
    """Apply the outer step of a round."""
    gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(7))
    outer_step(outer.theta, outer.momentum, gradient, OuterSettings(0.7, 0.9))


def serve(node: NetworkNode, outer: OuterState, asked: list[int], given: int | None = None) -> BlobIndex:
    """Serve a state that becomes unavailable after ``given`` chunks; ``asked`` records each chunk."""
    index, pieces = outer.index(), list(chunked(outer.clone().buffer))

    def read(number: int) -> memoryview:
        if given is not None and len(asked) >= given:
            raise LookupError
        asked.append(number)
        return pieces[number]

    node.blobs.add(index, read)
    return index


@pytest.mark.parametrize("size", [4096, CHUNK // 4, SIZE, 2 * SIZE])
def test_chunks_of_theta_and_momentum_for_the_same_parameters_are_fetched_together(size: int) -> None:
    order = paired_chunks(size)
    chunks = OuterState(torch.zeros(2, size)).index().chunks
    assert sorted(order) == list(range(chunks)), "each chunk once"
    for number, chunk in enumerate(order):
        partner = (chunk * CHUNK + 4 * size) // CHUNK
        if chunk * CHUNK < 4 * size - CHUNK:
            assert abs(order.index(partner) - number) <= 3


def test_every_donor_sends_a_part(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        *donors, joining = nodes
        outer = state(1)
        index = outer.index()
        for donor in donors:
            serve_state(donor, outer, index, b"")
        arriving = PartialState(SIZE)
        found = await arriving.fetch(joining, index.root, [donor.peer_id for donor in donors])
        assert torch.equal(found.tensor, outer.tensor)
        assert set(arriving.gave) == {donor.peer_id for donor in donors}
        assert arriving.received == index.size

    with_swarm(tmp_path, 4, scenario)


def test_received_chunks_are_advanced_and_only_the_rest_is_fetched(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        donor, joining = nodes
        outer, before, after = state(1), [], []  # type: ignore[var-annotated]
        index = serve(donor, outer, before, given=8)
        arriving = PartialState(SIZE)
        with pytest.raises(FetchError):
            await arriving.fetch(joining, index.root, [donor.peer_id])
        assert arriving.received > 7 * CHUNK / 2
        donor.blobs.remove(index.root)
        step(outer)
        step(arriving.outer)
        index = serve(donor, outer, after)
        found = await arriving.fetch(joining, index.root, [donor.peer_id])
        assert torch.equal(found.tensor, outer.tensor)
        assert len(before) == 8
        assert len(after) <= index.chunks - 4, "received chunks were fetched again"
        assert arriving.received == sum(index.sizes[number] for number in [*before, *after])

    with_swarm(tmp_path, 2, scenario)


def test_a_failed_transfer_resumes_with_the_same_state(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        donor, joining = nodes
        outer, before, after = state(1), [], []  # type: ignore[var-annotated]
        index = serve(donor, outer, before, given=8)
        arriving = PartialState(SIZE)
        with pytest.raises(FetchError):
            await arriving.fetch(joining, index.root, [donor.peer_id])
        serve(donor, outer, after)
        assert torch.equal((await arriving.fetch(joining, index.root, [donor.peer_id])).tensor, outer.tensor)
        assert sorted(before + after) == list(range(index.chunks))

    with_swarm(tmp_path, 2, scenario)


def test_when_a_donor_dies_the_others_send_the_rest(tmp_path: Path) -> None:
    async def scenario(nodes: list[NetworkNode]) -> None:
        donor, joining = nodes
        dying = Identity.load_or_create(tmp_path / "child.key").peer_id
        outer, asked = state(1), []  # type: ignore[var-annotated]
        index = serve(donor, outer, asked)
        hangs_at = list(chunk_order(paired_chunks(SIZE), joining.peer_id, index.root))[-1]
        child, daemon, addresses = await asyncio.to_thread(spawn_child, tmp_path, bytes(outer.buffer), hangs_at)
        try:
            assert await joining.connect(addresses) == {}
            joining.blobs.download_limit = Limiter(4 * CHUNK)  # slow enough to kill a donor meanwhile
            arriving = PartialState(SIZE)
            fetching = asyncio.create_task(arriving.fetch(joining, index.root, [donor.peer_id, dying]))
            peers = joining.traffic.peers
            await until(lambda: dying in peers and peers[dying].bytes_down > CHUNK + len(index.encode()))
            for pid in (daemon, child.pid):
                os.kill(pid, signal.SIGKILL)
            assert torch.equal((await fetching).tensor, outer.tensor)
            assert arriving.gave[dying] >= CHUNK
            assert arriving.gave[dying] + arriving.gave[donor.peer_id] == index.size, "a chunk was fetched twice"
        finally:
            child.kill()
            child.wait()
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon, signal.SIGKILL)

    with_swarm(tmp_path, 2, scenario)

"""Nodes with different backends in one run have bit-equal states after every round."""

from __future__ import annotations

from pathlib import Path

import pytest

from psyche.config import load_config
from psyche.diloco.launch import launch
from psyche.diloco.reference import simulate_rounds
from psyche.network.identity import Identity
from psyche.numerics.backends.cuda import CudaBackend
from psyche.numerics.backends.emulated import EmulatedLauncher
from psyche.numerics.backends.selection import available_backends
from tests.tiny import replica, write_config


@pytest.mark.parametrize("codec", ["int8", "int2", "topk2e"])
def test_backends_agree_in_one_run(tmp_path: Path, codec: str, emulator_library: Path) -> None:
    backends = [*available_backends(), CudaBackend(EmulatedLauncher(emulator_library), host=available_backends()[0])]
    config = load_config(write_config(tmp_path, members=len(backends), codec={"name": codec}))
    identities = [Identity.load_or_create(tmp_path / f"{backend.name}.key") for backend in backends]
    manifest = launch(config, identities[0].peer_id).manifest
    replicas = {
        identity.peer_id: replica(manifest, config.node, identity, backend)
        for identity, backend in zip(identities, backends, strict=True)
    }
    roots = []
    for _ in simulate_rounds(manifest, replicas):
        held = {one.chain.state_root for one in replicas.values()}
        assert len(held) == 1
        roots += held
    assert len(set(roots)) == config.run.rounds.total

"""A codec written in PyTorch alone works in every backend: one class, one registry entry, no kernels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.config import load_config
from psyche.diloco.launch import launch
from psyche.diloco.reference import simulate_rounds
from psyche.network.identity import Identity
from psyche.numerics.backends.base import Backend, TorchBackend
from psyche.numerics.backends.cuda import CudaBackend
from psyche.numerics.backends.emulated import EmulatedLauncher
from psyche.numerics.backends.selection import available_backends
from psyche.numerics.codecs.base import MalformedPayload, TorchCodec
from psyche.numerics.codecs.registry import CODECS, CodecEntry
from psyche.numerics.digest import digest
from psyche.numerics.flat import ALIGNMENT
from tests.numerics.samples import CHUNK, bits
from tests.tiny import replica, write_config


class Sign(TorchCodec):
    """The sign of every value and one fp32 magnitude per 4096: half of their largest."""

    name = "sign"
    chunk_bytes = ALIGNMENT // 8 + 4

    def _quantize(self, values: Tensor) -> bytes:
        rows = values.view(-1, ALIGNMENT)
        signs = np.packbits((rows < 0).numpy(), axis=1, bitorder="little")
        scales = rows.abs().amax(dim=1, keepdim=True).mul(0.5).numpy().astype("<f4").view(np.uint8)
        return np.concatenate([signs, scales], axis=1).tobytes()

    def _dequantize(self, body: memoryview, count: int) -> Tensor:
        rows = np.frombuffer(body, np.uint8).reshape(-1, self.chunk_bytes)
        negative = torch.from_numpy(np.unpackbits(rows[:, :-4], axis=1, bitorder="little").astype(bool))
        scales = torch.from_numpy(self._scales(body).copy()).unsqueeze(1)
        return torch.where(negative, -scales, scales).view(-1)

    def _check_body(self, body: memoryview, count: int) -> None:
        if not np.isfinite(self._scales(body)).all():
            raise MalformedPayload("a scale is NaN or infinite")

    def _scales(self, body: memoryview) -> np.ndarray:
        rows = np.frombuffer(body, np.uint8).reshape(-1, self.chunk_bytes)
        return np.ascontiguousarray(rows[:, -4:]).view("<f4")[:, 0]

    def squared_norm(self, payload: Buffer, count: int) -> float:
        squares = np.square(self._scales(self.check(payload, count)).astype(np.float64)) * ALIGNMENT
        return float(np.add.accumulate(squares)[-1]) if count else 0.0


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CODECS, "sign", CodecEntry("sign", Sign, result_codec="int8"))


@pytest.fixture
def backends(emulator_library: Path) -> list[Backend]:
    cuda = EmulatedLauncher(emulator_library)
    return [*available_backends(), CudaBackend(cuda), CudaBackend(cuda, host=available_backends()[0])]


def test_every_backend_computes_it_with_the_same_bits(backends: list[Backend]) -> None:
    generator = torch.Generator().manual_seed(3)
    base, local, residual = (torch.randn(3 * CHUNK, generator=generator) for _ in range(3))
    definition = TorchBackend().codec("sign")
    expected = residual.clone()
    payload = definition.encode(base, local, expected, 0.9)
    total = base.clone()
    definition.decode_add(payload, 0.25, total)
    for backend in backends:
        used, kept, out = backend.codec("sign"), residual.clone(), base.clone()
        assert used.encode(base, local, kept, 0.9) == payload
        used.decode_add(payload, 0.25, out)
        assert (bits(kept) == bits(expected)).all()
        assert (bits(out) == bits(total)).all()
        assert used.squared_norm(payload, 3 * CHUNK) == definition.squared_norm(payload, 3 * CHUNK)
        assert used.payload_bytes(3 * CHUNK) == used.expected_bytes(3 * CHUNK) == len(payload)
        damaged = payload[:-4] + np.float32(np.nan).tobytes()
        with pytest.raises(MalformedPayload, match="NaN"):
            used.check(damaged, 3 * CHUNK)


@pytest.mark.parametrize(
    "exchange", [{"kind": "gather"}, {"kind": "sharded", "reducers": 2}], ids=lambda one: one["kind"]
)
def test_nodes_with_different_backends_run_it_to_the_same_state(
    exchange: dict[str, object], backends: list[Backend], tmp_path: Path
) -> None:
    rounds = {"total": 3, "inner_steps": 2, "start_members": len(backends)}
    path = write_config(tmp_path, members=len(backends), rounds=rounds, codec={"name": "sign"}, exchange=exchange)
    config = load_config(path)
    identities = [
        Identity(digest("toy", bytes([number])), tmp_path / f"{number}.key") for number in range(len(backends))
    ]
    manifest = launch(config, identities[0].peer_id).manifest

    def roots(used: Sequence[Backend]) -> list[str]:
        replicas = {
            one.peer_id: replica(manifest, config.node, one, backend)
            for one, backend in zip(identities, used, strict=True)
        }
        found = []
        for _ in simulate_rounds(manifest, replicas):
            (root,) = {one.chain.state_root for one in replicas.values()}
            found.append(root.hex())
        return found

    mixed = roots(backends)
    assert len(mixed) == 3
    assert mixed == roots([TorchBackend()] * len(backends))

"""``psyche.simulate`` runs the algorithm of distributed runs on any module and batches."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from psyche import simulate
from psyche.config import load_config
from psyche.diloco.launch import launch
from psyche.diloco.reference import simulate_rounds
from psyche.errors import PsycheError
from psyche.network.identity import Identity
from psyche.numerics.codecs.registry import codec
from psyche.numerics.flat import FlatLayout
from psyche.training.engine import Batch
from psyche.training.models import build
from tests.tiny import replica, write_config

PLAIN = {"lr": 0.01, "weight_decay": 0.0, "clip": None}


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))


def regression(count: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(8, 1, generator=generator)
    inputs = [torch.randn(16, 8, generator=generator) for _ in range(count)]
    return [(one, one @ weights) for one in inputs]


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


@pytest.mark.parametrize("name", ["int4", "topk2"])
def test_the_simulation_equals_the_reference_bit_for_bit(tmp_path: Path, name: str) -> None:
    config = load_config(write_config(tmp_path, members=2, codec={"name": name}))
    identities = [Identity.load_or_create(tmp_path / f"{number}.key") for number in range(2)]
    manifest, run = launch(config, identities[0].peer_id).manifest, config.run
    replicas = {one.peer_id: replica(manifest, config.node, one) for one in identities}
    seen: dict[str, list[Batch]] = defaultdict(list)
    for node, one in replicas.items():

        def step(batch: Batch, lr: float, node: str = node, real=one.engine.step) -> float:  # type: ignore[no-untyped-def]
            seen[node].append(batch.copy())
            return float(real(batch, lr))

        one.engine.step = step  # type: ignore[method-assign]
    played = [
        (record.plan.round, updates, replicas[min(replicas)].chain.state_root.hex())
        for record, updates in simulate_rounds(manifest, replicas)
    ]

    model = build(run.model, seed=run.seed)
    result = simulate(
        model,
        [iter(seen[node]) for node in sorted(replicas)],
        nodes=2,
        inner_steps=run.rounds.inner_steps,
        rounds=run.rounds.total,
        codec=name,
        inner=run.inner.model_dump(),
        outer=run.outer.model_dump(),
        aggregation=run.aggregation.kind,
    )
    assert [one.state_root for one in result.rounds] == [root for _, _, root in played]
    for one, (_, updates, _) in zip(result.rounds, played, strict=True):
        assert one.train_loss == pytest.approx(sum(update.loss for update in updates.values()) / 2)
        assert one.payload_bytes == sum(update.contribution.payload_bytes for update in updates.values()) / 2
    theta = replicas[min(replicas)].outer.theta
    for name_, parameter in model.named_parameters():
        assert torch.equal(parameter, replicas[min(replicas)].engine.layout.views(theta)[name_])


def test_the_loss_of_a_plain_module_falls() -> None:
    result = simulate(
        mlp(),
        iter(regression(4 * 10 * 8)),
        loss=squared_error,
        nodes=4,
        inner_steps=10,
        rounds=8,
        inner={"lr": 0.01},
        heldout=regression(4, seed=1),
    )
    losses = [one.train_loss for one in result.rounds]
    assert losses[-1] < losses[0] / 4
    heldout = [one.heldout_loss for one in result.rounds]
    assert heldout[0] is not None
    assert heldout[-1] is not None
    assert heldout[-1] < heldout[0] / 4


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_bytes_are_those_of_the_codec(name: str) -> None:
    model = mlp()
    result = simulate(
        model, iter(regression(2 * 3 * 2)), loss=squared_error, nodes=2, inner_steps=3, rounds=2, codec=name
    )
    layout = FlatLayout.of_model(model)
    expected = sum(codec(name).payload_bytes(part.stop - part.start) for part in layout.slices())
    assert [one.payload_bytes for one in result.rounds] == [expected, expected]
    assert result.bytes_per_node == 2 * expected
    assert result.ddp_bytes_per_node == 4 * layout.parameters * 6
    assert result.compression == result.ddp_bytes_per_node / result.bytes_per_node


def test_one_node_without_compression_and_momentum_is_plain_local_training() -> None:
    batches, plain = regression(12), mlp()
    trained = deepcopy(plain)
    simulate(
        trained,
        iter(batches),
        loss=squared_error,
        nodes=1,
        inner_steps=4,
        rounds=3,
        codec="fp32",
        inner=PLAIN,
        outer={"lr": 1.0, "momentum": 0.0},
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.0)
    for batch in batches:
        optimizer.zero_grad()
        squared_error(plain, batch).backward()
        optimizer.step()
    for expected, found in zip(plain.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_an_iterable_restarts_and_an_exhausted_iterator_is_an_error() -> None:
    class Loader:
        def __iter__(self):  # type: ignore[no-untyped-def]
            return iter(regression(3))

    result = simulate(mlp(), Loader(), loss=squared_error, nodes=2, inner_steps=4, rounds=2)
    assert len(result.rounds) == 2
    with pytest.raises(PsycheError, match="no more batches in round 2"):
        simulate(mlp(), iter(regression(9)), loss=squared_error, nodes=2, inner_steps=4, rounds=2)
    with pytest.raises(ValueError, match="3 sources of batches for 2 nodes"):
        simulate(mlp(), [iter(regression(3))] * 3, loss=squared_error, nodes=2, inner_steps=1, rounds=1)


def test_a_module_without_a_loss_is_an_error() -> None:
    with pytest.raises(PsycheError, match="pass loss="):
        simulate(mlp(), iter(regression(1)), nodes=1, inner_steps=1, rounds=1)


def test_keyword_batches_and_fragments_work_with_a_causal_language_model(tmp_path: Path) -> None:
    run = load_config(write_config(tmp_path, members=2)).run
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 512, (8, 2, 32)))
    result = simulate(
        build(run.model, seed=1),
        [[{"input_ids": one, "labels": one} for one in tokens[:4]], list(tokens[4:])],
        nodes=2,
        inner_steps=2,
        rounds=2,
        fragments=2,
        codec="int8",
    )
    assert all(np.isfinite(one.train_loss) for one in result.rounds)


def test_importing_psyche_does_not_import_torch() -> None:
    code = "import sys, psyche; assert 'torch' not in sys.modules; psyche.simulate; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

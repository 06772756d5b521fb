"""With nobody else and nothing lost, DiLoCo is AdamW: H = 1, fp32, outer SGD of rate 1 without momentum.

The outer step computes θ − fl(θ − θ_local). Where that subtraction is exact (Sterbenz: θ_local within a factor of 2
of θ) the result is θ_local to the bit. Where it is not, no fp32 Δ at all would give θ_local back (see
``test_no_other_delta_would_do_better``), so bits are compared on a model whose parameters stay away from zero, and
bounds on one as it is initialised.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from psyche.config import CodecSpec, Data, Inner, Manifest, Node, Outer, Resolved, Rounds, Run
from psyche.diloco.reference import simulate_rounds
from psyche.diloco.replica import Replica
from psyche.numerics.flat import FlatLayout
from psyche.numerics.outer import OuterState
from psyche.protocol.assignment import sequences
from psyche.training.schedules import learning_rate
from psyche.training.torch_engine import TorchEngine
from tests.protocol.one_leader import peer_id
from tests.training.tiny_models import LENGTH, SPEC, MemoryStore, away_from_zero, tiny

torch.set_num_threads(1)
NODE_ID = peer_id(1)
STEPS = 24
BATCH = 4


def manifest(model: nn.Module, *, rounds: int, clip: float | None = 1.0) -> Manifest:
    layout = FlatLayout.of_model(model)
    run = Run(
        name="plain",
        seed=5,
        model=SPEC,
        data=Data(tokenizer={"kind": "bpe", "vocab_size": 260}, sequence_length=LENGTH),
        codec=CodecSpec(name="fp32"),
        inner=Inner(lr=1e-3, batch_size=BATCH, warmup_steps=4, clip=clip),
        outer=Outer(lr=1.0, momentum=0.0),
        rounds=Rounds(total=rounds, inner_steps=1),
    )
    flat = torch.zeros(layout.size)
    layout.gather({name: p.detach() for name, p in model.named_parameters()}, flat)
    return Manifest(
        run=run,
        resolved=Resolved(
            coordinators=(peer_id(0),),
            store="0" * 64,
            layout=layout.digest.hex(),
            genesis=OuterState.initial(flat).index().root.hex(),
            parameters=layout.parameters,
            flat_size=layout.size,
        ),
    )


def diloco(model: nn.Module, given: Manifest, store: MemoryStore) -> list[torch.Tensor]:
    """θ after each round of the single-process reference."""
    engine = TorchEngine(model, given.run.inner, Node(device="cpu"))
    theta = torch.zeros(engine.layout.size)
    engine.read(theta)
    replica = Replica(given, engine, store, OuterState.initial(theta), NODE_ID, b"secret")
    return [replica.outer.theta.clone() for _ in simulate_rounds(given, {NODE_ID: replica})]


def plain(model: nn.Module, given: Manifest, store: MemoryStore) -> list[torch.Tensor]:
    """A PyTorch training loop as anyone would write it, on the same data in the same order."""
    inner = given.run.inner
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": inner.weight_decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=inner.lr,
        betas=inner.betas,
        eps=inner.eps,
        fused=True,
    )
    layout = FlatLayout.of_model(model)
    after = []
    for step in range(given.run.total_steps):
        indices = sequences(range(step * BATCH, (step + 1) * BATCH), store.train.layout, given.run.seed)
        tokens = torch.from_numpy(store.train.batch(indices))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(inner, step, given.run.total_steps)
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if inner.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), inner.clip)
        optimizer.step()
        flat = torch.zeros(layout.size)
        layout.gather({name: p.detach() for name, p in model.named_parameters()}, flat)
        after.append(flat)
    return after


@pytest.mark.parametrize("clip", [1.0, None])
def test_away_from_zero_it_is_adamw_to_the_bit(clip: float | None) -> None:
    store = MemoryStore()
    given = manifest(away_from_zero(tiny(), 0.05), rounds=STEPS, clip=clip)
    ours = diloco(away_from_zero(tiny(), 0.05), given, store)
    theirs = plain(away_from_zero(tiny(), 0.05), given, store)
    assert len(ours) == len(theirs) == STEPS
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    assert not torch.equal(ours[0], ours[-1])


def test_as_initialised_only_inexact_subtractions_differ() -> None:
    store = MemoryStore()
    given = manifest(tiny(), rounds=1)
    start = torch.zeros(FlatLayout.of_model(tiny()).size)
    FlatLayout.of_model(tiny()).gather({name: p.detach() for name, p in tiny().named_parameters()}, start)
    (ours,), (theirs,) = diloco(tiny(), given, store), plain(tiny(), given, store)
    base, local = start.double(), theirs.double()
    delta = (start - theirs).double()
    inexact = delta != base - local  # fp64 holds the difference of these fp32 values exactly
    differs = ours != theirs
    assert not (differs & ~inexact).any()
    # What Δ lost, half a unit of its last place, and one rounding of θ − Δ to the grid of the result.
    ulps = [torch.from_numpy(np.spacing(np.abs(one.numpy()))).double() for one in (start - theirs, ours)]
    assert ((ours.double() - local).abs()[differs] <= (ulps[0] + ulps[1])[differs] / 2).all()
    assert ((ours.double() - local).abs()[differs] <= 2.0**-23 * (start - theirs).abs().double()[differs]).all()
    share = float(differs.sum()) / given.resolved.parameters
    assert share < 0.02
    print(f"{int(differs.sum())} of {given.resolved.parameters} parameters ({share:.2%}) differ after one step")


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False, min_value=-8, max_value=8)


@settings(max_examples=300, deadline=None)
@given(base=FLOATS, local=FLOATS, off=st.integers(-3, 3))
def test_no_other_delta_would_do_better(base: float, local: float, off: int) -> None:
    """fl(θ − fl(θ − θ_local)) is θ_local wherever any fp32 Δ at all gives θ_local back."""
    t, w = np.float32(base), np.float32(local)
    delta = t - w
    if t - delta == w:
        return
    other = delta
    for _ in range(abs(off)):
        other = np.nextafter(other, np.float32(np.inf if off > 0 else -np.inf))
    assert t - other != w
    assert Fraction(float(delta)) != Fraction(base) - Fraction(local), "an exact Δ gives it back"

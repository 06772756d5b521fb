"""Audits: honest work passes, every fraud is detected, and the auditor's own training is unaffected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from psyche.audit.audit_case import can_audit
from psyche.audit.replay_error import MAX_NOISE, NEGLIGIBLE_ERROR, TYPICAL_NOISE, tolerant_error
from psyche.diloco.audit_bundle import AuditBundle, BlobUnavailable
from psyche.numerics.digest import blob_root
from psyche.protocol.audit_messages import MOST
from psyche.protocol.messages import WITHHELD
from tests.audit.audited import (
    STEPS,
    AuditedRun,
    Make,
    at_the_end,
    matched_noise,
    train_lazily,
    train_tampered,
    trained,
)

PASS, FAIL = 20_000, 40_000
"""The default thresholds of ``run.audits``, in millionths."""


@pytest.fixture
def run(make: Make) -> AuditedRun:
    return make()


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk2e"])
@pytest.mark.parametrize("every", [None, 7])
def test_honest_work_on_the_same_hardware_has_no_error(make: Make, codec: str, every: int | None) -> None:
    run = make(codec={"name": codec}, audits={"trace_steps": every})
    bundles = run.audited.trace_recorder.bundles
    assert bundles is not None
    before: frozenset[bytes] = frozenset()
    for _ in range(2):
        plan = run.plan()
        works = {one.node: one.train(plan) for one in (run.audited, run.peer)}
        work = works[run.audited.node]
        bundle = bundles.bundle(plan.round)
        assert bundle is not None
        assert [point.step for point in bundle.points] == ([0, 7, 14, 21, 28, 30] if every else [0, 30])
        assert bundle.trace_root == work.contribution.trace_root
        found = run.audit_work(plan, work, allowed_residuals=before)
        assert (found.outcome, found.error) == ("measured", 0)
        assert found.gain > 0 or plan.round > 1, "the first round learns something"
        if codec == "fp32":
            assert work.contribution.residual_in == work.contribution.residual_out == WITHHELD
        else:
            before |= {work.contribution.residual_out}
        run.advance(plan, works)
    assert can_audit(run.auditor, plan.round)


def test_muon_is_audited_like_adamw(make: Make) -> None:
    inner = {"optimizer": "muon", "lr": 0.003, "batch_size": 2, "warmup_steps": 2}
    run = make(inner=inner, audits={"trace_steps": 10})
    for _ in range(2):
        plan = run.plan()
        work = run.audited.train(plan)
        assert run.audit_work(plan, work).error == 0
        run.advance(plan, {run.audited.node: work})
    work = train_lazily(run.audited, plan := run.plan(), STEPS // 2)
    assert run.audit_work(plan, work).error > FAIL


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("zero", 0.99, 1.01), ("random", 1.3, 1.6), ("sign", 1.9, 2.1), ("scaled", 0.49, 0.51), ("exploded", 1000, 1000)],
)
def test_fabricated_updates_are_detected(run: AuditedRun, name: str, least: float, most: float) -> None:
    changes = {
        "zero": lambda one, moved: torch.zeros_like(moved),
        "random": matched_noise,
        "sign": lambda one, moved: -moved,
        "scaled": lambda one, moved: 1.5 * moved,
        "exploded": lambda one, moved: 1e30 * moved,
    }
    found = run.audit_work(plan := run.plan(), train_tampered(run.audited, plan, at_the_end(changes[name])))
    assert found.outcome == "measured"
    assert least <= found.error / 1e6 <= most


@pytest.mark.parametrize("steps", [29, 27, STEPS // 2])
def test_skipped_steps_are_detected(run: AuditedRun, steps: int) -> None:
    plan = run.plan()
    run.advance(plan, {run.peer.node: run.peer.train(plan)})  # the first steps of a run move unusually far
    found = run.audit_work(plan := run.plan(), train_lazily(run.audited, plan, steps))
    assert found.outcome == "measured"
    assert found.error > (FAIL if steps <= STEPS // 2 else PASS // 4), (
        "how much a few skipped steps show depends on the machine's noise"
    )


def test_honest_work_in_the_other_precision_passes(run: AuditedRun) -> None:
    for _ in range(2):
        plan = run.plan()
        with run.audited.engine.other_precision():  # type: ignore[attr-defined]
            work = run.audited.train(plan)
        found = run.audit_work(plan, work)
        assert found.outcome == "measured"
        assert found.error <= 1e6 * NEGLIGIBLE_ERROR
        run.advance(plan, {run.audited.node: work, run.peer.node: run.peer.train(plan)})


@given(noise=st.floats(1e-3, 1.0), lie=st.floats(0.0, 2.0), seed=st.integers(0, 9))
def test_an_error_is_relative_to_the_distance_between_two_precisions(noise: float, lie: float, seed: int) -> None:
    """Work within that distance of a replay passes.

    A lie is understated only where the two precisions differ.
    """
    make = torch.Generator().manual_seed(seed)
    moved, apart, off = (torch.nn.functional.normalize(torch.randn(4096, generator=make), dim=0) for _ in range(3))
    before, found, other = torch.zeros(4096), moved, moved + noise * apart
    for near in (found, other):
        assert tolerant_error(before, near, found, other, before) == 0
        if noise <= MAX_NOISE:
            assert tolerant_error(before, near + 0.9 * noise * off, found, other, before) <= TYPICAL_NOISE
    error = tolerant_error(before, found + lie * off, found, other, before)
    assert error <= lie + 1e-5
    assert error >= min(lie, abs(lie - noise)) * TYPICAL_NOISE / MAX_NOISE - 1e-5, "at any noise"
    if noise <= TYPICAL_NOISE:
        assert error >= min(lie, abs(lie - noise)) - 1e-5


def test_the_segment_with_skipped_steps_is_named(make: Make) -> None:
    run = make(audits={"trace_steps": 10})
    plan, step, taken = run.plan(), run.audited.engine.step, [0]

    def lazy(batch: object, lr: float) -> float:
        taken[0] += 1
        return 1.0 if taken[0] in (15, 16) else step(batch, lr)  # type: ignore[arg-type]

    run.audited.engine.step = lazy  # type: ignore[method-assign,assignment]
    found = run.audit_work(plan, run.audited.train(plan))
    assert found.error > FAIL
    assert found.segment == 1


def test_training_on_other_data_is_detected_from_the_update(run: AuditedRun) -> None:
    step, split, drawn = run.audited.engine.step, run.audited.store.train, np.random.default_rng(5)
    run.audited.engine.step = lambda batch, lr: step(  # type: ignore[method-assign]
        split.batch(drawn.integers(0, len(split), len(batch))), lr
    )
    found = run.audit_work(plan := run.plan(), run.audited.train(plan))
    assert found.outcome == "measured"
    assert found.error > 10 * FAIL


def test_training_on_other_data_is_detected_from_the_data_digest(run: AuditedRun) -> None:
    run.audited._assignment = run.peer._assignment
    plan = run.plan()
    assert run.audit_work(plan, run.audited.train(plan)).outcome == "false"


def test_a_stale_base_is_detected(run: AuditedRun) -> None:
    plan = run.plan()
    run.advance(plan, {run.peer.node: run.peer.train(plan)})
    plan = run.plan()
    run.audited.adopt(run.peer.outer.clone(), None)
    run.audited.outer.theta.add_(1e-4)
    work = run.audited.train(plan)
    assert work.contribution.base_root == plan.base_root, "it claims the current base"
    assert run.audit_work(plan, work).outcome == "false"


def test_a_copy_of_a_peers_update_is_detected(run: AuditedRun) -> None:
    plan = run.plan()
    run.peer.train(plan)
    copied = trained(run.peer)
    work = train_tampered(run.audited, plan, at_the_end(lambda one, moved: copied - one.outer.theta))
    found = run.audit_work(plan, work)
    assert found.outcome == "measured"
    assert found.error > 10 * FAIL


def test_a_copied_payload_does_not_match_the_commitments(run: AuditedRun) -> None:
    plan = run.plan()
    other, work = run.peer.train(plan), run.audited.train(plan)
    copied = replace(work.contribution, payload_root=other.contribution.payload_root)
    bundle = run.audited.trace_recorder.bundles.bundle(1)  # type: ignore[union-attr]
    assert bundle is not None
    found = run.audit_bundle(plan, type(work)(**{**vars(work), "contribution": copied}), bundle)
    assert found.outcome == "false"


def test_garbage_in_the_error_feedback_is_detected(run: AuditedRun) -> None:
    plan = run.plan()
    assert run.audited.residual is not None
    run.audited.residual.copy_(1e-3 * torch.randn(run.audited.residual.shape))
    work = run.audited.train(plan)
    assert run.audit_work(plan, work, allowed_residuals=frozenset()).outcome == "false", (
        "no residual was committed before"
    )
    assert (
        run.audit_work(plan, work, allowed_residuals=frozenset({work.contribution.residual_in})).outcome == "measured"
    )
    bundles, zeros = run.audited.trace_recorder.bundles, torch.zeros_like(run.audited.residual)
    assert bundles is not None
    bundles.store(1, zeros.numpy().data)
    for field in ("residual_in", "residual_out"):
        lying = replace(work.contribution, **{field: blob_root(zeros.numpy().data)})
        bundle = bundles.bundle(1)
        assert bundle is not None
        found = run.audit_bundle(plan, type(work)(**{**vars(work), "contribution": lying}), bundle)
        assert found.outcome == "false", field


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_a_fabricated_optimizer_that_outweighs_the_gradients_is_detected(run: AuditedRun, size: float) -> None:
    """Its moments dominate every gradient, so that a naive replay would agree with an update that cost nothing."""
    plan = run.plan()
    engine = run.audited.engine
    engine.step(run.audited.store.train.batch(range(2)), 1e-3)
    state = {name: value.clone() for name, value in engine.state().items()}
    for name, value in state.items():
        if name.startswith("exp_avg/"):
            value.copy_(torch.randn(value.shape) * size)
        elif name.startswith("exp_avg_sq/"):
            value.fill_(size * size)
    engine.load_state(state)
    drawn = dict(engine.state())
    step = engine.step

    def step_without_gradients(batch: object, lr: float) -> float:
        for parameter in engine._parameters:  # type: ignore[attr-defined]
            parameter.grad = torch.zeros_like(parameter)
        engine._optimizers.step(lr)  # type: ignore[attr-defined]
        engine.steps += 1
        return 1.0

    engine.step = step_without_gradients  # type: ignore[method-assign,assignment]
    work = run.audited.train(plan)
    engine.step = step  # type: ignore[method-assign]
    assert drawn
    found = run.audit_work(plan, work)
    assert found.outcome == "measured"
    assert found.error > FAIL


def test_a_fabricated_optimizer_that_amplifies_rounding_is_detected(run: AuditedRun) -> None:
    """Its second moments are near zero, so that any two replays end far apart."""
    run.audited.engine.step(run.audited.store.train.batch(range(2)), 1e-3)
    state = {name: value.clone() for name, value in run.audited.engine.state().items()}
    for name, value in state.items():
        if name.startswith("exp_avg_sq/"):
            value.fill_(1e-20)
    run.audited.engine.load_state(state)
    work = train_tampered(run.audited, plan := run.plan(), at_the_end(matched_noise))
    found = run.audit_work(plan, work)
    assert found.outcome == "false" or found.error > FAIL


def test_impossible_trace_points_and_states_are_false(run: AuditedRun) -> None:
    plan = run.plan()
    work = run.audited.train(plan)
    bundles = run.audited.trace_recorder.bundles
    assert bundles is not None
    bundle = bundles.bundle(1)
    assert bundle is not None
    start, end = bundle.points
    for points in ((start,), (end, start), (start, replace(end, step=29)), (replace(start, optimizer=b"x" * 32), end)):
        assert run.audit_bundle(plan, work, AuditBundle(points)).outcome == "false"
    for blob, outcome in ((b"abc", "false"), ((1 << 40).to_bytes(8, "little"), "false"), (None, "unserved")):
        root = b"y" * 32 if blob is None else bundles.store(1, blob)
        lying = AuditBundle((replace(start, optimizer=root), end))
        named = replace(work.contribution, trace_root=lying.trace_root)
        found = run.audit_bundle(plan, type(work)(**{**vars(work), "contribution": named}), lying)
        assert found.outcome == outcome
    broken = torch.full((run.audited.engine.layout.size,), float("nan"))
    broken_bundle = AuditBundle((start, replace(end, parameters=bundles.store(1, broken.numpy().data))))
    named = replace(work.contribution, trace_root=broken_bundle.trace_root)
    assert run.audit_bundle(plan, type(work)(**{**vars(work), "contribution": named}), broken_bundle).outcome == "false"


def test_a_non_finite_optimizer_state_has_the_largest_error(run: AuditedRun) -> None:
    plan = run.plan()
    run.advance(plan, {run.audited.node: run.audited.train(plan)})
    work = run.audited.train(plan := run.plan())
    bundles = run.audited.trace_recorder.bundles
    assert bundles is not None
    bundle = bundles.bundle(2)
    assert bundle is not None
    start, end = bundle.points
    moments = bytearray(bundles.read(2, start.optimizer, 1 << 30))
    moments[:4] = np.float32("inf").tobytes()
    lying = AuditBundle((replace(start, optimizer=bundles.store(2, moments)), end))
    named = replace(work.contribution, trace_root=lying.trace_root)
    found = run.audit_bundle(plan, type(work)(**{**vars(work), "contribution": named}), lying)
    assert (found.outcome, found.error) == ("measured", MOST)


@pytest.mark.parametrize("overlap", [{}, {"overlap_steps": 3}, {"fragments": 2}, {"fragments": 2, "overlap_steps": 3}])
def test_an_audit_leaves_the_auditors_training_as_it_was(make: Make, overlap: dict[str, int]) -> None:
    """Training is bit-equal with and without an audit in between.

    Overlapped steps of the audited node are counted as such.
    """
    run = make(overlap=overlap, rounds={"total": 6, "inner_steps": 6, "start_members": 2})
    everyone = (run.audited, run.auditor, run.peer)
    run.peer._secret, run.peer.node = b"", run.auditor.node  # a twin of the auditor that audits nothing
    run.peer._assignment = run.auditor._assignment
    before = None
    for _ in range(3):
        plan = run.plan()
        works = {one.node: one.train(plan) for one in everyone[:2]}
        twin = run.peer.train(plan)
        assert twin.payload == works[run.auditor.node].payload
        for one in everyone:
            while one.overlapped_step(plan):
                pass
        work = works[run.audited.node]
        assert work.contribution.overlap_steps == (overlap.get("overlap_steps", 0) if plan.round > 1 else 0)
        found = run.audit_work(plan, work, before=before)
        assert (found.outcome, found.error) == ("measured", 0)
        kept, expected = run.auditor.engine.state(), run.peer.engine.state()
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[name], expected[name]) for name in kept)
        run.advance(plan, works)
        assert torch.equal(trained(run.auditor), trained(run.peer))
        before = plan


def test_an_audit_that_raises_leaves_the_engine_as_it_was(run: AuditedRun) -> None:
    plan = run.plan()
    work = run.audited.train(plan)
    run.auditor.train(plan)
    before, step = trained(run.auditor), run.auditor.engine.step

    def broken(batch: object, lr: float) -> float:
        step(batch, lr)  # type: ignore[arg-type]
        raise RuntimeError("interrupted")

    run.auditor.engine.step = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match="interrupted"):
        run.audit_work(plan, work)
    assert torch.equal(trained(run.auditor), before)
    assert run.auditor.engine.steps == STEPS


def test_a_run_without_audits_stores_no_bundles(make: Make) -> None:
    run = make(audits={"rate": 0.0})
    work = run.audited.train(run.plan())
    bundles = run.audited.trace_recorder.bundles
    assert bundles is not None
    assert bundles.rounds == []
    assert work.contribution.residual_in == WITHHELD
    assert run.audited.trace_recorder.theta_proofs == {}
    with pytest.raises(BlobUnavailable):
        bundles.read(1, b"x" * 32, 10)

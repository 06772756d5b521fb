"""Audits: honest work passes, every fraud is seen, and the auditor's own training does not notice."""

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
from tests.audit.audited import STEPS, Court, Make, at_the_end, cheat, matched_noise, train_lazily, trained

PASS, FAIL = 20_000, 40_000
"""Millionths: the defaults of ``run.audits``."""


@pytest.fixture
def case(make: Make) -> Court:
    return make()


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk2e"])
@pytest.mark.parametrize("every", [None, 7])
def test_honest_work_passes_to_the_bit(make: Make, codec: str, every: int | None) -> None:
    """On one kind of machine there is no noise at all."""
    case = make(codec={"name": codec}, audits={"trace_steps": every})
    bundles = case.accused.trace_recorder.bundles
    assert bundles is not None
    before: frozenset[bytes] = frozenset()
    for _ in range(2):
        plan = case.plan()
        works = {one.node: one.train(plan) for one in (case.accused, case.peer)}
        work = works[case.accused.node]
        bundle = bundles.bundle(plan.round)
        assert bundle is not None
        assert [point.step for point in bundle.points] == ([0, 7, 14, 21, 28, 30] if every else [0, 30])
        assert bundle.trace_root == work.contribution.trace_root
        found = case.judge(plan, work, allowed_residuals=before)
        assert (found.outcome, found.error) == ("measured", 0)
        assert found.gain > 0 or plan.round > 1, "the first round learns something"
        if codec == "fp32":
            assert work.contribution.residual_in == work.contribution.residual_out == WITHHELD
        else:
            before |= {work.contribution.residual_out}
        case.advance(plan, works)
    assert can_audit(case.auditor, plan.round)


def test_muon_is_audited_like_adamw(make: Make) -> None:
    inner = {"optimizer": "muon", "lr": 0.003, "batch_size": 2, "warmup_steps": 2}
    case = make(inner=inner, audits={"trace_steps": 10})
    for _ in range(2):
        plan = case.plan()
        work = case.accused.train(plan)
        assert case.judge(plan, work).error == 0
        case.advance(plan, {case.accused.node: work})
    work = train_lazily(case.accused, plan := case.plan(), STEPS // 2)
    assert case.judge(plan, work).error > FAIL


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("zero", 0.99, 1.01), ("random", 1.3, 1.6), ("sign", 1.9, 2.1), ("scaled", 0.49, 0.51), ("exploded", 1000, 1000)],
)
def test_updates_that_are_made_up_are_seen(case: Court, name: str, least: float, most: float) -> None:
    changes = {
        "zero": lambda one, moved: torch.zeros_like(moved),
        "random": matched_noise,
        "sign": lambda one, moved: -moved,
        "scaled": lambda one, moved: 1.5 * moved,
        "exploded": lambda one, moved: 1e30 * moved,
    }
    found = case.judge(plan := case.plan(), cheat(case.accused, plan, at_the_end(changes[name])))
    assert found.outcome == "measured"
    assert least <= found.error / 1e6 <= most


@pytest.mark.parametrize("steps", [29, 27, STEPS // 2])
def test_steps_that_were_left_out_are_seen(case: Court, steps: int) -> None:
    plan = case.plan()
    case.advance(plan, {case.peer.node: case.peer.train(plan)})  # the first steps of a run are unlike all others
    found = case.judge(plan := case.plan(), train_lazily(case.accused, plan, steps))
    assert found.outcome == "measured"
    assert found.error > (FAIL if steps <= STEPS // 2 else PASS // 4), (
        "what is seen of a few is up to the machine's noise"
    )


def test_honest_work_in_the_other_precision_passes(case: Court) -> None:
    for _ in range(2):
        plan = case.plan()
        with case.accused.engine.other_precision():  # type: ignore[attr-defined]
            work = case.accused.train(plan)
        found = case.judge(plan, work)
        assert found.outcome == "measured"
        assert found.error <= 1e6 * NEGLIGIBLE_ERROR
        case.advance(plan, {case.accused.node: work, case.peer.node: case.peer.train(plan)})


@given(noise=st.floats(1e-3, 1.0), lie=st.floats(0.0, 2.0), seed=st.integers(0, 9))
def test_an_error_is_measured_by_how_far_two_precisions_are_apart(noise: float, lie: float, seed: int) -> None:
    """So whoever is no farther from a replay than they are from each other passes, and only there is a lie smaller."""
    make = torch.Generator().manual_seed(seed)
    moved, apart, off = (torch.nn.functional.normalize(torch.randn(4096, generator=make), dim=0) for _ in range(3))
    before, found, other = torch.zeros(4096), moved, moved + noise * apart
    for near in (found, other):
        assert tolerant_error(before, near, found, other, before) == 0
        if noise <= MAX_NOISE:
            assert tolerant_error(before, near + 0.9 * noise * off, found, other, before) <= TYPICAL_NOISE
    error = tolerant_error(before, found + lie * off, found, other, before)
    assert error <= lie + 1e-5
    assert error >= min(lie, abs(lie - noise)) * TYPICAL_NOISE / MAX_NOISE - 1e-5, "whatever the noise"
    if noise <= TYPICAL_NOISE:
        assert error >= min(lie, abs(lie - noise)) - 1e-5


def test_a_lazy_segment_is_named(make: Make) -> None:
    case = make(audits={"trace_steps": 10})
    plan, step, taken = case.plan(), case.accused.engine.step, [0]

    def lazy(batch: object, lr: float) -> float:
        taken[0] += 1
        return 1.0 if taken[0] in (15, 16) else step(batch, lr)  # type: ignore[arg-type]

    case.accused.engine.step = lazy  # type: ignore[method-assign,assignment]
    found = case.judge(plan, case.accused.train(plan))
    assert found.error > FAIL
    assert found.segment == 1


def test_other_data_are_seen_by_what_was_learned_of_them(case: Court) -> None:
    step, split, drawn = case.accused.engine.step, case.accused.store.train, np.random.default_rng(5)
    case.accused.engine.step = lambda batch, lr: step(  # type: ignore[method-assign]
        split.batch(drawn.integers(0, len(split), len(batch))), lr
    )
    found = case.judge(plan := case.plan(), case.accused.train(plan))
    assert found.outcome == "measured"
    assert found.error > 10 * FAIL


def test_other_data_are_seen_by_their_digest(case: Court) -> None:
    case.accused._assignment = case.peer._assignment
    plan = case.plan()
    assert case.judge(plan, case.accused.train(plan)).outcome == "false"


def test_a_stale_base_is_seen(case: Court) -> None:
    plan = case.plan()
    case.advance(plan, {case.peer.node: case.peer.train(plan)})
    plan = case.plan()
    case.accused.adopt(case.peer.outer.clone(), None)
    case.accused.outer.theta.add_(1e-4)
    work = case.accused.train(plan)
    assert work.contribution.base_root == plan.base_root, "as it says"
    assert case.judge(plan, work).outcome == "false"


def test_a_copied_peer_is_seen(case: Court) -> None:
    plan = case.plan()
    case.peer.train(plan)
    copied = trained(case.peer)
    work = cheat(case.accused, plan, at_the_end(lambda one, moved: copied - one.outer.theta))
    found = case.judge(plan, work)
    assert found.outcome == "measured"
    assert found.error > 10 * FAIL


def test_a_copied_payload_does_not_follow_from_anything(case: Court) -> None:
    plan = case.plan()
    other, work = case.peer.train(plan), case.accused.train(plan)
    copied = replace(work.contribution, payload_root=other.contribution.payload_root)
    bundle = case.accused.trace_recorder.bundles.bundle(1)  # type: ignore[union-attr]
    assert bundle is not None
    found = case.judge_bundle(plan, type(work)(**{**vars(work), "contribution": copied}), bundle)
    assert found.outcome == "false"


def test_garbage_in_the_error_feedback_is_seen(case: Court) -> None:
    plan = case.plan()
    assert case.accused.residual is not None
    case.accused.residual.copy_(1e-3 * torch.randn(case.accused.residual.shape))
    work = case.accused.train(plan)
    assert case.judge(plan, work, allowed_residuals=frozenset()).outcome == "false", "it had none before"
    assert case.judge(plan, work, allowed_residuals=frozenset({work.contribution.residual_in})).outcome == "measured"
    bundles, zeros = case.accused.trace_recorder.bundles, torch.zeros_like(case.accused.residual)
    assert bundles is not None
    bundles.store(1, zeros.numpy().data)
    for field in ("residual_in", "residual_out"):
        lying = replace(work.contribution, **{field: blob_root(zeros.numpy().data)})
        bundle = bundles.bundle(1)
        assert bundle is not None
        found = case.judge_bundle(plan, type(work)(**{**vars(work), "contribution": lying}), bundle)
        assert found.outcome == "false", field


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_an_optimizer_that_is_made_up_to_need_no_data_does_not_help(case: Court, size: float) -> None:
    """Moments that drown every gradient: the replay then agrees with an update that cost nothing."""
    plan = case.plan()
    engine = case.accused.engine
    engine.step(case.accused.store.train.batch(range(2)), 1e-3)
    state = {name: value.clone() for name, value in engine.state().items()}
    for name, value in state.items():
        if name.startswith("exp_avg/"):
            value.copy_(torch.randn(value.shape) * size)
        elif name.startswith("exp_avg_sq/"):
            value.fill_(size * size)
    engine.load_state(state)
    drawn = dict(engine.state())
    step = engine.step

    def free(batch: object, lr: float) -> float:
        for parameter in engine._parameters:  # type: ignore[attr-defined]
            parameter.grad = torch.zeros_like(parameter)
        engine._optimizers.step(lr)  # type: ignore[attr-defined]
        engine.steps += 1
        return 1.0

    engine.step = free  # type: ignore[method-assign,assignment]
    work = case.accused.train(plan)
    engine.step = step  # type: ignore[method-assign]
    assert drawn
    found = case.judge(plan, work)
    assert found.outcome == "measured"
    assert found.error > FAIL


def test_an_optimizer_that_is_made_up_to_enlarge_rounding_does_not_help(case: Court) -> None:
    """Second moments of nothing: any two replays of it end far apart."""
    case.accused.engine.step(case.accused.store.train.batch(range(2)), 1e-3)
    state = {name: value.clone() for name, value in case.accused.engine.state().items()}
    for name, value in state.items():
        if name.startswith("exp_avg_sq/"):
            value.fill_(1e-20)
    case.accused.engine.load_state(state)
    work = cheat(case.accused, plan := case.plan(), at_the_end(matched_noise))
    found = case.judge(plan, work)
    assert found.outcome == "false" or found.error > FAIL


def test_points_and_states_that_cannot_be_are_false(case: Court) -> None:
    plan = case.plan()
    work = case.accused.train(plan)
    bundles = case.accused.trace_recorder.bundles
    assert bundles is not None
    bundle = bundles.bundle(1)
    assert bundle is not None
    start, end = bundle.points
    for points in ((start,), (end, start), (start, replace(end, step=29)), (replace(start, optimizer=b"x" * 32), end)):
        assert case.judge_bundle(plan, work, AuditBundle(points)).outcome == "false"
    for blob, outcome in ((b"abc", "false"), ((1 << 40).to_bytes(8, "little"), "false"), (None, "unserved")):
        root = b"y" * 32 if blob is None else bundles.store(1, blob)
        lying = AuditBundle((replace(start, optimizer=root), end))
        named = replace(work.contribution, trace_root=lying.trace_root)
        found = case.judge_bundle(plan, type(work)(**{**vars(work), "contribution": named}), lying)
        assert found.outcome == outcome
    broken = torch.full((case.accused.engine.layout.size,), float("nan"))
    broken_kit = AuditBundle((start, replace(end, parameters=bundles.store(1, broken.numpy().data))))
    named = replace(work.contribution, trace_root=broken_kit.trace_root)
    assert case.judge_bundle(plan, type(work)(**{**vars(work), "contribution": named}), broken_kit).outcome == "false"


def test_an_optimizer_that_is_not_finite_is_as_far_off_as_can_be(case: Court) -> None:
    plan = case.plan()
    case.advance(plan, {case.accused.node: case.accused.train(plan)})
    work = case.accused.train(plan := case.plan())
    bundles = case.accused.trace_recorder.bundles
    assert bundles is not None
    bundle = bundles.bundle(2)
    assert bundle is not None
    start, end = bundle.points
    moments = bytearray(bundles.read(2, start.optimizer, 1 << 30))
    moments[:4] = np.float32("inf").tobytes()
    lying = AuditBundle((replace(start, optimizer=bundles.store(2, moments)), end))
    named = replace(work.contribution, trace_root=lying.trace_root)
    found = case.judge_bundle(plan, type(work)(**{**vars(work), "contribution": named}), lying)
    assert (found.outcome, found.error) == ("measured", MOST)


@pytest.mark.parametrize("overlap", [{}, {"overlap_steps": 3}, {"fragments": 2}, {"fragments": 2, "overlap_steps": 3}])
def test_an_audit_leaves_the_auditors_training_as_it_was(make: Make, overlap: dict[str, int]) -> None:
    """Bit-equal training with an audit in between, and without; late steps of the audited count as what they are."""
    case = make(overlap=overlap, rounds={"total": 6, "inner_steps": 6, "start_members": 2})
    everyone = (case.accused, case.auditor, case.peer)
    case.peer._secret, case.peer.node = b"", case.auditor.node  # the auditor's twin, who audits nothing
    case.peer._assignment = case.auditor._assignment
    before = None
    for _ in range(3):
        plan = case.plan()
        works = {one.node: one.train(plan) for one in everyone[:2]}
        twin = case.peer.train(plan)
        assert twin.payload == works[case.auditor.node].payload
        for one in everyone:
            while one.overlapped_step(plan):
                pass
        work = works[case.accused.node]
        assert work.contribution.overlap_steps == (overlap.get("overlap_steps", 0) if plan.round > 1 else 0)
        found = case.judge(plan, work, before=before)
        assert (found.outcome, found.error) == ("measured", 0)
        kept, expected = case.auditor.engine.state(), case.peer.engine.state()
        assert kept.keys() == expected.keys()
        assert all(torch.equal(kept[name], expected[name]) for name in kept)
        case.advance(plan, works)
        assert torch.equal(trained(case.auditor), trained(case.peer))
        before = plan


def test_an_audit_that_fails_leaves_the_engine_as_it_was(case: Court) -> None:
    plan = case.plan()
    work = case.accused.train(plan)
    case.auditor.train(plan)
    before, step = trained(case.auditor), case.auditor.engine.step

    def broken(batch: object, lr: float) -> float:
        step(batch, lr)  # type: ignore[arg-type]
        raise RuntimeError("mid-air")

    case.auditor.engine.step = broken  # type: ignore[method-assign,assignment]
    with pytest.raises(RuntimeError, match="mid-air"):
        case.judge(plan, work)
    assert torch.equal(trained(case.auditor), before)
    assert case.auditor.engine.steps == STEPS


def test_a_run_without_audits_pays_for_none(make: Make) -> None:
    case = make(audits={"rate": 0.0})
    work = case.accused.train(case.plan())
    bundles = case.accused.trace_recorder.bundles
    assert bundles is not None
    assert bundles.rounds == []
    assert work.contribution.residual_in == WITHHELD
    assert case.accused.trace_recorder.theta_proofs == {}
    with pytest.raises(BlobUnavailable):
        bundles.read(1, b"x" * 32, 10)

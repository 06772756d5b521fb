"""Probes: auditors in any precision report matching sketches, and a sketch cannot be guessed without replaying."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace as changed

from psyche.audit.probes import Probe, draw_probes
from psyche.diloco.trace import TracePoint
from psyche.numerics.digest import digest
from psyche.numerics.flat import FlatLayout
from psyche.protocol.audit_messages import MOST, SKETCH, Finding
from psyche.protocol.audit_outcome import unlike
from psyche.protocol.messages import Plan
from tests.audit.audited import SEED, AuditedRun, Make, at_the_end, train_tampered

LAYOUT = FlatLayout.of([("a", (5, 3)), ("b", (4097,)), ("c", (2,))])


def points(*steps: int) -> tuple[TracePoint, ...]:
    return tuple(TracePoint(step, bytes(32), bytes(32)) for step in steps)


@given(key=st.binary(max_size=8), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_probes_sample_parameters_and_steps_in_the_middle_of_each_segment(key: bytes, lengths: list[int]) -> None:
    ends = [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    found = draw_probes(key, points(*ends), LAYOUT)
    assert found.keys() == draw_probes(key, points(*ends), LAYOUT).keys()
    assert len(found) == min(4, len(lengths))
    positions = [int(at) for one in found.values() for at in one.positions]
    assert len(positions) == SKETCH // len(found) * len(found)
    parameters = {at for span in LAYOUT.spans for at in range(span.start, span.stop)}
    assert set(positions) <= parameters
    for number, one in found.items():
        start, stop = list(pairwise(ends))[number]
        assert start <= one.step < stop
        assert start + (stop - start) // 4 <= one.step <= start + (stop - start) // 2


def test_a_round_with_nothing_to_replay_has_no_probes() -> None:
    assert draw_probes(b"key", points(3), LAYOUT) == {}


def test_a_small_model_is_probed_at_every_parameter() -> None:
    small = FlatLayout.of([("a", (3,)), ("b", (2,))])
    (one,) = draw_probes(b"key", points(0, 9), small).values()
    assert sorted(one.positions.tolist()) == [0, 1, 2, 4096, 4097]


def test_non_finite_measurements_are_clamped() -> None:
    now = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e-9])
    assert Probe(0, torch.arange(4)).measure(torch.zeros(4), now) == (MOST, MOST, -MOST, 3)


def findings(run: AuditedRun, *, other_precision: bool = False, jury: bool = False) -> list[Finding]:
    """Return the auditor's findings on two rounds of honest work."""
    found = []
    for _ in range(2):
        plan = run.plan()
        work = run.audited.train(plan)
        with run.auditor.engine.other_precision() if other_precision else nullcontext():  # type: ignore[attr-defined]
            found.append(run.audit_bundle(plan, work, run.bundle(plan), jury=jury))
        run.advance(plan, {run.audited.node: work})
    return found


def test_auditors_in_different_precisions_report_matching_sketches(make: Make) -> None:
    for one, other in zip(findings(make()), findings(make(), other_precision=True), strict=True):
        assert len(one.sketch) == SKETCH
        assert any(one.sketch)
        assert one.sketch != other.sketch
        assert not unlike(one, other)


def test_a_jury_member_measures_noise_even_on_honest_work(make: Make) -> None:
    for one, measure_noise in zip(findings(make()), findings(make(), jury=True), strict=True):
        assert one.noise == MOST
        assert 0 < measure_noise.noise < MOST
        assert (one.error, one.sketch) == (measure_noise.error, measure_noise.sketch)


def test_the_sketch_comes_from_the_replay_and_not_from_the_audited_node(make: Make) -> None:
    honest, hostile = make(), make()
    plan = honest.plan()
    found = honest.audit_work(plan, honest.audited.train(plan))
    lie = train_tampered(hostile.audited, plan, at_the_end(lambda one, moved: -moved))
    assert hostile.audit_work(plan, lie).sketch == found.sketch


def test_a_sketch_interpolated_between_trace_points_is_usually_detected(make: Make) -> None:
    """Interpolation needs no training.

    Where the sampled step is close to the middle of the segment, it may pass once.
    """
    run, seen = make(), []
    for _ in range(5):
        plan = run.plan()
        work = run.audited.train(plan)
        found = run.audit_work(plan, work)
        seen.append(unlike(found, changed(found, sketch=guessed(run, plan))))
        run.advance(plan, {run.audited.node: work})
    assert sum(seen) >= 2, seen


def guessed(run: AuditedRun, plan: Plan) -> tuple[int, ...]:
    """Return the sketch that linear interpolation between trace points gives."""
    bundles, points, layout = run.audited.trace_recorder.bundles, run.bundle(plan).points, run.audited.engine.layout
    assert bundles is not None
    found: tuple[int, ...] = ()
    for number, one in draw_probes(digest("looked at", SEED, run.audited.node.encode()), points, layout).items():
        start, stop = points[number : number + 2]
        before, after = (
            torch.frombuffer(
                bytearray(bundles.read(plan.round, point.parameters, 4 * layout.size)), dtype=torch.float32
            )
            for point in (start, stop)
        )
        share = (one.step + 1 - start.step) / (stop.step - start.step)
        found += one.measure(before, before + share * (after - before))
    return found

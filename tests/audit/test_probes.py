"""What an auditor shows of the way is the same for all who train, and no guess."""

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
from tests.audit.audited import SEED, Court, Make, at_the_end, cheat

LAYOUT = FlatLayout.of([("a", (5, 3)), ("b", (4097,)), ("c", (2,))])


def points(*steps: int) -> tuple[TracePoint, ...]:
    return tuple(TracePoint(step, bytes(32), bytes(32)) for step in steps)


@given(key=st.binary(max_size=8), lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9))
def test_parameters_and_steps_in_the_middle_are_drawn(key: bytes, lengths: list[int]) -> None:
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


def test_a_round_with_nothing_to_replay_shows_nothing() -> None:
    assert draw_probes(b"key", points(3), LAYOUT) == {}


def test_a_small_model_shows_all_it_has() -> None:
    small = FlatLayout.of([("a", (3,)), ("b", (2,))])
    (one,) = draw_probes(b"key", points(0, 9), small).values()
    assert sorted(one.positions.tolist()) == [0, 1, 2, 4096, 4097]


def test_what_is_not_finite_can_be_said() -> None:
    now = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e-9])
    assert Probe(0, torch.arange(4)).measure(torch.zeros(4), now) == (MOST, MOST, -MOST, 3)


def judged(case: Court, *, other_precision: bool = False, jury: bool = False) -> list[Finding]:
    """What the auditor finds of the accused's honest work in two rounds."""
    found = []
    for _ in range(2):
        plan = case.plan()
        work = case.accused.train(plan)
        with case.auditor.engine.other_precision() if other_precision else nullcontext():  # type: ignore[attr-defined]
            found.append(case.judge_bundle(plan, work, case.bundle(plan), jury=jury))
        case.advance(plan, {case.accused.node: work})
    return found


def test_auditors_of_other_precision_show_the_same_way(make: Make) -> None:
    for one, other in zip(judged(make()), judged(make(), other_precision=True), strict=True):
        assert len(one.sketch) == SKETCH
        assert any(one.sketch)
        assert one.sketch != other.sketch
        assert not unlike(one, other)


def test_a_jury_measures_noise_where_nothing_is_wrong(make: Make) -> None:
    for one, measure_noise in zip(judged(make()), judged(make(), jury=True), strict=True):
        assert one.noise == MOST
        assert 0 < measure_noise.noise < MOST
        assert (one.error, one.sketch) == (measure_noise.error, measure_noise.sketch)


def test_the_way_is_the_auditors_and_not_what_the_audited_says(make: Make) -> None:
    honest, hostile = make(), make()
    plan = honest.plan()
    found = honest.judge(plan, honest.accused.train(plan))
    lie = cheat(hostile.accused, plan, at_the_end(lambda one, moved: -moved))
    assert hostile.judge(plan, lie).sketch == found.sketch


def test_a_straight_line_between_trace_points_is_seldom_the_way(make: Make) -> None:
    """What an auditor can make up of all that it is handed, without training; where a step close to half of the segment
    is drawn it may get away with it once."""
    case, seen = make(), []
    for _ in range(5):
        plan = case.plan()
        work = case.accused.train(plan)
        found = case.judge(plan, work)
        seen.append(unlike(found, changed(found, sketch=guessed(case, plan))))
        case.advance(plan, {case.accused.node: work})
    assert sum(seen) >= 2, seen


def guessed(case: Court, plan: Plan) -> tuple[int, ...]:
    """By the straight line."""
    bundles, points, layout = case.accused.trace_recorder.bundles, case.bundle(plan).points, case.accused.engine.layout
    assert bundles is not None
    found: tuple[int, ...] = ()
    for number, one in draw_probes(digest("looked at", SEED, case.accused.node.encode()), points, layout).items():
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

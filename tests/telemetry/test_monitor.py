from __future__ import annotations

import math
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.telemetry.events import (
    AuditEnded,
    Diverged,
    Event,
    MemberMetrics,
    PeerJoined,
    PeerLeft,
    Rejected,
    RoundStarted,
    RoundSummary,
    RunFinished,
)
from psyche.telemetry.metrics import fault
from psyche.telemetry.monitor import LOSS_SPREAD, Monitor, Totals, summarise

from .story import LIMITS, PARAMETERS, PAYLOAD, PEERS, RUN, STEPS, certified, metrics, root, story


def summary(*reports: MemberMetrics, **changes: object) -> RoundSummary:
    return summarise(1, reports, parameters=PARAMETERS, limits=LIMITS, **changes)  # type: ignore[arg-type]


class TestSummarise:
    def test_weights_and_sums(self) -> None:
        got = summary(
            metrics(peer=PEERS[0], train_loss=4.0, tokens=1000, heldout_loss_sum=8000.0, heldout_tokens=2000),
            metrics(peer=PEERS[1], train_loss=5.0, tokens=3000, heldout_loss_sum=3000.0, heldout_tokens=1000),
            certified=certified(1, PEERS[:2], seconds=20.0),
            totals=Totals(tokens=6000, bytes_up=10, bytes_down=20),
        )
        assert got.train_loss == pytest.approx((4.0 * 1000 + 5.0 * 3000) / 4000)
        assert got.heldout_loss == pytest.approx(11000 / 3000)
        assert got.tokens == 4000
        assert got.tokens_total == 10_000
        assert got.tokens_per_second == pytest.approx(200.0)
        assert got.bytes_up == 6 * PAYLOAD
        assert got.bytes_up_total == 6 * PAYLOAD + 10
        assert got.bytes_down_total == 6 * PAYLOAD + 20
        assert got.bytes_per_token == pytest.approx((6 * PAYLOAD + 10) / 10_000)
        assert got.payload_ratio == pytest.approx(4 * PARAMETERS / PAYLOAD)
        assert got.compute_utilisation == pytest.approx(0.9)
        assert (got.members, got.reports, got.refused) == (2, 2, 0)
        assert got.state_root == root(1)

    def test_nothing_reported(self) -> None:
        got = summary(certified=certified(1))
        assert (got.members, got.reports, got.tokens) == (4, 0, 0)
        assert got.heldout_loss is None
        assert got.bytes_per_token is None
        assert got.payload_ratio is None

    def test_what_was_not_measured_is_left_out(self) -> None:
        got = summary(metrics(train_loss=None, momentum_norm=None), metrics(peer=PEERS[1], train_loss=4.0))
        assert got.train_loss == 4.0
        assert got.momentum_norm == 2.5
        assert got.reports == 2

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("train_loss", math.nan),
            ("train_loss", -1.0),
            ("heldout_loss_sum", math.inf),
            ("heldout_tokens", 2**62),
            ("tokens", 10**12),
            ("tokens", -5),
            ("tokens", 10**400),
            ("bytes_up", 2**60),
            ("payload_bytes", 2**60),
            ("round_seconds", -math.inf),
            ("momentum_norm", 1e300),
            ("lr", math.nan),
        ],
    )
    def test_an_impossible_report_is_refused_and_changes_nothing_else(self, field: str, value: float) -> None:
        honest = [metrics(peer=peer) for peer in PEERS[:3]]
        liar = metrics(1, PEERS[3], **{field: value})
        assert field in fault(liar, LIMITS)
        got, without = summary(*honest, liar), summary(*honest)
        assert got.refused == 1
        assert got.heldout_loss == without.heldout_loss
        assert got.tokens == without.tokens

    def test_a_possible_lie_moves_the_loss_by_a_bounded_amount(self) -> None:
        honest = [metrics(peer=peer, heldout_loss_sum=5.0 * 2000, train_loss=5.0) for peer in PEERS[:3]]
        most = LIMITS.heldout_tokens
        liar = metrics(peer=PEERS[3], heldout_loss_sum=9999.0 * most, heldout_tokens=most, train_loss=9999.0)
        got = summary(*honest, liar)
        assert got.heldout_loss is not None
        assert got.train_loss is not None
        assert got.heldout_loss <= (3 * 5 + 2 * LOSS_SPREAD * 5) / 5
        assert got.train_loss <= (3 * 5 + LOSS_SPREAD * 5) / 4

    @given(
        st.lists(
            st.fixed_dictionaries(
                {
                    "train_loss": st.none() | st.floats(),
                    "heldout_loss_sum": st.none() | st.floats(),
                    "heldout_tokens": st.integers(),
                    "tokens": st.integers(),
                    "train_seconds": st.none() | st.floats(),
                    "exchange_seconds": st.none() | st.floats(),
                    "round_seconds": st.none() | st.floats(),
                    "payload_bytes": st.integers(),
                    "bytes_up": st.integers(),
                    "pseudo_gradient_norm": st.none() | st.floats(),
                }
            ),
            max_size=5,
        )
    )
    @settings(max_examples=200, deadline=None)
    def test_no_claim_raises_or_gives_a_number_that_is_not_finite(self, claims: list[dict[str, object]]) -> None:
        got = summary(*(metrics(1, PEERS[0], **claim) for claim in claims), certified=certified(1))
        for field in got.__struct_fields__:
            value = getattr(got, field)
            assert not isinstance(value, float) or math.isfinite(value), field
        assert got.tokens >= 0


class TestMonitor:
    def run(self, *events: Event) -> list[Event]:
        emitted: list[Event] = []
        monitor = Monitor(RUN, PARAMETERS, emitted.append)
        for event in events:
            monitor(event)
        return emitted

    def test_closes_when_the_last_member_reports(self) -> None:
        reports = [metrics(1, peer) for peer in PEERS]
        assert self.run(RoundStarted(1, PEERS, STEPS), certified(1), *reports[:3]) == []
        (got,) = self.run(RoundStarted(1, PEERS, STEPS), *reports[:2], certified(1), *reports[2:])
        assert isinstance(got, RoundSummary)
        assert got.reports == 4

    def test_a_missing_member_is_waited_for_until_the_next_round(self) -> None:
        first = [metrics(1, peer) for peer in PEERS[:3]]
        second = [metrics(2, peer) for peer in PEERS]
        late = metrics(1, PEERS[3])
        got = self.run(certified(1), *first, certified(2), late, *second)
        assert [(s.round, s.reports) for s in got if isinstance(s, RoundSummary)] == [(1, 3), (2, 4)]

    def test_the_last_round_is_reported_after_the_run_is_finished(self) -> None:
        reports = [metrics(1, peer) for peer in PEERS]
        end = [certified(1), RunFinished(1, "done")]
        (got,) = self.run(*end, *reports)
        assert isinstance(got, RoundSummary)
        assert got.reports == 4
        leaving = [PeerLeft(peer, "the run is finished", 2) for peer in PEERS]
        assert self.run(*end, *reports[:2], leaving[3]) == []
        (got,) = self.run(*end, *reports[:2], *leaving)  # who left reports no more
        assert isinstance(got, RoundSummary)
        assert got.reports == 2

    def test_who_left_during_the_round_is_not_waited_for_unless_back(self) -> None:
        opened, left = RoundStarted(1, PEERS, STEPS), PeerLeft(PEERS[3], "silent", 1)
        reports = [metrics(1, peer) for peer in PEERS[:3]]
        assert len(self.run(opened, left, certified(1), RoundStarted(2, PEERS[:3], STEPS), *reports)) == 1
        assert self.run(opened, left, PeerJoined(PEERS[3], "cpu", 2), certified(1), *reports) == []

    def test_totals_add_up_and_incidents_are_counted(self) -> None:
        events = [e for e in story(3) if not isinstance(e, RoundSummary)]
        events.insert(4, Diverged(PEERS[0], 1, "a", "b"))
        got = self.run(*events)
        totals = [s.tokens_total for s in got if isinstance(s, RoundSummary)]
        assert totals == [4 * STEPS * RUN.tokens_per_step * n for n in (1, 2, 3)]
        assert isinstance(got[-1], RoundSummary)
        assert got[-1].divergences_total == 1

    def test_audits_and_convictions_are_counted(self) -> None:
        events = [e for e in story(3) if not isinstance(e, RoundSummary)]
        events.insert(4, AuditEnded(PEERS[0], 1, "passed", ()))
        events.insert(5, AuditEnded(PEERS[1], 1, "convicted", (PEERS[2],)))
        *_, last = self.run(*events)
        assert isinstance(last, RoundSummary)
        assert (last.audits_total, last.convictions_total) == (2, 2)

    def test_the_excluded_and_strangers_do_not_count(self) -> None:
        reports = [metrics(1, peer) for peer in (*PEERS[1:], "stranger")]
        (got,) = self.run(*reports, certified(1, PEERS[1:], excluded=((PEERS[0], "late"),)))
        assert isinstance(got, RoundSummary)
        assert (got.reports, got.members, got.excluded) == (3, 3, 1)

    def test_an_impossible_report_is_named(self) -> None:
        reports = [metrics(1, peer) for peer in PEERS[:3]]
        got = self.run(*reports, metrics(1, PEERS[3], tokens=-1), certified(1))
        assert isinstance(got[0], RoundSummary)
        assert isinstance(got[1], Rejected)
        assert (got[1].peer, got[1].what) == (PEERS[3], "metrics")

    def test_rounds_far_away_take_no_memory(self) -> None:
        monitor = Monitor(RUN, PARAMETERS, lambda event: None)
        for number in range(1000):
            monitor(metrics(10**6 + number))
        assert monitor._reports == {}

    def test_a_restart_goes_on_where_the_log_ends(self) -> None:
        before = list(story(3))[:-1]
        emitted: list[Event] = []
        monitor = Monitor(RUN, PARAMETERS, emitted.append)
        monitor.resume(before)
        for event in [certified(4), *(metrics(4, peer) for peer in PEERS)]:
            monitor(event)
        (got,) = emitted
        assert isinstance(got, RoundSummary)
        assert got.tokens_total == 4 * 4 * STEPS * RUN.tokens_per_step


def test_utilisation_is_the_mean_of_members() -> None:
    got = summary(metrics(train_seconds=5.0), metrics(peer=PEERS[1], train_seconds=99.0))
    assert got.compute_utilisation == pytest.approx(fmean([0.25, 1.0]))

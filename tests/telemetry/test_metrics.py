from __future__ import annotations

import pytest

from psyche.protocol.messages import Metrics
from psyche.protocol.wire import MalformedMessage, decode
from psyche.telemetry.events import Event, MemberMetrics, RoundSummary
from psyche.telemetry.metrics import MEASUREMENTS, metrics_event, signed_metrics

from .story import PEERS, metrics


def test_every_field_of_the_event_is_a_measurement_and_the_reverse() -> None:
    own = set(MemberMetrics.__struct_fields__) - set(Event.__struct_fields__) - {"round", "peer"}
    assert {one.field for one in MEASUREMENTS} == own
    assert {one.field for one in MEASUREMENTS if one.combine} <= set(RoundSummary.__struct_fields__)


def test_measurements_travel_in_the_signed_message_unchanged() -> None:
    own = metrics(3, PEERS[1], train_loss=None)
    message = decode(Metrics, signed_metrics(own).encode())
    assert "train_loss" not in message.values
    assert metrics_event(PEERS[1], 3, message) == own


def test_a_report_cannot_name_another_author_round_or_time() -> None:
    forged = Metrics({"round": 9, "peer": 1, "time": 5.0, "node": 2, "no_such_metric": 1.0, "tokens": 7})
    event = metrics_event(PEERS[0], 3, forged)
    assert event == MemberMetrics(round=3, peer=PEERS[0], tokens=7)


def test_a_fractional_count_is_refused() -> None:
    with pytest.raises(MalformedMessage, match="tokens"):
        metrics_event(PEERS[0], 1, Metrics({"tokens": 1.5}))


@pytest.mark.parametrize(
    "message",
    [
        Metrics({f"name-{number}": 1.0 for number in range(65)}),
        Metrics({"x" * 49: 1.0}),
        Metrics({"tokens": 2**63}),
        Metrics({"tokens": -1}),
    ],
    ids=["too many", "long name", "huge count", "negative count"],
)
def test_the_message_is_bounded(message: Metrics) -> None:
    with pytest.raises(MalformedMessage):
        decode(Metrics, message.encode())

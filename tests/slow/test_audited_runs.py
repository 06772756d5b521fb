"""A run with many audits, late joiners and a restarted member: all nodes are always busy and no audit lapses."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from psyche.ledger.store import NAME, Ledger
from psyche.network.identity import IDENTITY, Identity
from psyche.protocol.chain import claimed
from psyche.protocol.messages import Record
from psyche.telemetry.events import (
    Audited,
    AuditStarted,
    Event,
    PhaseChanged,
    RoundCertified,
    RoundStarted,
    RunFinished,
)
from tests.processes.swarm import Swarm, swarm
from tests.tiny import write_config

pytestmark = pytest.mark.slow

ROUNDS = int(os.environ.get("PSYCHE_AUDITED_ROUNDS", "100"))
FOUNDERS = [f"founder-{number}" for number in range(1, 5)]
LATE = ["late-1", "late-2"]
RATE = 0.2
"""Four times the default audit rate."""


def test_late_joiners_audit_or_train_in_every_round(tmp_path: Path) -> None:
    rounds = {"total": ROUNDS, "inner_steps": 80, "start_members": len(FOUNDERS)}
    config = write_config(tmp_path, members=len(FOUNDERS), rounds=rounds, audits={"rate": RATE})
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in FOUNDERS:
            run.node(name)
        for name, at in zip(LATE, (ROUNDS // 5, ROUNDS // 3), strict=True):
            _certified(run, at)
            run.node(name)
        _certified(run, ROUNDS // 2)
        run.kill(FOUNDERS[0])  # it loses the states it needs to audit earlier rounds
        _certified(run, ROUNDS // 2 + 5)
        run.node(FOUNDERS[0])
        _certified(run, ROUNDS)
        for name in [*FOUNDERS, *LATE]:
            assert run.join(name) == 0, run.output(name)[-2000:]
        assert run.events("coordinator", RunFinished)
        events = {name: run.events(name, Event) for name in [*FOUNDERS, *LATE]}
        planned = {event.round: event.time for event in run.events("coordinator", RoundStarted)}
    records = _records(tmp_path / "run" / FOUNDERS[1])
    assert [record.plan.round for record in records] == list(range(1, ROUNDS + 1))
    outcomes = Counter(one.outcome for record in records for one in record.audit_state.closed)
    declined = {
        (one.accused, one.round, node)
        for record in records
        for one in record.audit_state.audits
        for node in one.declined
    }
    print(f"audits: {dict(outcomes)}; declined: {len(declined)}")
    for name, logged in events.items():
        peer = Identity.load_or_create(tmp_path / "run" / name / IDENTITY).peer_id
        idle = _idle_rounds(peer, records, logged, planned)
        print(f"{name}: {_seconds(logged)}; idle in rounds {idle}")
        away = range(ROUNDS // 2 - 1, ROUNDS // 2 + 20) if name == FOUNDERS[0] else range(0)
        assert not set(idle) - set(away), f"{name} did nothing in rounds {idle}"
    assert outcomes["passed"] > ROUNDS * RATE / 2
    assert not outcomes["dropped"], "an audit that some node could have done was dropped"
    assert not records[-1].audit_state.banned


def _certified(run: Swarm, number: int) -> None:
    for last in range(min(number, 5), number + 1, 5):  # each 5 rounds have their own timeout
        run.wait("coordinator", RoundCertified, lambda event, last=last: event.round >= last)  # type: ignore[misc]


def _records(node: Path) -> list[Record]:
    with Ledger.read(node / NAME) as ledger:
        return [claimed(entry.certificate).record for entry in ledger.entries()]


def _idle_rounds(peer: str, records: list[Record], logged: list[Event], planned: dict[int, float]) -> list[int]:
    """Return the rounds in which a node neither trained nor audited, from its first round as a member.

    ``planned`` maps each round to the time it was planned. An audit still under way at that moment counts for the
    round.
    """
    trained = {record.plan.round for record in records if record.plan.member(peer) is not None}
    audited: set[int] = set()
    during = 0
    for event in logged:
        if isinstance(event, AuditStarted):
            during = event.during
            audited.add(during)
        elif isinstance(event, Audited) and event.time > planned.get(during + 1, event.time):
            audited.add(during + 1)
    return sorted(set(range(min(trained), len(records) + 1)) - trained - audited)


def _seconds(logged: list[Event]) -> dict[str, float]:
    """Return how long the node spent in each phase, in seconds."""
    spent: Counter[str] = Counter()
    phase, since = "", 0.0
    for event in logged:
        if isinstance(event, PhaseChanged | AuditStarted):
            if phase:
                spent[phase] += event.time - since
            phase, since = event.phase if isinstance(event, PhaseChanged) else "auditing", event.time
    return {name: round(seconds, 1) for name, seconds in spent.most_common()}

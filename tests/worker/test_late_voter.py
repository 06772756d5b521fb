"""A voter that missed the plan of a round follows it, and its vote replaces a missing one."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.network.identity import IDENTITY, Identity
from psyche.protocol.chain import claimed
from psyche.protocol.messages import Certificate
from psyche.protocol.wire import decode, decode_envelope
from psyche.telemetry.events import RoundCertified, RoundStarted
from tests.processes.swarm import swarm
from tests.tiny import write_config

NAMES = ("node-1", "node-2", "node-3", "node-4")
PATIENT = {"round_min": 12.0, "round_max": 30.0, "exchange_min": 6.0, "exchange_max": 20.0, "silence": 90.0}


@pytest.mark.slow
def test_a_voter_outside_the_plan_votes(tmp_path: Path) -> None:
    """Three of four votes are needed.

    One voter is frozen in one round, another in the next. Without the first one's vote there would be two, and the
    round would need a reconfiguration.
    """
    rounds = {"inner_steps": 20, "min_members": 1, "total": 500, "start_members": 4}
    with swarm(tmp_path / "run", write_config(tmp_path, members=4, rounds=rounds, deadlines=PATIENT)) as run:
        run.coordinator()
        for name in NAMES:
            run.node(name)
        late, away = (Identity.load_or_create(run.directory / name / IDENTITY).peer_id for name in NAMES[2:])
        run.wait("node-3", RoundCertified, lambda event: event.round == 2)
        freeze(run.processes["node-3"].pid)
        without = run.wait("coordinator", RoundCertified, lambda event: late not in event.accepted).round
        run.wait("node-1", RoundStarted, lambda event: event.round == without + 1)
        freeze(run.processes["node-4"].pid)
        os.kill(run.processes["node-3"].pid, signal.SIGCONT)
        run.wait(
            "coordinator", RoundCertified, lambda event: event.round > without + 1
        )  # the ledger then has the round
    with Ledger.read(run.directory / "coordinator" / LEDGER) as ledger:
        entry = next(entry for entry in ledger.entries() if entry.round == without + 1)
    record = claimed(entry.certificate).record
    voted = {decode_envelope(vote).author for vote in decode(Certificate, entry.certificate).votes}
    assert record.plan.member(late) is None
    assert not record.reconfiguration
    assert late in voted
    assert away not in voted


def freeze(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)

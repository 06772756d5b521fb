"""Runs of real processes, a quarter of them malicious: only those are convicted, and the run finishes."""

from __future__ import annotations

from pathlib import Path

import pytest

from psyche.audit.evidence_store import EVIDENCE_DIRECTORY, EvidenceStore
from psyche.config import MANIFEST, Manifest
from psyche.ledger.store import NAME, Ledger
from psyche.ledger.verify import verify_ledger
from psyche.network.identity import IDENTITY, Identity
from psyche.protocol.chain import claimed
from psyche.protocol.messages import Record
from psyche.telemetry.events import RunFinished
from tests.processes.swarm import swarm
from tests.processes.test_bad_input import psyche
from tests.tiny import write_config

pytestmark = pytest.mark.slow

HONEST = 6
AUDITS = {"rate": 0.25, "window": 40}


@pytest.mark.parametrize(
    ("first", "second", "size"),
    [
        ("flip", "half", (40, 6)),
        ("noise", "data", (40, 6)),
        ("zero", "tenfold", (40, 6)),
        ("liar", "liar", (40, 6)),
        ("silent", "half", (40, 40)),  # three auditors wait seconds for nothing, so rounds must not be half a second
    ],
)
def test_malicious_processes_are_convicted_and_honest_ones_are_not(
    tmp_path: Path, first: str, second: str, size: tuple[int, int]
) -> None:
    """``size``: number of rounds and inner steps per round."""
    total, steps = size
    rounds = {"total": total, "inner_steps": steps, "start_members": HONEST + 2}
    config = write_config(tmp_path, members=HONEST + 2, rounds=rounds, audits=AUDITS)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for number in range(1, HONEST + 1):
            run.node(f"node-{number}")
        for name, attack in (("first", first), ("second", second)):
            run.node(name, attack, module="tests.slow.adversary.malicious_join")
        for number in range(1, HONEST + 1):
            assert run.join(f"node-{number}") == 0, run.output(f"node-{number}")[-2000:]
        assert run.events("coordinator", RunFinished)
    records = records_of(tmp_path / "run" / "node-1")
    banned = set(records[-1].audit_state.banned)
    malicious = {
        name: Identity.load_or_create(tmp_path / "run" / name / IDENTITY).peer_id for name in ("first", "second")
    }
    assert banned <= set(malicious.values()), "an honest node is convicted"
    unserved = {one.accused for record in records for one in record.audit_state.closed if one.outcome == "unserved"}
    for name, attack in (("first", first), ("second", second)):
        assert malicious[name] in (unserved if attack == "silent" else banned), f"{attack} was not detected"
    manifest = Manifest.decode((tmp_path / "run" / "coordinator" / MANIFEST).read_bytes())
    assert verify_ledger(tmp_path / "run" / "node-1" / NAME, manifest).last == total
    if second != "liar":
        check_that_the_audit_can_be_rerun(tmp_path / "run", malicious["second"])


def check_that_the_audit_can_be_rerun(run: Path, node_id: str) -> None:
    """Check that an honest auditor's evidence and the ledger reproduce the conviction."""
    nodes = [run / f"node-{number}" for number in range(1, HONEST + 1)]
    node, round_number = next(
        (node, round_number)
        for node in nodes
        for name, round_number in EvidenceStore(node / EVIDENCE_DIRECTORY).cases()
        if name == node_id
    )
    assert f"{node_id} {round_number}" in psyche("audit", "rerun", str(node)).stdout
    done = psyche("audit", "rerun", str(node), node_id[-6:], str(round_number), "--cache", str(run.parent / "cache"))
    assert "FAILS" in done.stdout or "That alone fails" in done.stdout, done.stdout + done.stderr


def records_of(node: Path) -> list[Record]:
    with Ledger.read(node / NAME) as ledger:
        return [claimed(entry.certificate).record for entry in ledger.entries()]

"""Runs of real processes, a quarter of which lie: they are found out, nobody else is, and the run goes on."""

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
    ("first", "second", "shape"),
    [
        ("flip", "half", (40, 6)),
        ("noise", "data", (40, 6)),
        ("zero", "tenfold", (40, 6)),
        ("liar", "liar", (40, 6)),
        ("silent", "half", (40, 40)),  # three have to ask in vain, for seconds each: not in rounds of half a second
    ],
)
def test_a_quarter_that_lies_is_found_out(tmp_path: Path, first: str, second: str, shape: tuple[int, int]) -> None:
    """``shape``: how many rounds of how many inner steps."""
    total, steps = shape
    rounds = {"total": total, "inner_steps": steps, "start_members": HONEST + 2}
    config = write_config(tmp_path, members=HONEST + 2, rounds=rounds, audits=AUDITS)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for number in range(1, HONEST + 1):
            run.node(f"node-{number}")
        for name, way in (("first", first), ("second", second)):
            run.node(name, way, module="tests.slow.adversary.wayward")
        for number in range(1, HONEST + 1):
            assert run.join(f"node-{number}") == 0, run.output(f"node-{number}")[-2000:]
        assert run.events("coordinator", RunFinished)
    records = records_of(tmp_path / "run" / "node-1")
    banned = set(records[-1].audit_state.banned)
    liars = {name: Identity.load_or_create(tmp_path / "run" / name / IDENTITY).peer_id for name in ("first", "second")}
    assert banned <= set(liars.values()), "nobody honest is convicted"
    unserved = {one.accused for record in records for one in record.audit_state.closed if one.outcome == "unserved"}
    for name, way in (("first", first), ("second", second)):
        assert liars[name] in (unserved if way == "silent" else banned), f"{way} was not found out"
    manifest = Manifest.decode((tmp_path / "run" / "coordinator" / MANIFEST).read_bytes())
    assert verify_ledger(tmp_path / "run" / "node-1" / NAME, manifest).last == total
    if second != "liar":
        whoever_doubts_it_can_look(tmp_path / "run", liars["second"])


def whoever_doubts_it_can_look(run: Path, liar: str) -> None:
    """Some honest auditors kept what they convicted the liar by; from that and the ledger it fails anywhere."""
    nodes = [run / f"node-{number}" for number in range(1, HONEST + 1)]
    node, round_number = next(
        (node, round_number)
        for node in nodes
        for name, round_number in EvidenceStore(node / EVIDENCE_DIRECTORY).cases()
        if name == liar
    )
    assert f"{liar} {round_number}" in psyche("audit", "rerun", str(node)).stdout
    done = psyche("audit", "rerun", str(node), liar[-6:], str(round_number), "--cache", str(run.parent / "cache"))
    assert "FAILS" in done.stdout or "That alone fails" in done.stdout, done.stdout + done.stderr


def records_of(node: Path) -> list[Record]:
    with Ledger.read(node / NAME) as ledger:
        return [claimed(entry.certificate).record for entry in ledger.entries()]

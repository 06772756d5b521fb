"""Offline audits: saved evidence reproduces a failed audit from files alone; tampered evidence is rejected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from psyche.audit.audit_case import AuditCase, claimed_work
from psyche.audit.evidence_store import MAX_CASES, THETA_PROOF, EvidenceStore
from psyche.audit.offline_audit import OfflineAudit, describe, replay_from_evidence, select_case
from psyche.audit.replay import MismatchCode, required_blobs
from psyche.diloco.audit_bundle import BUNDLE, BlobUnavailable, ThetaProof
from psyche.diloco.replica import LocalUpdate
from psyche.errors import PsycheError
from psyche.numerics.digest import CHUNK, blob_root
from psyche.numerics.outer import OuterState
from psyche.protocol.messages import Plan
from tests.audit.audited import SEED, AuditedRun, Make, at_the_end, train_lazily, train_tampered

NUMBERS = CHUNK // 4


@given(st.sampled_from([1, NUMBERS // 2, NUMBERS - 1, NUMBERS, NUMBERS + 1, 2 * NUMBERS]), st.integers(0, 9))
def test_theta_is_proven_by_the_chunk_hashes_of_the_state(size: int, seed: int) -> None:
    state = OuterState(torch.randn(2, size, generator=torch.Generator().manual_seed(seed)))
    index = state.index()
    base = ThetaProof.of(index, state.buffer)
    assert base.theta_root(index.root) == blob_root(state.theta.numpy().data)
    with pytest.raises(BlobUnavailable):
        base.theta_root(bytes(32))
    with pytest.raises(BlobUnavailable):
        ThetaProof(base.index, base.seam[:-1] + bytes([base.seam[-1] ^ 1])).theta_root(index.root)
    with pytest.raises(BlobUnavailable):
        ThetaProof(base.index[:-1], base.seam).theta_root(index.root)


def saved_case(run: AuditedRun, plan: Plan, work: LocalUpdate) -> AuditCase:
    """Return the audit case, with the auditor's evidence saved under ``evidence``."""
    case, bundle, bundles = (
        AuditCase(plan, run.audited.node, work.contribution, None, SEED, None),
        run.bundle(plan),
        run.audited.trace_recorder.bundles,
    )
    base = run.auditor.trace_recorder.theta_proofs[plan.round - 1]
    assert bundles is not None
    roots = required_blobs(run.auditor.engine, claimed_work(case, bundle, base))
    blobs = {root: bundles.read(plan.round, root, limit) for root, limit in roots.items()}
    EvidenceStore(run.directory / "evidence").save(run.audited.node, plan.round, bundle, blobs, base)
    return case


def rerun(run: AuditedRun, case: AuditCase, only: int | None = None) -> OfflineAudit:
    return replay_from_evidence(run.directory / "evidence", case, run.manifest, run.settings, only=only)


def test_a_cheating_node_fails_again_when_replayed_from_saved_evidence(make: Make) -> None:
    run = make(audits={"trace_steps": 10})
    found = rerun(run, saved_case(run, plan := run.plan(), train_lazily(run.audited, plan, 15)))
    assert found.mismatch is None
    assert [(one.start, one.stop) for one in found.segments] == [(0, 10), (10, 20), (20, 30)]
    assert [one.grade for one in found.segments] == ["pass", "fail", "fail"]
    text = "\n".join(describe(found, run.manifest))
    assert "inner steps 11 to 20" in text
    assert "FAILS" in text


def test_honest_work_passes_and_a_single_segment_can_be_replayed(make: Make) -> None:
    run = make(audits={"trace_steps": 10})
    case = saved_case(run, plan := run.plan(), run.audited.train(plan))
    found = rerun(run, case)
    assert (found.mismatch, {one.grade for one in found.segments}, {one.error for one in found.segments}) == (
        None,
        {"pass"},
        {0},
    )
    assert all(0 < one.noise < 1 for one in found.segments)
    assert rerun(run, case, only=1).segments == found.segments[1:2]
    with pytest.raises(PsycheError, match="the round has 3"):
        rerun(run, case, only=3)


def test_the_report_names_the_commitment_that_does_not_match(make: Make) -> None:
    run = make()
    work = train_tampered(run.audited, plan := run.plan(), at_the_end(lambda one, moved: -moved))
    case = saved_case(run, plan, work)
    lie = replace(work.contribution, payload_root=bytes(32))
    found = rerun(run, AuditCase(plan, case.node, lie, None, SEED, None))
    assert found.mismatch is MismatchCode.PAYLOAD
    assert "the payload does not follow" in "\n".join(describe(found, run.manifest))


@pytest.mark.parametrize("name", [BUNDLE, THETA_PROOF, "?" * 64])
def test_tampered_evidence_is_rejected_as_incomplete(make: Make, name: str) -> None:
    run = make()
    case = saved_case(run, plan := run.plan(), run.audited.train(plan))
    place = run.directory / "evidence" / f"00000001-{run.audited.node}"
    for file in place.glob(name):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(PsycheError, match="is incomplete"):
        rerun(run, case)


def test_only_the_newest_cases_are_kept_whichever_node_they_concern(tmp_path: Path, make: Make) -> None:
    """Disk use is bounded by this node, not by the number of identities that cheat."""
    run = make()
    plan = run.plan()
    run.audited.train(plan)
    evidence = EvidenceStore(tmp_path / "e")
    bundle, base = run.bundle(plan), run.auditor.trace_recorder.theta_proofs[0]
    for round_number in range(1, MAX_CASES + 3):
        evidence.save(f"12D3{round_number}", round_number, bundle, {bytes(32): b"blob"}, base)
    evidence.save(f"12D3{MAX_CASES}", MAX_CASES, bundle, {}, base)
    assert evidence.cases() == [(f"12D3{round_number}", round_number) for round_number in range(3, MAX_CASES + 3)]
    assert select_case(evidence, "…D33", 3) == "12D33"
    with pytest.raises(PsycheError, match="available here: …12D33 round 3"):
        select_case(evidence, "b", 2)
    with pytest.raises(PsycheError, match="available here: none"):
        select_case(EvidenceStore(tmp_path / "none"), "b", 2)


def test_a_case_that_is_only_partly_written_is_discarded(
    tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So are the leftovers of a process that died; a concurrent reader deletes nothing."""
    run = make()
    plan = run.plan()
    run.audited.train(plan)
    folder = tmp_path / "e"
    evidence, bundle, base = EvidenceStore(folder), run.bundle(plan), run.auditor.trace_recorder.theta_proofs[0]
    evidence.save("12D3a", 1, bundle, {}, base)
    written = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if self.name == THETA_PROOF:
            assert EvidenceStore(folder).cases() == [("12D3a", 1)]
            assert list(self.parent.iterdir())
            raise OSError(28, "No space left on device")
        return written(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        evidence.save("12D3a", 2, bundle, {bytes(32): b"blob"}, base)
    monkeypatch.undo()
    assert [path.name for path in folder.iterdir()] == ["00000001-12D3a"]
    evidence.save("12D3a", 2, bundle, {}, base)
    assert evidence.cases() == [("12D3a", 1), ("12D3a", 2)]

"""What an auditor keeps convicts from files alone; and whoever tampers with it is told so."""

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
from tests.audit.audited import SEED, Court, Make, at_the_end, cheat, train_lazily

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


def kept(case: Court, plan: Plan, work: LocalUpdate) -> AuditCase:
    """The case, and in ``evidence`` what an auditor has of it."""
    opened, bundle, bundles = (
        AuditCase(plan, case.accused.node, work.contribution, None, SEED, None),
        case.bundle(plan),
        case.accused.trace_recorder.bundles,
    )
    base = case.auditor.trace_recorder.theta_proofs[plan.round - 1]
    assert bundles is not None
    roots = required_blobs(case.auditor.engine, claimed_work(opened, bundle, base))
    blobs = {root: bundles.read(plan.round, root, limit) for root, limit in roots.items()}
    EvidenceStore(case.directory / "evidence").save(case.accused.node, plan.round, bundle, blobs, base)
    return opened


def again(case: Court, opened: AuditCase, only: int | None = None) -> OfflineAudit:
    return replay_from_evidence(case.directory / "evidence", opened, case.manifest, case.settings, only=only)


def test_a_cheat_fails_once_more_from_files(make: Make) -> None:
    case = make(audits={"trace_steps": 10})
    found = again(case, kept(case, plan := case.plan(), train_lazily(case.accused, plan, 15)))
    assert found.mismatch is None
    assert [(one.start, one.stop) for one in found.segments] == [(0, 10), (10, 20), (20, 30)]
    assert [one.grade for one in found.segments] == ["pass", "fail", "fail"]
    text = "\n".join(describe(found, case.manifest))
    assert "inner steps 11 to 20" in text
    assert "FAILS" in text


def test_honest_work_passes_and_one_segment_is_enough(make: Make) -> None:
    case = make(audits={"trace_steps": 10})
    opened = kept(case, plan := case.plan(), case.accused.train(plan))
    found = again(case, opened)
    assert (found.mismatch, {one.grade for one in found.segments}, {one.error for one in found.segments}) == (
        None,
        {"pass"},
        {0},
    )
    assert all(0 < one.noise < 1 for one in found.segments)
    assert again(case, opened, only=1).segments == found.segments[1:2]
    with pytest.raises(PsycheError, match="the round has 3"):
        again(case, opened, only=3)


def test_what_does_not_agree_to_the_bit_is_named(make: Make) -> None:
    case = make()
    work = cheat(case.accused, plan := case.plan(), at_the_end(lambda one, moved: -moved))
    opened = kept(case, plan, work)
    lie = replace(work.contribution, payload_root=bytes(32))
    found = again(case, AuditCase(plan, opened.node, lie, None, SEED, None))
    assert found.mismatch is MismatchCode.PAYLOAD
    assert "the payload does not follow" in "\n".join(describe(found, case.manifest))


@pytest.mark.parametrize("name", [BUNDLE, THETA_PROOF, "?" * 64])
def test_evidence_that_was_tampered_with_is_none(make: Make, name: str) -> None:
    case = make()
    opened = kept(case, plan := case.plan(), case.accused.train(plan))
    place = case.directory / "evidence" / f"00000001-{case.accused.node}"
    for file in place.glob(name):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    with pytest.raises(PsycheError, match="is incomplete"):
        again(case, opened)


def test_the_newest_cases_are_kept_whoever_they_are_of(tmp_path: Path, make: Make) -> None:
    """A disk is bounded by this node, and not by how many identities somebody has to cheat with."""
    case = make()
    plan = case.plan()
    case.accused.train(plan)
    evidence = EvidenceStore(tmp_path / "e")
    bundle, base = case.bundle(plan), case.auditor.trace_recorder.theta_proofs[0]
    for round_number in range(1, MAX_CASES + 3):
        evidence.save(f"12D3{round_number}", round_number, bundle, {bytes(32): b"blob"}, base)
    evidence.save(f"12D3{MAX_CASES}", MAX_CASES, bundle, {}, base)
    assert evidence.cases() == [(f"12D3{round_number}", round_number) for round_number in range(3, MAX_CASES + 3)]
    assert select_case(evidence, "…D33", 3) == "12D33"
    with pytest.raises(PsycheError, match="available here: …12D33 round 3"):
        select_case(evidence, "b", 2)
    with pytest.raises(PsycheError, match="available here: none"):
        select_case(EvidenceStore(tmp_path / "none"), "b", 2)


def test_what_cannot_be_written_whole_is_not_there(tmp_path: Path, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what a process that died left behind; and who reads meanwhile deletes nothing."""
    case = make()
    plan = case.plan()
    case.accused.train(plan)
    folder = tmp_path / "e"
    evidence, bundle, base = EvidenceStore(folder), case.bundle(plan), case.auditor.trace_recorder.theta_proofs[0]
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

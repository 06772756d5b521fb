"""Audit a contribution from files (``psyche audit rerun``): the ledger has the commitments, the evidence the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path

from psyche.audit.audit_case import AuditCase, claimed_work, first_round_needed, open_case, replay_context_for
from psyche.audit.evidence_store import EvidenceStore
from psyche.audit.replay import Mismatch, MismatchCode, replay_segment, verify_exact
from psyche.audit.replay_error import millionths
from psyche.config import Manifest, Node
from psyche.config.manifest import chain_rules
from psyche.data.provision import local_store, shard_cache, shard_locations
from psyche.diloco.audit_bundle import BlobUnavailable
from psyche.errors import PsycheError
from psyche.ledger.certificate_check import certified_record
from psyche.ledger.store import Ledger
from psyche.numerics.backends.selection import backend_on
from psyche.protocol.audit_messages import Finding
from psyche.protocol.audit_outcome import Grade, grade
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.messages import Certificate
from psyche.protocol.wire import MalformedMessage, decode
from psyche.training.models import build
from psyche.training.torch_engine import TorchEngine


@dataclass(frozen=True)
class SegmentResult:
    """The replay of one segment."""

    start: int
    """First inner step of the round, from 0."""
    stop: int
    """The inner step after the last one."""
    error: float
    """See :attr:`SegmentReplay.error`."""
    noise: float
    """See :attr:`SegmentReplay.noise`."""
    grade: Grade


@dataclass(frozen=True)
class OfflineAudit:
    """The result of an audit from files."""

    node: str
    round: int
    steps: int
    """Inner steps of the contribution."""
    mismatch: MismatchCode | None
    """What does not agree with the commitments; None if everything agrees bit for bit."""
    segments: tuple[SegmentResult, ...]


def case_from_ledger(ledger: Path, manifest: Manifest, node: str, round_number: int) -> AuditCase:
    """Build the case from a ledger file and verify its certificates. Raises :class:`PsycheError`."""
    with Ledger.read(ledger) as file:
        entries = list(takewhile(lambda one: one.round <= round_number, file.entries(first_round_needed(round_number))))
    try:
        records = {one.round: certified_record(manifest, decode(Certificate, one.certificate)) for one in entries}
    except (BadCertificate, MalformedMessage) as error:
        raise PsycheError(
            f"{ledger} holds an invalid certificate: {error}; `psyche ledger verify` names the round"
        ) from None
    case = open_case(node, round_number, records, manifest.run_id, manifest.run.overlap.fragments)
    if case is None:
        raise PsycheError(f"{ledger} has no accepted contribution of …{node[-6:]} in round {round_number}")
    return case


def select_case(evidence: EvidenceStore, suffix: str, round_number: int) -> str:
    """Return the audited node whose PeerID ends in ``suffix``, in ``round_number``. Raises :class:`PsycheError`."""
    cases = evidence.cases()
    found = [node for node, number in cases if number == round_number and node.endswith(suffix.removeprefix("…"))]
    if len(found) != 1:
        available = ", ".join(f"…{node[-6:]} round {number}" for node, number in cases) or "none"
        raise PsycheError(
            f"{len(found)} cases match node {suffix} in round {round_number}; evidence available here: {available}"
        )
    return found[0]


def replay_from_evidence(
    directory: Path,
    case: AuditCase,
    manifest: Manifest,
    settings: Node,
    *,
    only: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> OfflineAudit:
    """Replay ``case`` from the evidence in ``directory``; only segment number ``only`` if it is given.

    Raises :class:`PsycheError` if evidence or training data is missing or does not match the ledger: the evidence may
    come from anyone.
    """
    evidence, run, node, round_number = EvidenceStore(directory), manifest.run, case.node, case.plan.round
    store = local_store(manifest, settings.cache.expanduser(), shard_locations(settings, shard_cache(settings)))
    engine = TorchEngine(build(run.model, seed=run.seed), run.inner, settings, store.index.pad)
    context = replace(replay_context_for(run, engine, backend_on(engine.device), store, case), measure_noise=True)
    blobs = partial(evidence.read, node, round_number)
    try:
        bundle = evidence.bundle(node, round_number)
        if bundle.trace_root != case.contribution.trace_root:  # the bundle carries no signature
            raise BlobUnavailable("the trace points are not those committed to")
        claim = claimed_work(case, bundle, evidence.theta_proof(node, round_number))
        progress("data, payload and error feedback")
        mismatch = None
        try:
            verify_exact(context, claim, blobs)
        except Mismatch as error:
            mismatch = error.code
        spans = list(enumerate(pairwise(point.step for point in claim.points)))
        if only is not None and not 0 <= only < len(spans):
            raise PsycheError(f"there is no segment {only}: the round has {len(spans)}, numbered from 0")
        segments = []
        for number, (start, stop) in spans if only is None else spans[only : only + 1]:
            progress(f"inner steps {start + 1} to {stop}")
            found = replay_segment(context, claim, number, blobs)
            finding = Finding("measured", millionths(found.error), number, 0)
            verdict = grade(finding, chain_rules(manifest).audits)
            segments.append(SegmentResult(start, stop, found.error, found.noise, verdict))
    except BlobUnavailable as error:
        raise PsycheError(f"the evidence in {directory} is incomplete or damaged: {error}") from None
    except Mismatch as error:
        return OfflineAudit(node, round_number, case.contribution.inner_steps, error.code, ())
    return OfflineAudit(node, round_number, case.contribution.inner_steps, mismatch, tuple(segments))


# ----------------------------------------------------------------------------------- for people


def describe(result: OfflineAudit, manifest: Manifest) -> Iterator[str]:
    """Yield the result as lines of text."""
    audits = manifest.run.audits
    yield f"…{result.node[-6:]}, round {result.round}: {result.steps} inner steps"
    yield (
        "exact checks: data, trace points, payload and error feedback match the commitments"
        if result.mismatch is None
        else f"exact checks: {_MISMATCHES[result.mismatch]}; the contribution FAILS"
    )
    for one in result.segments:
        yield (
            f"inner steps {one.start + 1} to {one.stop}: relative error {one.error:.4g}, noise between fp32 and bf16 "
            f"{one.noise:.2g}: {_GRADES[one.grade]}"
        )
    yield f"(passes up to {audits.pass_error:g}, fails from {audits.fail_error:g}, undecided in between)"


_GRADES: dict[Grade, str] = {"pass": "passes", "fail": "FAILS", "unsure": "undecided", "unserved": "unserved"}
_MISMATCHES = {
    MismatchCode.TRACE_ROOT: "the trace points are not those committed to",
    MismatchCode.TOO_MANY_STEPS: "it counts more inner steps than its quota",
    MismatchCode.TRACE_STEPS: "the trace points are not at the steps that the run requires",
    MismatchCode.BASE_PARAMETERS: "training did not start from the round's θ",
    MismatchCode.DATA: "it was trained on other data than assigned",
    MismatchCode.NOT_FINITE: "parameters or error feedback are not finite",
    MismatchCode.PAYLOAD: "the payload does not follow from the parameters",
    MismatchCode.RESIDUAL_IN: "the error feedback is not that of an earlier round",
    MismatchCode.RESIDUAL_OUT: "the error feedback after the round does not follow",
    MismatchCode.VECTOR_SIZE: "a vector has the wrong size for this model",
    MismatchCode.OPTIMIZER: "the optimizer state cannot be decoded",
}

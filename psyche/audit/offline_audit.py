"""``psyche audit rerun``: a contribution done again from files, by anybody: the ledger says what was committed to, the
evidence of an auditor what it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path

from psyche.audit.audit_case import AuditCase, first_needed, open_case
from psyche.audit.evidence_store import Evidence
from psyche.audit.recheck import claim_of, replay_context_for
from psyche.audit.replay import Contradiction, agreement, millionths, segment
from psyche.config import Manifest, Node
from psyche.config.manifest import chain_rules
from psyche.data.provision import local_store, shard_cache, shard_places
from psyche.diloco.audit_bundle import Unserved
from psyche.errors import PsycheError
from psyche.ledger.certificate_check import record_in
from psyche.ledger.store import Ledger
from psyche.numerics.backends.selection import backend_on
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.judgement import Grade, grade
from psyche.protocol.messages import Certificate
from psyche.protocol.verdicts import Finding
from psyche.protocol.wire import decode
from psyche.training.models import build
from psyche.training.torch_engine import TorchEngine


@dataclass(frozen=True)
class Again:
    """What a segment came to."""

    start: int
    stop: int
    """Inner steps of the round."""
    error: float
    noise: float
    """Both as ``audit/replay.py: Segment`` has them."""
    grade: Grade


@dataclass(frozen=True)
class Rerun:
    """What doing a contribution again shows."""

    node: str
    round: int
    steps: int
    fault: str | None
    """What does not agree to the bit; None: all does."""
    segments: tuple[Again, ...]


def case_in(ledger: Path, manifest: Manifest, node: str, round_number: int) -> AuditCase:
    """The contribution as the ledger has it, certificates checked. Raises :class:`PsycheError`."""
    with Ledger.read(ledger) as file:
        entries = list(takewhile(lambda one: one.round <= round_number, file.entries(first_needed(round_number))))
    try:
        records = {one.round: record_in(manifest, decode(Certificate, one.certificate)) for one in entries}
    except (BadCertificate, MalformedMessage) as error:
        raise PsycheError(f"{ledger} proves nothing: {error}; `psyche ledger verify` says where") from None
    case = open_case(node, round_number, records, manifest.run_id, manifest.run.overlap.fragments)
    if case is None:
        raise PsycheError(f"{ledger} has no contribution of …{node[-6:]} to round {round_number}")
    return case


def chosen(evidence: Evidence, end: str, round_number: int) -> str:
    """The node whose name ends so and whose round is here. Raises :class:`PsycheError`."""
    cases = evidence.cases()
    found = [node for node, number in cases if number == round_number and node.endswith(end.removeprefix("…"))]
    if len(found) != 1:
        here = ", ".join(f"round {number} of …{node[-6:]}" for node, number in cases) or "nothing"
        raise PsycheError(f"the evidence here is of {here}: name one of it")
    return found[0]


def rerun(
    directory: Path,
    case: AuditCase,
    manifest: Manifest,
    settings: Node,
    *,
    only: int | None = None,
    told: Callable[[str], None] = lambda text: None,
) -> Rerun:
    """Do ``case`` again, or only its segment number ``only``, from the evidence in ``directory``.

    Raises :class:`PsycheError` where evidence or text is not here or damaged: whoever handed it on may have made it up.
    """
    evidence, run, node, round_number = Evidence(directory), manifest.run, case.node, case.plan.round
    store = local_store(manifest, settings.cache.expanduser(), shard_places(settings, shard_cache(settings)))
    engine = TorchEngine(build(run.model, seed=run.seed), run.inner, settings, store.index.pad)
    replay_context = replace(replay_context_for(run, engine, backend_on(engine.device), store, case), thorough=True)
    blobs = partial(evidence.read, node, round_number)
    try:
        bundle = evidence.bundle(node, round_number)
        if bundle.trace_root != case.given.trace_root:  # no signature says whose they are
            raise Unserved("its trace points are not those committed to")
        claim = claim_of(case, bundle, evidence.base(node, round_number))
        told("data, payload and error feedback")
        fault = None
        try:
            agreement(replay_context, claim, blobs)
        except Contradiction as error:
            fault = str(error)
        spans = list(enumerate(pairwise(point.step for point in claim.points)))
        if only is not None and not 0 <= only < len(spans):
            raise PsycheError(f"there are {len(spans)} segments, numbered from 0")
        segments = []
        for number, (start, stop) in spans if only is None else spans[only : only + 1]:
            told(f"inner steps {start + 1} to {stop}")
            found = segment(replay_context, claim, number, blobs)
            finding = Finding("measured", millionths(found.error), number, 0)
            word = grade(finding, chain_rules(manifest).audits)
            segments.append(Again(start, stop, found.error, found.noise, word))
    except Unserved as error:
        raise PsycheError(f"the evidence in {directory} is not whole: {error}") from None
    except Contradiction as error:
        return Rerun(node, round_number, case.given.inner_steps, str(error), ())
    return Rerun(node, round_number, case.given.inner_steps, fault, tuple(segments))


def in_words(found: Rerun, manifest: Manifest) -> Iterator[str]:
    """Lines for people."""
    audits = manifest.run.audits
    yield f"round {found.round} of …{found.node[-6:]}: {found.steps} inner steps"
    yield (
        "to the bit: data, trace points, payload and error feedback agree"
        if found.fault is None
        else f"to the bit: {found.fault}. That alone fails"
    )
    for one in found.segments:
        yield (
            f"inner steps {one.start + 1} to {one.stop}: off by {one.error:.4g} of what they changed, "
            f"two precisions by {one.noise:.2g}: {_WORDS[one.grade]}"
        )
    yield f"(up to {audits.pass_error:g} passes, from {audits.fail_error:g} on fails, between the two says nothing)"


_WORDS: dict[Grade, str] = {"pass": "passes", "fail": "FAILS", "unsure": "says nothing", "unserved": "is missing"}

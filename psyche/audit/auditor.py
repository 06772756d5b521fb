"""The auditor of a worker: serves what others need to audit this node, and audits the contributions it is drawn for.

While the members of a round train, an auditor replays another node's contribution instead (``protocol/audits.py`` draws
who audits what). The round does not wait for it: the outer step is taken as if the node did nothing. A node that is a
member of the round after all interrupts its audit and starts it again later.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Protocol, TypeVar

from psyche.audit.audit_case import AuditCase, audit, can_audit, claimed_work, first_round_needed, open_case
from psyche.audit.evidence_store import EVIDENCE_DIRECTORY, EvidenceStore
from psyche.audit.replay import ReplayStopped, required_blobs
from psyche.config.manifest import chain_rules
from psyche.data.shard_prefetch import ShardPrefetcher
from psyche.data.token_store import BadShard
from psyche.diloco.audit_bundle import MAX_BUNDLE_BYTES, AuditBundle, AuditBundleStore, BlobUnavailable
from psyche.diloco.outlier_detector import OutlierDetector
from psyche.diloco.replica import Replica
from psyche.errors import PsycheError
from psyche.ledger.chain_sync import ChainFetcher
from psyche.ledger.writer import LedgerWriter
from psyche.network.transport import BadBlob, FetchError, Network, Refused, Unreachable, Violation
from psyche.numerics.aggregate import PayloadSlices
from psyche.protocol.audit_messages import JURY, Audit, AuditStatement, DeclinedAudit, Finding, SealedVerdict, Verdict
from psyche.protocol.audit_outcome import grade
from psyche.protocol.audits import asked
from psyche.protocol.chain import claimed
from psyche.protocol.messages import Record
from psyche.protocol.wire import Body, MalformedMessage, decode
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog

AUDITS_DIRECTORY = "audits"
"""Directory in the node's directory with the audit bundles of its last rounds."""
CALL_SECONDS = 15.0
MAX_FETCHES = 3
"""Attempts to fetch something from an audited node before the finding is ``unserved``."""
RETRY_SECONDS = 2.0
MAX_RECORD_BYTES = 64 << 20
"""Certificates read from this node's ledger for one audit."""
NO_BASE_STATE = "it does not hold the state which that round was trained from"
"""Why a node declines: it joined or restarted since, or has several ranks."""
UNSERVED = Finding("unserved", 0, 0, 0)

Key = tuple[str, int]
"""Audited node and round."""
T = TypeVar("T")


class Client(Protocol):
    """Submits messages to the coordinator. Raises ``Refused``."""

    async def submit(self, body: Body, round_number: int) -> None: ...


class RunInTrainingThread(Protocol):
    """Runs a function on the training thread, between two inner steps."""

    def __call__(self, function: Callable[..., T], *arguments: object) -> Awaitable[T]: ...


class RetryLater(Exception):
    """The audited node did not answer; it is asked again later."""


class NodeConvicted(PsycheError):
    """This node was convicted in its run."""


@dataclass
class AuditAttempt:
    """What this node has done so far for one audit that it is drawn for."""

    starts: int = 0
    """Times it was started. The least often started audit comes first, so that one slow node cannot block the rest."""
    failed_fetches: int = 0
    """Fetches that the audited node did not answer, counted across interruptions."""
    retry_at: float = 0.0
    """Earliest time of the next attempt, by ``monotonic()``: the node may be between two connections."""
    verdict: Verdict | None = None
    declined: bool = False
    """This node cannot do the audit; the next candidate is asked."""


class Auditor:
    """Audits on behalf of one node."""

    def __init__(
        self,
        replica: Replica,
        directory: Path,
        network: Network,
        client: Client,
        ledger: LedgerWriter,
        prefetcher: ShardPrefetcher,
        *,
        do: RunInTrainingThread,
        log: EventLog,
        warn: Callable[[str], None],
    ) -> None:
        """Keep ``replica``'s audit bundles, and evidence against others, in the node's ``directory``."""
        self._replica, self._network, self._client = replica, network, client
        self._ledger, self._prefetcher, self._do, self._log, self._warn = ledger, prefetcher, do, log, warn
        self._bundles = AuditBundleStore(directory / AUDITS_DIRECTORY, warn)
        self._evidence = EvidenceStore(directory / EVIDENCE_DIRECTORY)
        run = replica.run
        self._outliers = (
            OutlierDetector(replica.codec, os.urandom(32), run.overlap.fragments) if run.audits.rate else None
        )
        replica.trace_recorder.bundles = self._bundles
        self._chain_fetcher = ChainFetcher(replica.manifest, network.rpc)
        self._me, self._rules = replica.node, chain_rules(replica.manifest).audits
        self._attempts: defaultdict[Key, AuditAttempt] = defaultdict(AuditAttempt)
        self._served: dict[int, list[tuple[bytes, Callable[[int], bytes]]]] = {}
        """Blobs that are served, by round: their roots and readers."""
        self._working: asyncio.Task[None] | None = None
        self._current: Audit | None = None
        """The audit in progress, or the last one."""
        self._current_round = 0
        """The round in progress."""
        self._submitting: asyncio.Task[None] | None = None
        self._stop = threading.Event()
        """Set to stop the replay in progress; the training thread polls it between two steps."""

    async def serve(self) -> None:
        """Answer requests for this node's audit bundles. Blobs are served only for rounds under audit."""

        async def bundle(peer: str, request: bytes) -> bytes:
            found = await asyncio.to_thread(self._bundles.bundle, int.from_bytes(request, "little"))
            if found is None:
                raise Refused("no audit bundle for that round: only the last round and those under audit are kept")
            return found.encode()

        await self._network.rpc.serve("audit-bundle", bundle, max_request=8)
        self._serve_audited_rounds()

    @property
    def busy(self) -> bool:
        """Whether the engine is replaying another node's work."""
        return self._working is not None and not self._working.done()

    async def follow(self, record: Record) -> None:
        """Take in a certified ``record`` after its outer step: submit verdicts, and drop what no audit needs any more.

        An audit that this node cannot do is declined before the next round is planned, so that it can train in that
        round. Raises :class:`NodeConvicted`.
        """
        for closed in record.audit_state.closed:
            if closed.accused == self._me:
                self._notify(f"audit of this node's round {closed.round} closed: {closed.outcome}")
        for key in self._attempts.keys() - {(one.accused, one.round) for one in record.audit_state.audits}:
            del self._attempts[key]
        self.check()
        self._serve_audited_rounds()
        if self._submitting is not None:
            self._submitting.cancel()
        for one in self._assigned_audits():
            if not (can_audit(self._replica, one.round) and await self._records(range(one.round, one.round + 1))):
                self._mark_declined(one, NO_BASE_STATE)
        for one in record.audit_state.audits:
            if self._attempts[one.accused, one.round].declined and self._me not in one.declined:
                await self._submit(DeclinedAudit(one.accused, one.round))
        self._submitting = asyncio.create_task(self._submit_verdicts(record.audit_state.audits))

    async def _submit_verdicts(self, audits: Sequence[Audit]) -> None:
        """Submit this node's verdicts that are not on record yet. Runs as a task: the coordinator may be away."""
        for one in audits:
            mine = next((opinion for opinion in one.opinions if opinion.auditor == self._me), None)
            verdict = self._attempts[one.accused, one.round].verdict
            if verdict is not None and (mine is None or mine.finding is None):
                sealed = SealedVerdict(one.accused, one.round, verdict.digest)
                await self._submit(sealed if mine is None else verdict)

    async def find_suspects(
        self, record: Record, counts: Sequence[int], payloads: Mapping[str, PayloadSlices], seen: Collection[int]
    ) -> tuple[str, ...]:
        """Return the nodes whose contribution is an outlier and should be audited; see :class:`OutlierDetector`."""
        if self._outliers is None:
            return ()
        found = await asyncio.to_thread(self._outliers.look, record, counts, payloads, seen)
        for node, check in found.items():
            self._notify(f"the contribution of {node[-6:]} to round {record.plan.round} is an outlier: {check}")
        return tuple(found)

    def check(self) -> None:
        """Raise :class:`NodeConvicted` if the chain says that this node is banned."""
        if self._me in self._replica.chain.audit_state.banned:
            raise NodeConvicted(
                "this node was convicted of false work and is banned from this run: `psyche ledger why` shows the "
                "audit. If it is honest, its hardware computes wrongly: run `psyche doctor`, and undo any overclocking"
            )

    def begin(self, round_number: int) -> bool:
        """Start the audits that this node is drawn for, while it is no member of the round. Return whether any run."""
        self._current_round = round_number
        if self.busy:
            self._announce_audit()
        elif self._assigned_audits():
            self._current = None
            self._stop = threading.Event()
            self._working = asyncio.create_task(self._work(self._stop))
        return self.busy

    async def interrupt(self) -> None:
        """Stop the audit in progress. It starts again from its beginning another time."""
        self._stop.set()
        if self._working is not None:
            self._working.cancel()
            (result,) = await asyncio.gather(self._working, return_exceptions=True)
            self._working = None
            if isinstance(result, Exception):
                raise result

    async def close(self) -> None:
        """Stop auditing and submitting."""
        await self.interrupt()
        if self._submitting is not None:
            self._submitting.cancel()
            await asyncio.gather(self._submitting, return_exceptions=True)

    # ------------------------------------------------------------------------------ being audited

    def _serve_audited_rounds(self) -> None:
        """Serve the blobs of rounds under audit. Keep the last round too: an audit of it may still be opened."""
        chain = self._replica.chain
        audited = {audit.round for audit in chain.audit_state.audits if audit.accused == self._me}
        for round_number in [round_number for round_number in self._served if round_number not in audited]:
            for root, read in self._served.pop(round_number):
                self._network.blobs.remove(root, read)
        for round_number in audited - set(self._served):
            self._served[round_number] = []
            for root, load, read in self._bundles.blobs(round_number):
                self._network.blobs.add_unread(root, load, read)
                self._served[round_number].append((root, read))
        self._bundles.forget(chain.rounds, keep=audited)

    # -------------------------------------------------------------------------------------- auditing

    def _assigned_audits(self) -> list[Audit]:
        """Return the open audits that this node is drawn for and has not finished, the least often started first."""
        chain = self._replica.chain
        found = [
            one
            for one in chain.audit_state.audits
            if self._me in asked(one, chain.rounds + 1, self._rules)
            and all(opinion.auditor != self._me for opinion in one.opinions)
            and self._attempts[one.accused, one.round].verdict is None
            and not self._attempts[one.accused, one.round].declined
        ]
        return sorted(found, key=lambda one: self._attempts[one.accused, one.round].starts)

    async def _work(self, stop: threading.Event) -> None:
        """Do the assigned audits in turn, and submit each verdict as soon as it is known."""
        await self._do(self._replica.discard_local_steps)
        remaining = self._assigned_audits()
        while remaining:
            remaining = [one for one in remaining if not await self._attempt_audit(one, stop)]
            if remaining:
                await asyncio.sleep(RETRY_SECONDS / 4)
        self._log.emit(events.PhaseChanged(round=self._current_round, phase="following"))

    async def _attempt_audit(self, assigned: Audit, stop: threading.Event) -> bool:
        """Attempt one audit. Return False if the audited node is to be asked again, True if nothing is left to do."""
        attempt = self._attempts[assigned.accused, assigned.round]
        if monotonic() < attempt.retry_at:
            return False
        attempt.starts += 1
        case = await self._open_case(assigned)
        if isinstance(case, str):
            await self._decline(assigned, case)
            return True
        self._current = assigned
        self._announce_audit()
        try:
            finding = await self._replay_case(case, stop)
        except BadShard:
            await self._decline(assigned, "the training data of that round cannot be fetched")
            return True
        except ReplayStopped:
            return True
        except RetryLater:
            return False
        attempt.verdict = Verdict(assigned.accused, assigned.round, finding, os.urandom(32))
        self._log.emit(
            events.Audited(
                peer=assigned.accused,
                round=assigned.round,
                outcome=finding.outcome,
                error=finding.error / 1e6,
                grade=grade(finding, self._rules),
            )
        )
        await self._submit(SealedVerdict(assigned.accused, assigned.round, attempt.verdict.digest))
        return True

    async def _open_case(self, assigned: Audit) -> AuditCase | str:
        """Build the case from the records, or return why this node cannot audit it.

        All auditors must look back equally far, or one would pass what another fails. If this node's ledger has a gap
        (it joined late, or was away), it fetches those rounds from other members.
        """
        first = first_round_needed(assigned.round)
        records = await self._records(range(first, assigned.round + 1))
        if not can_audit(self._replica, assigned.round) or assigned.round not in records:
            return NO_BASE_STATE
        oldest = assigned.round
        while oldest > first and oldest - 1 in records:
            oldest -= 1
        if oldest > first:
            record = records[assigned.round]
            others = [node for node in record.electorate if node not in (self._me, assigned.accused)]
            older = await self._chain_fetcher.fetch_before(records[oldest], first, others)
            if not older:
                return f"no member has the records of rounds {first} to {oldest - 1}"
            records |= older
        manifest = self._replica.manifest
        fragments, jury = manifest.run.overlap.fragments, assigned.looks == JURY
        case = open_case(assigned.accused, assigned.round, records, manifest.run_id, fragments, jury=jury)
        return NO_BASE_STATE if case is None else case

    async def _records(self, rounds: range) -> dict[int, Record]:
        """Read the records of ``rounds`` that this node's ledger holds; they were verified before they were written."""
        encoded = await self._ledger.held(rounds, MAX_RECORD_BYTES)
        return await asyncio.to_thread(lambda: {one.plan.round: one for one in _decoded(encoded)})

    async def _decline(self, assigned: Audit, reason: str) -> None:
        self._mark_declined(assigned, reason)
        await self._submit(DeclinedAudit(assigned.accused, assigned.round))

    def _mark_declined(self, assigned: Audit, reason: str) -> None:
        self._attempts[assigned.accused, assigned.round].declined = True
        self._notify(
            f"declined to audit {assigned.accused[-6:]}, round {assigned.round}: {reason}; another member is asked"
        )

    async def _replay_case(self, case: AuditCase, stop: threading.Event) -> Finding:
        """Fetch the data and blobs of ``case`` and replay it.

        Raises ``BadShard``, :class:`ReplayStopped` and :class:`RetryLater`.
        """
        await self._prefetcher.wait_ready(case.plan, case.node, stop.is_set)
        try:
            bundle = await self._fetch_bundle(case)
            blobs = await self._fetch_blobs(case, bundle)
        except BlobUnavailable as error:
            self._notify(f"{case.node[-6:]} does not serve its audit data of round {case.plan.round}: {error}")
            return UNSERVED
        read = partial(_fetched_blob, blobs)
        finding = await self._do(partial(audit, stop=stop.is_set), self._replica, case, bundle, read)
        if grade(finding, self._rules) == "fail":
            await asyncio.to_thread(self._save_evidence, case, bundle, blobs)
        return finding

    def _save_evidence(self, case: AuditCase, bundle: AuditBundle, blobs: Mapping[bytes, bytearray]) -> None:
        """Save what a failed audit was based on, so that anyone can repeat it (``offline_audit.py``)."""
        proof = self._replica.trace_recorder.theta_proofs.get(case.plan.round - 1)
        if proof is None:
            return
        try:
            self._evidence.save(case.node, case.plan.round, bundle, blobs, proof)
        except OSError as error:
            self._warn(
                f"cannot save the evidence against {case.node[-6:]}, round {case.plan.round} ({error.strerror}): "
                "free disk space"
            )

    async def _fetch_bundle(self, case: AuditCase) -> AuditBundle:
        async def call() -> AuditBundle:
            request = case.plan.round.to_bytes(8, "little")
            reply = await self._network.rpc.call(
                case.node, "audit-bundle", request, timeout=CALL_SECONDS, max_reply=MAX_BUNDLE_BYTES
            )
            return decode(AuditBundle, reply)

        return await self._fetch_from_accused(case, call)

    async def _fetch_blobs(self, case: AuditCase, bundle: AuditBundle) -> Mapping[bytes, bytearray]:
        def roots() -> Mapping[bytes, int]:  # hashes vectors of the model's size
            claim = claimed_work(case, bundle, self._replica.trace_recorder.theta_proofs[case.plan.round - 1])
            return required_blobs(self._replica.engine, claim)

        found: dict[bytes, bytearray] = {}
        for root, limit in (await asyncio.to_thread(roots)).items():

            async def get(root: bytes = root, limit: int = limit) -> bytearray:
                return await self._network.blobs.fetch_bytes(root, sources=[case.node], max_size=limit)

            found[root] = await self._fetch_from_accused(case, get)
        return found

    async def _fetch_from_accused(self, case: AuditCase, get: Callable[[], Awaitable[T]]) -> T:
        """Call ``get`` and count failures.

        Raises :class:`BlobUnavailable` for a malformed answer or after ``MAX_FETCHES`` failures, else
        :class:`RetryLater`.
        """
        try:
            return await get()
        except (MalformedMessage, BadBlob) as error:
            raise BlobUnavailable(str(error)) from None
        except (FetchError, Unreachable, Refused, Violation) as error:
            attempt = self._attempts[case.node, case.plan.round]
            attempt.failed_fetches += 1
            attempt.retry_at = monotonic() + RETRY_SECONDS
            if attempt.failed_fetches >= MAX_FETCHES:
                raise BlobUnavailable(str(error)) from None
            raise RetryLater from None

    async def _submit(self, body: AuditStatement) -> None:
        with contextlib.suppress(Refused):  # it is on record already, or the audit is closed
            await self._client.submit(body, body.round)

    def _announce_audit(self) -> None:
        if (now := self._current) is not None:
            self._log.emit(events.AuditStarted(peer=now.accused, round=now.round, during=self._current_round))

    def _notify(self, text: str) -> None:
        self._log.emit(events.Notice(level="info", text=text))


def _decoded(encoded: Sequence[bytes]) -> Iterator[Record]:
    for one in encoded:
        with contextlib.suppress(MalformedMessage):  # a damaged row counts as a missing round
            yield claimed(one).record


def _fetched_blob(blobs: Mapping[bytes, bytearray], root: bytes, limit: int) -> bytearray:
    if root not in blobs or len(blobs[root]) > limit:
        raise BlobUnavailable(f"{root.hex()[:8]}")
    return blobs[root]

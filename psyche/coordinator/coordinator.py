"""The coordinator closes rounds. It holds no tensors and no secret but its key, and pushes nothing.

Members submit signed messages and watch the run status; the pure state machine of ``protocol/rounds.py`` decides;
this module checks signatures, keeps time, and turns effects into bytes and events. Of several one leads, and the
others stand by (``succession.py`` says when one begins, ``protocol/takeover.py`` how it goes on).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

from psyche.config import Manifest
from psyche.coordinator.cosigner import Cosigner
from psyche.coordinator.leadership import Leadership
from psyche.coordinator.promises import Promises
from psyche.coordinator.status import StateAttestations, revealed_count, status_of, visible
from psyche.exchange.rules import rules_of
from psyche.ledger.certificate_check import certified_record
from psyche.ledger.writer import LedgerWriter
from psyche.network.identity import BadSignature, Identity, WrongContext, open_envelope
from psyche.network.transport import Network, Refused
from psyche.protocol import round_state as protocol
from psyche.protocol.audit_messages import DeclinedAudit, SealedVerdict, Verdict
from psyche.protocol.audits import statement
from psyche.protocol.certificates import BadCertificate, ConflictingSignature, seals_needed, signatures_needed
from psyche.protocol.messages import (
    SUBMISSIONS,
    Attestation,
    Certificate,
    Commitment,
    Contribution,
    Have,
    Heartbeat,
    Hello,
    Leave,
    Metrics,
    Promise,
    Proposal,
    Reconfiguration,
    Record,
    ReductionReport,
    Seal,
    Vote,
)
from psyche.protocol.proposals import voting_weights
from psyche.protocol.round_state import Phase, State
from psyche.protocol.rounds import tick
from psyche.protocol.wire import (
    MAX_SUBMISSION,
    WATCH_SECONDS,
    Body,
    Envelope,
    MalformedMessage,
    RefusalCode,
    decode,
    decode_envelope,
    encode_envelope,
)
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from psyche.telemetry.metrics import metrics_event

TICK_SECONDS = 0.2
BURST_SECONDS = 0.02
"""How long revealed contributions are collected before a new run status. Every status goes to every member, so one for
each contribution would cost the square of the number of members."""


class Coordinator:
    """Runs the rounds of one manifest until the last one is certified."""

    def __init__(
        self,
        manifest: Manifest,
        identity: Identity,
        network: Network,
        log: EventLog,
        ledger: LedgerWriter,
        directory: Path,
        leads: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``directory`` keeps what this coordinator has signed; it must not be lost before the run ends.

        ``leads`` is called once, when this coordinator begins to lead.
        """
        self.manifest, self.identity, self.network, self.log, self._clock = manifest, identity, network, log, clock
        self.ledger = ledger
        self.rules = rules_of(manifest)
        network.prefer(lambda peer: peer in manifest.resolved.coordinators or peer in voting_weights(self.state))
        self.state = State.initial(self.rules)
        self._promises = Promises(manifest)
        self._cosigner = Cosigner(manifest, identity, network.rpc, directory)
        self._leadership = Leadership(manifest, identity, network.rpc)
        self._first, self._leads = leads, False
        self._signing: asyncio.Task[None] | None = None
        """Collects signatures for what the state machine decided last; it is published when they are complete."""
        self._signed: dict[tuple[int, int], tuple[bytes, ...]] = {}
        """Signatures of reconfigurations in force, by round and number."""
        self._hindrance: protocol.SignatureConflict | protocol.CosignersUnreachable | None = None
        """Why signatures are missing; the state machine receives it in place of its next tick."""
        self._claim = b""
        self._proposal: bytes | None = None
        self._certificate: Certificate | None = None
        self._certified: protocol.Certified | None = None
        self._attestations = StateAttestations()
        self._version = 0
        self._board = b""
        self._changed = asyncio.Condition()
        self._checked = 0
        """Contributions in the published run status."""
        self._later: asyncio.Task[None] | None = None
        """Publishes more of them after ``BURST_SECONDS``."""

    async def run(self) -> None:
        """Serve until the run is finished and its members have left or gone silent."""
        await self._cosigner.serve()
        await self._leadership.serve(self._heartbeat)
        await self.network.rpc.serve("watch", self._watch, max_request=16)
        await self.network.rpc.serve("submit", self._submit, max_request=MAX_SUBMISSION)
        try:
            while await self._leadership.turn(self.log):
                if await self._lead():
                    break
                text = "stopped leading: members follow another coordinator in a later term"
                self.log.emit(events.Notice(level="warning", text=text))
            await self._leadership.ask_all()  # standby coordinators learn that the run has ended
        finally:
            self._leadership.close()
            self._stop_signing()
            if self._later is not None:
                self._later.cancel()
        # The last event: the members' reports of the last round are in, and readers of the log stop here.
        self.log.emit(events.RunFinished(rounds=self.state.rounds, reason="all rounds are done"))

    async def _lead(self) -> bool:
        """Lead to the end of the run (True), or until members follow another coordinator (False).

        The other coordinator may be gone again, and this one's term far above its term; members that promised to
        follow it listen to this coordinator only after it begins to lead anew, in a new term.
        """
        used = 0
        if self._claim:  # it has led before
            used = self.state.term
        else:
            self._first()
        self.state = State.initial(self.rules, await self._cosigner.term(max(self._leadership.later, used)))
        self._leads, self._proposal, self._certificate, self._hindrance = True, None, None, None
        self._claim = self._leadership.claim(self.state.lead_term)
        await self._publish()
        if len(self.manifest.resolved.coordinators) > 1:
            self.log.emit(events.Notice(level="info", text=f"leading, in term {self.state.lead_term}"))
        while self.state.phase is not Phase.FINISHED or self.state.peers:
            hindrance, self._hindrance = self._hindrance, None
            await self._dispatch(hindrance or protocol.Tick())
            self.ledger.check()
            if self._signing is not None and self._signing.done():
                self._signing.result()  # raises, for example if the disk is full
            if self._leadership.later > self.state.term or self._leadership.rival > self.state.lead_term:
                self._leads = False
                self._stop_signing()
                return False
            await asyncio.sleep(TICK_SECONDS)
        return True

    def _heartbeat(self) -> Heartbeat:
        finished = self.state.phase is Phase.FINISHED or self._leadership.finished
        return Heartbeat(self.state.lead_term if self._leads else 0, self.state.term, finished)

    # ---------------------------------------------------------------------------- what members ask

    async def _watch(self, peer: str, request: bytes) -> bytes:
        """Return the run status once its version differs from the caller's. The call shows that the caller is alive."""
        if not self._leads:
            raise Refused("this coordinator does not lead", RefusalCode.NOT_LEADING)
        if peer not in self.state.peers:
            raise Refused("this coordinator does not know the caller", RefusalCode.UNKNOWN_PEER)
        seen = int.from_bytes(request, "little")
        await self._dispatch(protocol.Seen(peer))
        async with self._changed:
            try:
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._changed.wait_for(lambda: self._version != seen)
            except TimeoutError:
                pass
        return self._board

    async def _submit(self, peer: str, request: bytes) -> bytes:
        if not self._leads:
            raise Refused("this coordinator does not lead", RefusalCode.NOT_LEADING)
        try:
            envelope = decode_envelope(request, MAX_SUBMISSION)
            kind = SUBMISSIONS.get(envelope.domain)
            if kind is None:
                raise WrongContext(f"{envelope.domain!r} is not a message that members submit")
            open_envelope(envelope, domain=envelope.domain, run_id=self.manifest.run_id)
            if envelope.author != peer:
                raise BadSignature(f"signed by {envelope.author}, sent by {peer}")
            await self._take(envelope, decode(kind, envelope.body), request)
        except (MalformedMessage, WrongContext, BadSignature, BadCertificate) as error:
            self._refuse(peer, RefusalCode.MALFORMED, str(error))
        return b""

    async def _take(self, envelope: Envelope, body: Body, proof: bytes) -> None:
        node, round_number = envelope.author, envelope.round
        match body:
            case Hello():
                if node in self.state.electorate:
                    self._attestations.add(node, body.rounds, body.state_root, proof)
                await self._receive_hello(node, body)
            case Promise():
                promise = self._promises.check(node, body)
                if promise.accepted is not None and promise.reconfiguration:
                    self._signed[promise.accepted.plan.round, promise.accepted.reconfiguration] = (
                        promise.reconfiguration
                    )
                await self._dispatch(promise)
            case SealedVerdict() | Verdict() | DeclinedAudit():
                await self._dispatch(statement(proof))
            case Leave():
                await self._dispatch(protocol.Left(node, body.reason))
            case Metrics():
                self._report_metrics(node, round_number, body)
            case Commitment():
                await self._dispatch(protocol.Committed(node, round_number, body.term, body.digest, proof))
            case Contribution():
                await self._dispatch(protocol.Revealed(node, round_number, body, proof))
            case Have():
                await self._dispatch(protocol.Fetched(node, round_number, frozenset(body.nodes)))
            case ReductionReport():
                results = {result.group: result.root for result in body.results}
                await self._dispatch(protocol.Reported(node, round_number, body.term, results))
            case Vote():
                await self._dispatch(protocol.Voted(node, round_number, body.term, body.record, proof))
            case Attestation():
                self._attestations.add(node, round_number, body.state_root, proof)
                await self._dispatch(protocol.Attested(node, round_number, body.state_root, frozenset(body.suspects)))
                self.log.emit(events.Attested(round=round_number, peer=node, state_root=body.state_root.hex()))

    async def _receive_hello(self, node: str, body: Hello) -> None:
        self._leadership.observe_claim(body.claim)
        if body.certificate is not None and body.rounds > self.state.rounds:
            record = certified_record(self.manifest, body.certificate)
            await self._dispatch(protocol.Restored(record))
            if self.state.head == record.hash:
                self._certificate = body.certificate
                self.ledger.enter(body.certificate.encode(), record, None)
        if node not in self.state.peers:
            self.log.emit(events.PeerJoined(peer=node, device=body.device, round=self.state.rounds + 1))
        await self._dispatch(protocol.Arrived(node, body.state_root, body.device, body.rounds))

    def _report_metrics(self, node: str, round_number: int, body: Metrics) -> None:
        """Log a member's metrics of the round that is ending or has just ended."""
        if node not in self.state.peers or round_number not in (self.state.rounds, self.state.rounds + 1):
            self._refuse(node, RefusalCode.WRONG_ROUND, f"metrics of round {round_number} are not taken now")
        self.log.emit(metrics_event(node, round_number, body))

    # ------------------------------------------------------------------------ the machine's effects

    async def _dispatch(self, event: protocol.Event) -> None:
        """Apply ``event``; publish if something visible changed. Raises ``Refused`` if the event was rejected."""
        before = self.state
        self.state, effects = tick(self.rules, before, event, self._clock())
        refusals = [effect for effect in effects if isinstance(effect, protocol.Rejected)]
        for effect in effects:
            self._perform(effect)
        if self.state.note not in ("", before.note) and self.state.phase is not Phase.FINISHED:
            self.log.emit(events.Notice(level="info", text=self.state.note))
        if effects or visible(before) != visible(self.state):
            await self._publish()
        elif revealed_count(self.state) != self._checked and self._later is None:
            self._later = asyncio.create_task(self._publish_later())
        for refusal in refusals:
            self._refuse(refusal.node, refusal.code, refusal.reason)

    def _perform(self, effect: protocol.Effect) -> None:
        match effect:
            case protocol.Planned(plan):
                self._proposal = None
                members = tuple(member.node for member in plan.members)
                self.log.emit(
                    events.RoundStarted(round=plan.round, members=members, inner_steps=self.rules.inner_steps)
                )
            case protocol.Abandoned(round_number, reason):
                self.log.emit(events.Notice(level="warning", text=f"round {round_number} starts again: {reason}"))
            case protocol.Proposed(term, record):
                self._proposal = None
                self._sign(self._propose(term, record))
            case protocol.Certified(record, votes):
                assert self._proposal is not None
                self._certified = effect
                self._sign(self._certify(record, self._proposal, votes))
            case protocol.StateAgreed(round_number, state_root):
                self._report_round(round_number, state_root)
            case protocol.Diverged(node, round_number, expected, found):
                self.log.emit(
                    events.Diverged(peer=node, round=round_number, expected=expected.hex(), found=found.hex())
                )
            case protocol.Departed(node, reason):
                self.log.emit(events.PeerLeft(peer=node, reason=reason, round=self.state.rounds + 1))
            case protocol.Finished() | protocol.Rejected():
                pass  # run() ends when the members have left; the sender of what is rejected hears from _dispatch

    # ------------------------------------------------------------------------------ what takes signatures

    def _sign(self, work: Coroutine[None, None, None]) -> None:
        """Start ``work``, which replaces what was to be signed before."""
        self._stop_signing()
        self._signing = asyncio.create_task(work)

    def _stop_signing(self) -> None:
        if self._signing is not None:
            self._signing.cancel()
            self._signing = None

    async def _propose(self, term: int, record: Record) -> None:
        """Publish a proposal once the reconfiguration that it names is in force."""
        plan, count = record.plan, len(self.manifest.resolved.coordinators)
        signed = self._signed.get((plan.round, record.reconfiguration), ()) if record.reconfiguration else ()
        if record.reconfiguration and not signed:
            reconfiguration = Reconfiguration(plan.previous, record.reconfiguration, record.electorate)
            signed = await self._cosigner.gather(
                reconfiguration, plan.round, signatures_needed(count), self._on_missing_signatures(record)
            )
            self._signed = {key: value for key, value in self._signed.items() if key[0] >= plan.round}
            self._signed[plan.round, record.reconfiguration] = signed
        self._proposal = self._seal(Proposal(term, record, signed), plan.round)
        await self._publish()

    async def _certify(self, record: Record, proposal: bytes, votes: tuple[bytes, ...]) -> None:
        """Publish a certificate once enough coordinators have sealed it."""
        seal = Seal(record.plan.previous, record.reconfiguration, record.hash)
        needed = seals_needed(len(self.manifest.resolved.coordinators))
        seals = await self._cosigner.gather(seal, record.plan.round, needed, self._on_missing_signatures(record))
        self._certificate = Certificate(proposal, votes, seals)
        await self._publish()

    def _on_missing_signatures(self, record: Record) -> Callable[[ConflictingSignature | None], None]:
        """Return a callback for missing signatures of ``record``: it warns once, and tells the state machine."""
        told: set[str] = set()

        def report(conflict: ConflictingSignature | None) -> None:
            if conflict is not None:
                sealed = b"" if conflict.reconfiguration else conflict.sealed
                self._hindrance = protocol.SignatureConflict(record.hash, conflict.reconfiguration, sealed)
            else:
                self._hindrance = protocol.CosignersUnreachable(record.hash)
            reason = str(conflict or "too few coordinators answer to sign it")
            if reason not in told:
                told.add(reason)
                text = f"round {record.plan.round} cannot be certified yet: {reason}"
                self.log.emit(events.Notice(level="warning", text=text))

        return report

    def _report_round(self, round_number: int, state_root: bytes) -> None:
        assert self._certified is not None
        assert self._certificate is not None
        record = self._certified.record
        self.ledger.enter(self._certificate.encode(), record, state_root)
        self.log.emit(
            events.RoundCertified(
                round=round_number,
                accepted=tuple(accepted.node for accepted in record.accepted),
                excluded=tuple((excluded.node, excluded.reason) for excluded in record.excluded),
                state_root=state_root.hex(),
                seconds=self._certified.seconds,
            )
        )
        for node in record.dissenters:
            self.log.emit(events.outvoted(node, round_number))
        for audit in record.audit_state.closed:
            self.log.emit(events.AuditEnded(audit.accused, audit.round, audit.outcome, audit.lied))

    def _refuse(self, peer: str, code: RefusalCode, reason: str) -> None:
        if code.is_routine:
            self.log.emit(events.Notice(level="debug", text=f"refused a submission from {peer[-6:]}: {reason}"))
        else:
            self.log.emit(events.Rejected(peer=peer, reason=reason, what="submission", code=code))
        raise Refused(reason, code)

    # ------------------------------------------------------------------------------------ the board

    async def _publish(self) -> None:
        async with self._changed:
            self._version += 1
            self._checked = revealed_count(self.state)
            status = status_of(
                self.state,
                version=self._version,
                claim=self._claim,
                proposal=self._proposal,
                certificate=self._certificate,
                attestations=self._attestations.proof(self.state),
            )
            self._board = self._seal(status, self.state.rounds)
            self._changed.notify_all()

    async def _publish_later(self) -> None:
        await asyncio.sleep(BURST_SECONDS)
        self._later = None
        if revealed_count(self.state) != self._checked:
            await self._publish()

    def _seal(self, body: Body, round_number: int) -> bytes:
        return encode_envelope(self.identity.seal(body.DOMAIN, self.manifest.run_id, round_number, body.encode()))

"""A member's voting state across rounds: the leader it follows, its vote, the last certificate, the reveals."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from psyche.config import Manifest
from psyche.ledger.certificate_check import certified_record
from psyche.ledger.signing_record import Ballot, load_signed, save_signed
from psyche.network.identity import BadSignature, WrongContext, open_envelope
from psyche.protocol.acceptor import Chain, consider, promise
from psyche.protocol.messages import Certificate, Commitment, Contribution, Plan, Promise, Proposal, Record, RunStatus
from psyche.protocol.round_state import Rules
from psyche.protocol.wire import Envelope, MalformedMessage, decode, decode_envelope

BALLOT = "ballot.msgpack"


class Voter:
    """A protocol acceptor with a disk: promises and votes are stored before they are sent."""

    def __init__(self, manifest: Manifest, rules: Rules, directory: Path, certificate: bytes | None) -> None:
        self.manifest, self.rules = manifest, rules
        self.certificate = certificate
        self._path = directory / BALLOT
        self._ballot = load_signed(self._path, manifest.run_id, Ballot())
        self._lock = asyncio.Lock()
        self._checked: tuple[bytes, Record] | None = None
        self._round: tuple[Plan, Reveals] | None = None

    @property
    def term(self) -> int:
        """The term of the leader that this node follows."""
        return self._ballot.acceptor.promised

    def follows(self, plan: Plan) -> Reveals:
        """Note that this node takes part in ``plan``'s round, and return the round's reveals.

        A new leader is told of that round. Further calls with the same plan return the same object.
        """
        if self._round is None or self._round[0] != plan:
            self._round = plan, Reveals(self.manifest.run_id, plan)
        return self._round[1]

    @property
    def claim(self) -> bytes | None:
        """The latest term's claim: a message that its coordinator signed."""
        acceptor = self._ballot.acceptor
        return self._ballot.proposal if acceptor.term > acceptor.promised else self._ballot.claim

    async def promise(self, term: int, claim: bytes, rounds: int) -> Promise:
        """Follow the leader of ``term``, who signed ``claim``. Raises ``Refusal`` if this node follows a later one."""
        async with self._lock:
            await self._keep(replace(self._ballot, acceptor=promise(self._ballot.acceptor, term), claim=claim))
        ballot = self._ballot
        if ballot.round == rounds + 1:  # it comes first: the record may have been certified
            return Promise(term, rounds, ballot.proposal, None, ballot.commitments, ballot.contributions)
        plan, reveals = self._round or (None, None)
        if plan is None or reveals is None or plan.round != rounds + 1:
            return Promise(term, rounds, ballot.proposal, None, (), ())
        return Promise(term, rounds, ballot.proposal, plan, reveals.signed_commitments, reveals.signed_contributions)

    async def vote(
        self,
        proposal: Proposal,
        signed: bytes,
        *,
        chain: Chain,
        reveals: Reveals,
        held: frozenset[str],
        reduced: Mapping[int, bytes],
    ) -> None:
        """Store a vote for ``proposal``; it may be sent once this returns. Raises ``Refusal``."""
        async with self._lock:
            acceptor = consider(
                self._ballot.acceptor,
                proposal,
                rules=self.rules,
                chain=chain,
                committed=reveals.commitments,
                opened=reveals.contributions,
                held=held,
                reduced=reduced,
            )
            shown = reveals.signed_commitments, reveals.signed_contributions
            await self._keep(Ballot(acceptor, self._ballot.claim, proposal.record.plan.round, signed, *shown))

    def record_of(self, certificate: Certificate) -> Record:
        """Verify a certificate, remember it and return its record. Raises ``BadCertificate``."""
        encoded = certificate.encode()
        if self._checked is not None and self._checked[0] == encoded:
            return self._checked[1]  # every status of a round has the same one
        record = certified_record(self.manifest, certificate)
        self._checked = encoded, record
        self.certificate = encoded
        return record

    async def _keep(self, ballot: Ballot) -> None:
        if ballot != self._ballot:
            await asyncio.to_thread(save_signed, self._path, self.manifest.run_id, ballot)
            self._ballot = ballot


class Reveals:
    """The contributions of one round whose commitment and reveal this node has both verified."""

    def __init__(self, run_id: bytes, plan: Plan) -> None:
        self._run_id, self._plan = run_id, plan
        self._seen: set[bytes] = set()
        self.commitments: dict[str, bytes] = {}
        self.contributions: dict[str, Contribution] = {}
        self.signed_commitments: tuple[bytes, ...] = ()
        """Signed envelopes, which a later leader needs to continue the round."""
        self.signed_contributions: tuple[bytes, ...] = ()

    def update(self, status: RunStatus) -> list[str]:
        """Add the valid commitments and contributions of a status. Returns the nodes whose contribution is new."""
        if not self.commitments:  # the first list counts: a commitment added after reveals are visible proves nothing
            for envelope in self._fresh(status.commitments, Commitment.DOMAIN):
                made = decode(Commitment, envelope.body)
                if made.term == self._plan.term:
                    self.commitments.setdefault(envelope.author, made.digest)
            self.signed_commitments = status.commitments
        new = []
        for envelope in self._fresh(status.contributions, Contribution.DOMAIN):
            given, node = decode(Contribution, envelope.body), envelope.author
            if self.commitments.get(node) == given.commitment(node, self._run_id, self._plan.round):
                self.contributions[node] = given
                new.append(node)
        if new:
            self.signed_contributions = status.contributions
        return new

    def _fresh(self, items: Iterable[bytes], domain: str) -> list[Envelope]:
        fresh = []
        for item in items:
            if item in self._seen:
                continue
            self._seen.add(item)
            try:
                envelope = decode_envelope(item)
                open_envelope(envelope, domain=domain, run_id=self._run_id, round_number=self._plan.round)
            except (MalformedMessage, BadSignature, WrongContext):
                continue
            if self._plan.member(envelope.author) is not None:
                fresh.append(envelope)
        return fresh

"""What a member remembers from round to round: whom it follows, how it voted, and the last certificate it has seen."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from psyche.config import Manifest
from psyche.ledger.certificate_check import certified_record
from psyche.ledger.signing_record import Ballot, load_signed, save_signed
from psyche.protocol.acceptor import Chain, consider, promise
from psyche.protocol.messages import Certificate, Plan, Promise, Proposal, Record
from psyche.protocol.round_state import Rules
from psyche.worker.reveals import Reveals

BALLOT = "ballot.msgpack"


class Voter:
    """An acceptor with a disk: what it promises and votes is kept before it is said (DESIGN §6)."""

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
        """Of the leader that this node follows."""
        return self._ballot.acceptor.promised

    def follows(self, plan: Plan) -> Reveals:
        """This node is in the round of ``plan``: a new leader is told so. What will be known of the round's openings,
        the same each time."""
        if self._round is None or self._round[0] != plan:
            self._round = plan, Reveals(self.manifest.run_id, plan)
        return self._round[1]

    @property
    def claim(self) -> bytes | None:
        """Something a coordinator signed in the latest term that this node has taken part in."""
        acceptor = self._ballot.acceptor
        return self._ballot.proposal if acceptor.term > acceptor.promised else self._ballot.claim

    async def promise(self, term: int, claim: bytes, rounds: int) -> Promise:
        """Follow the leader of ``term``, who signed ``claim``. Raises ``Refusal`` where a later one is followed."""
        async with self._lock:
            await self._keep(replace(self._ballot, acceptor=promise(self._ballot.acceptor, term), claim=claim))
        ballot = self._ballot
        if ballot.round == rounds + 1:  # it comes first: the record may have been certified
            return Promise(term, rounds, ballot.proposal, None, ballot.commitments, ballot.contributions)
        plan, openings = self._round or (None, None)
        if plan is None or openings is None or plan.round != rounds + 1:
            return Promise(term, rounds, ballot.proposal, None, (), ())
        return Promise(term, rounds, ballot.proposal, plan, openings.commitments_shown, openings.contributions_shown)

    async def vote(
        self,
        proposal: Proposal,
        signed: bytes,
        *,
        chain: Chain,
        openings: Reveals,
        held: frozenset[str],
        reduced: Mapping[int, bytes],
    ) -> None:
        """Vote for ``proposal``; once this returns it may be said. Raises ``Refusal``."""
        async with self._lock:
            acceptor = consider(
                self._ballot.acceptor,
                proposal,
                rules=self.rules,
                chain=chain,
                opened=openings.contributions,
                held=held,
                reduced=reduced,
            )
            shown = openings.commitments_shown, openings.contributions_shown
            await self._keep(Ballot(acceptor, self._ballot.claim, proposal.record.plan.round, signed, *shown))

    def record_of(self, certificate: Certificate) -> Record:
        """The record that a certificate makes final; remembered. Raises ``BadCertificate``."""
        encoded = certificate.encode()
        if self._checked is not None and self._checked[0] == encoded:
            return self._checked[1]  # every board of a round shows the same one
        record = certified_record(self.manifest, certificate)
        self._checked = encoded, record
        self.certificate = encoded
        return record

    async def _keep(self, ballot: Ballot) -> None:
        if ballot != self._ballot:
            await asyncio.to_thread(save_signed, self._path, self.manifest.run_id, ballot)
            self._ballot = ballot

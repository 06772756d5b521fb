"""The second half of a round, as one member lives it: open, fetch, hold, vote, until the record is final."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from psyche.config import Manifest
from psyche.exchange.gather import BadPayload, Gather
from psyche.network.blobs import FetchError
from psyche.network.identity import BadSignature, WrongContext, open_envelope
from psyche.network.streams import Refused
from psyche.protocol import envelope as envelopes
from psyche.protocol.acceptor import Acceptor, Chain, Refusal, consider
from psyche.protocol.certificates import BadCertificate, check_certificate
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.messages import (
    Board,
    Certificate,
    Contribution,
    Holding,
    Plan,
    Proposal,
    Record,
    Vote,
    decode,
)
from psyche.protocol.state import Phase, Rules
from psyche.roles.board import BoardClient
from psyche.roles.openings import Openings
from psyche.roles.replica import Slices, Work


class Moved(Exception):
    """The run went on without this node; it must look at the board again."""

    def __init__(self, *, accepted: bool = False) -> None:
        super().__init__()
        self.accepted = accepted
        """Whether this node's own work is in the round's record all the same."""


class Voter:
    """What a member remembers from round to round: how it voted, and the certificates it has seen."""

    def __init__(self, manifest: Manifest, rules: Rules, certificates: tuple[bytes, ...]) -> None:
        self.manifest, self.rules = manifest, rules
        self.acceptor = Acceptor()
        self.certificates = list(certificates)
        self._checked: tuple[bytes, Record] | None = None

    def record_of(self, certificate: Certificate) -> Record:
        """The record that a certificate makes final; remembered. Raises ``BadCertificate``."""
        encoded = certificate.encode()
        if self._checked is not None and self._checked[0] == encoded:
            return self._checked[1]  # every board of a round shows the same one
        record = check_certificate(
            certificate,
            run_id=self.manifest.run_id,
            coordinators=self.manifest.resolved.coordinators,
            open_envelope=open_envelope,
        )
        self._checked = encoded, record
        if encoded not in self.certificates[-1:]:
            self.certificates.append(encoded)
        return record

    def proposal_in(self, signed: bytes, round: int) -> Proposal:
        """The proposal that a coordinator signed for ``round``. Raises like ``open_envelope``."""
        envelope = envelopes.decode(signed)
        open_envelope(envelope, domain=Proposal.DOMAIN, run_id=self.manifest.run_id, round=round)
        if envelope.author not in self.manifest.resolved.coordinators:
            raise BadSignature(f"{envelope.author} is no coordinator of this run")
        return decode(Proposal, envelope.body)


class Certification:
    """One round of one node. ``work`` is None for a node that has nothing to hand in and only follows."""

    def __init__(
        self,
        plan: Plan,
        work: Work | None,
        chain: Chain,
        me: str,
        *,
        voter: Voter,
        client: BoardClient,
        gather: Gather,
        warn: Callable[[str], None],
    ) -> None:
        self._plan, self._work, self._chain, self._me = plan, work, chain, me
        self._voter, self._client, self._gather, self._warn = voter, client, gather, warn
        self._openings = Openings(voter.manifest.run_id, plan)
        self._payloads: dict[str, Slices] = {}
        self._fetches: dict[str, asyncio.Task[None]] = {}
        self._failed: set[str] = set()
        self._member = plan.member(me) is not None
        self._told: frozenset[str] = frozenset()
        self._voted = 0

    async def run(self) -> tuple[Record, dict[str, Slices]]:
        """The certified record and the payloads of all it accepted. Raises :class:`Moved`."""
        board = await self._client.until(lambda b: b.phase == Phase.CERTIFYING or b.plan != self._plan)
        try:
            await self._open(board)
            while True:
                record = self._certified(board)
                self._openings.update(board)
                wanted = {a.node: a.contribution for a in record.accepted} if record else self._openings.contributions
                missing = set(wanted) - set(self._payloads)
                if record is not None and not missing:
                    return record, {node: self._payloads[node] for node in wanted}
                if board.plan != self._plan and (record is None or missing & self._failed):
                    # Either the round came to nothing, or a payload it accepted is not to be had any more.
                    raise Moved(accepted=record is not None and self._me in wanted)
                self._fetch(wanted, missing - self._failed)
                if self._member and board.plan == self._plan:
                    await self._hold()
                    await self._vote(board)
                board = await self._next(board)
        finally:
            for task in self._fetches.values():
                task.cancel()

    async def _open(self, board: Board) -> None:
        """Show the contribution that was committed to, and serve its payload."""
        if self._work is None or board.plan != self._plan:
            return
        await self._gather.offer(self._work.payload)
        self._payloads[self._me] = self._work.payload
        with contextlib.suppress(Refused):  # it was not committed to in time; the record will say so
            await self._client.submit(self._work.contribution, self._plan.round)

    def _fetch(self, wanted: dict[str, Contribution], nodes: set[str]) -> None:
        """Start fetching the payloads of ``nodes`` that are not on their way already."""
        members = [member.node for member in self._plan.members]

        async def one(node: str) -> None:
            try:
                self._payloads[node] = await self._gather.collect(node, wanted[node], members)
            except (FetchError, BadPayload) as error:
                self._failed.add(node)
                self._warn(f"the payload of {node[-6:]} is missing: {error}")

        for node in sorted(nodes - set(self._fetches)):
            self._fetches[node] = asyncio.create_task(one(node))

    async def _hold(self) -> None:
        """Say whose payloads are here, whenever there are more."""
        held = frozenset(self._payloads) & frozenset(self._openings.contributions)
        if held != self._told:
            self._told = held
            await self._submit(Holding(tuple(sorted(held))))

    async def _vote(self, board: Board) -> None:
        """Vote for the proposal, once, as soon as every payload it needs is here."""
        if board.proposal is None:
            return
        try:
            proposal = self._voter.proposal_in(board.proposal, self._plan.round)
        except (MalformedMessage, BadSignature, WrongContext) as error:
            self._warn(f"the coordinator shows a proposal that cannot be believed: {error}")
            return
        needed = {accepted.node for accepted in proposal.record.accepted}
        if proposal.term <= self._voted or not needed <= set(self._payloads):
            return
        self._voted = proposal.term
        try:
            self._voter.acceptor = consider(
                self._voter.acceptor,
                proposal,
                rules=self._voter.rules,
                chain=self._chain,
                opened=self._openings.contributions,
                held=frozenset(self._payloads),
            )
        except Refusal as refusal:
            self._warn(f"no vote for the record of round {self._plan.round}: {refusal}")
            return
        await self._submit(Vote(proposal.term, proposal.record.hash))

    async def _next(self, board: Board) -> Board:
        """Wait for another board, or for a fetch to end; the board then."""
        changed = asyncio.create_task(self._client.until(lambda b: b.version != board.version))
        try:
            await asyncio.wait({changed, *self._fetches.values()}, return_when=asyncio.FIRST_COMPLETED)
            for node in [node for node, task in self._fetches.items() if task.done()]:
                self._fetches.pop(node).result()
            if not changed.done():
                return board
            if changed.result().plan == self._plan:
                self._failed.clear()  # others may have by now what could not be had before
            return changed.result()
        finally:
            changed.cancel()

    async def _submit(self, body: Holding | Vote) -> None:
        try:
            await self._client.submit(body, self._plan.round)
        except Refused as refusal:
            self._warn(f"{body.DOMAIN} not taken: {refusal}")

    def _certified(self, board: Board) -> Record | None:
        """The record of this round, once the board shows a certificate of it that holds up."""
        if board.certificate is None or board.rounds > self._plan.round:
            return None
        try:
            record = self._voter.record_of(board.certificate)
        except BadCertificate as error:
            self._warn(f"the coordinator shows a certificate that proves nothing: {error}")
            return None
        return record if record.plan == self._plan else None

"""The second half of a round on one member: reveal, fetch, reduce and vote, until the record is certified."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

from psyche.diloco.replica import LocalUpdate
from psyche.exchange.base import Exchange
from psyche.ledger.certificate_check import verified_proposal
from psyche.network.transport import FetchError, Refused
from psyche.numerics.aggregate import Gradient
from psyche.protocol.acceptor import Chain, Refusal
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.messages import (
    Contribution,
    Have,
    Plan,
    Record,
    ReductionReport,
    ReductionStatus,
    Result,
    RunStatus,
    Vote,
)
from psyche.protocol.round_state import Phase
from psyche.protocol.wire import MalformedMessage
from psyche.worker.coordinator_client import CoordinatorClient
from psyche.worker.voter import Voter


class RoundClosed(Exception):
    """The round closed without this node, which reads the run's status again."""

    def __init__(self, *, accepted: bool = False) -> None:
        super().__init__()
        self.accepted = accepted
        """Whether the round's record accepted this node's contribution all the same."""


class RoundExchange:
    """One round on one node. ``work`` is None for a node that has nothing to submit and only follows the round."""

    def __init__(
        self,
        plan: Plan,
        work: LocalUpdate | None,
        chain: Chain,
        *,
        voter: Voter,
        client: CoordinatorClient,
        exchange: Exchange,
        has_base: Callable[[str, Contribution], bool],
        warn: Callable[[str], None],
    ) -> None:
        """``has_base`` returns whether a contribution proves that it was trained from the base state of ``plan``."""
        self._plan, self._work, self._chain, self._me = plan, work, chain, exchange.me
        self._voter, self._client, self._exchange, self._warn = voter, client, exchange, warn
        self._has_base, self._without_base = has_base, set[str]()
        self._reveals = voter.follows(plan)
        self._tasks: dict[object, asyncio.Task[None]] = {}
        self._failed: set[object] = set()
        self._gradients: dict[bytes, Gradient] = {}
        self._member = plan.member(self._me) is not None
        self._takes_part = self._member or self._me in chain.weights
        """Whether the node votes: a member, or a voter that was not ready when the round was planned."""
        self._told: frozenset[str] = frozenset()
        self._voted = 0

    async def run(self) -> tuple[Record, Gradient]:
        """Return the certified record and its outer gradient. Raises :class:`RoundClosed`."""
        status = await self._client.until(lambda b: b.phase == Phase.CERTIFYING or self._over(b))
        try:
            await self._open(status)
            while True:
                record = self._certified(status)
                self._reveals.update(status)
                if record is not None and record.hash in self._gradients:
                    return record, self._gradients[record.hash]
                if self._over(status) and (record is None or record.hash in self._failed):
                    # Either the round has no record, or its payloads are no longer available.
                    accepted = record is not None and any(one.node == self._me for one in record.accepted)
                    raise RoundClosed(accepted=accepted)
                if record is not None:
                    self._prepare(record)
                elif self._takes_part and status.plan == self._plan:
                    await self._take_part(status)
                status = await self._next(status)
        finally:
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _open(self, status: RunStatus) -> None:
        """Reveal the committed contribution, and serve its payload."""
        if self._work is None or status.plan != self._plan:
            return
        await self._exchange.publish(self._work.payload)
        with contextlib.suppress(Refused):  # committed too late: the record excludes it with that reason
            await self._client.submit(self._work.contribution, self._plan.round)

    async def _take_part(self, status: RunStatus) -> None:
        """Fetch the payloads of revealed contributions, report those held, reduce, and vote."""
        if status.reducing is not None:
            self._exchange.set_reducers(status.reducing)
        for node, given in self._reveals.contributions.items():
            if node not in self._exchange.held and self._based(node, given):
                self._start(node, partial(self._exchange.fetch_payload, node, given))
        held = self._exchange.held & frozenset(self._reveals.contributions)
        if held != self._told and self._member:
            self._told = held
            await self._submit(Have(tuple(sorted(held))))
        if status.reducing is not None:
            self._reduce(status.reducing)
        await self._vote(status)

    def _based(self, node: str, given: Contribution) -> bool:
        """Return whether to fetch a payload: no member accepts one that was trained from another base state."""
        if node not in self._without_base and not self._has_base(node, given):
            self._without_base.add(node)
            self._warn(f"{node[-6:]} does not have the state that round {self._plan.round} starts from: left out")
        return node not in self._without_base

    def _reduce(self, reducing: ReductionStatus) -> None:
        """Start reducing the slices assigned to this node, once all their payloads have arrived."""

        async def reduce() -> None:
            found = await self._exchange.reduce(reducing, self._reveals.contributions)
            await self._submit(
                ReductionReport(reducing.term, tuple(Result(group, found[group]) for group in sorted(found)))
            )

        if self._exchange.groups_due(reducing):
            self._start(("reduce", reducing.term), reduce)

    def _prepare(self, record: Record) -> None:
        """Start fetching what the outer step of ``record`` needs."""

        async def prepare() -> None:
            self._gradients[record.hash] = await self._exchange.outer_gradient(record)

        if record.hash not in self._gradients:
            self._start(record.hash, prepare)

    def _start(self, what: object, get: Callable[[], Awaitable[None]]) -> None:
        """Run ``get`` in the background, unless it is under way or failed since the status changed."""

        async def run() -> None:
            try:
                await get()
            except FetchError as error:
                self._failed.add(what)
                name = f"the payload of {what[-6:]}" if isinstance(what, str) else "data of this round"
                self._warn(f"{name} is missing: {error}")

        if what not in self._tasks and what not in self._failed:
            self._tasks[what] = asyncio.create_task(run())

    async def _vote(self, status: RunStatus) -> None:
        """Vote for the proposal, once, as soon as everything its outer step needs has arrived."""
        if status.proposal is None:
            return
        try:
            proposal = verified_proposal(self._voter.manifest, status.proposal, self._plan.round)
        except (MalformedMessage, BadCertificate) as error:
            self._warn(f"invalid proposal from the coordinator: {error}")
            return
        record = proposal.record
        if proposal.term <= self._voted or record.plan != self._plan or self._me not in record.electorate:
            return
        opened = self._reveals.contributions
        if all(opened.get(one.node) == one.contribution for one in record.accepted):
            self._prepare(record)
            if record.hash not in self._gradients:
                return
        # A contribution that was not committed to is not fetched, and a record with it gets no vote.
        self._voted = proposal.term
        try:
            await self._voter.vote(
                proposal,
                status.proposal,
                chain=self._chain,
                reveals=self._reveals,
                held=self._exchange.held,
                reduced=self._exchange.reduced,
            )
        except Refusal as refusal:
            self._warn(f"no vote for the record of round {self._plan.round}: {refusal}")
            return
        await self._submit(Vote(proposal.term, proposal.record.hash))

    async def _next(self, status: RunStatus) -> RunStatus:
        """Wait for another status or for a task to end. Returns the latest status."""
        changed = asyncio.create_task(self._client.until(lambda b: b.version != status.version))
        try:
            await asyncio.wait({changed, *self._tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
            for what in [what for what, task in self._tasks.items() if task.done()]:
                self._tasks.pop(what).result()
            if not changed.done():
                return status
            if changed.result().plan == self._plan:
                self._failed.clear()  # another member may serve it by now
            return changed.result()
        finally:
            changed.cancel()

    async def _submit(self, body: Have | ReductionReport | Vote) -> None:
        try:
            await self._client.submit(body, self._plan.round)
        except Refused as refusal:
            self._warn(f"the coordinator rejected this node's {body.DOMAIN} message: {refusal}")

    def _certified(self, status: RunStatus) -> Record | None:
        """Return this round's record once the status has a valid certificate of it."""
        if status.certificate is None or status.rounds > self._plan.round:
            return None
        try:
            record = self._voter.record_of(status.certificate)
        except BadCertificate as error:
            self._warn(f"invalid certificate from the coordinator: {error}")
            return None
        # Without a reconfiguration its electorate must be the one this node knows: a certificate alone does not say so.
        known = record.reconfiguration > 0 or record.weights == self._chain.weights
        return record if record.plan == self._plan and known else None

    def _over(self, status: RunStatus) -> bool:
        """Return whether the run continues without this round; during an election this is not known yet."""
        return status.phase != Phase.ELECTING and status.plan != self._plan

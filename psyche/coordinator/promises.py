"""Checks every signature in a member's promise and decodes it for the state machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from psyche.config import Manifest
from psyche.ledger.certificate_check import verified_proposal
from psyche.network.identity import open_envelope
from psyche.protocol.messages import Commitment, Contribution, Plan, Promise
from psyche.protocol.round_state import Promised
from psyche.protocol.wire import MAX_MEMBERS, Body, decode, decode_envelope

MAX_REMEMBERED = 2 * MAX_MEMBERS
"""Signed items of a round: a commitment and a contribution of each member."""
B = TypeVar("B", bound=Body)


class Promises:
    """Checks promises. Members send the same commitments and contributions, so each item is checked only once."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._opened: dict[bytes, tuple[str, Body]] = {}
        """Author and content of signed items of one round, by their bytes."""
        self._round = 0

    def check(self, node: str, body: Promise) -> Promised:
        """``body`` of ``node``. Raises ``BadCertificate``, ``MalformedMessage``, ``BadSignature``, ``WrongContext``."""
        proposal = None if body.accepted is None else verified_proposal(self._manifest, body.accepted)
        plan = body.plan
        if proposal is not None and proposal.record.plan.round == body.rounds + 1:
            plan = proposal.record.plan
        return Promised(
            node=node,
            term=body.term,
            rounds=body.rounds,
            accepted=proposal.record if proposal else None,
            accepted_term=proposal.term if proposal else 0,
            reconfiguration=proposal.reconfiguration if proposal else (),
            plan=body.plan,
            commitments={
                author: (made.digest, item)
                for author, made, item in self._checked(body.commitments, Commitment, plan)
                if plan is not None and made.term == plan.term
            },
            contributions={
                author: (given, item) for author, given, item in self._checked(body.contributions, Contribution, plan)
            },
        )

    def _checked(self, items: tuple[bytes, ...], kind: type[B], plan: Plan | None) -> Iterator[tuple[str, B, bytes]]:
        """Yield what members of ``plan`` signed in its round: author, content, and the signed item."""
        if plan is None:
            return
        if plan.round != self._round or len(self._opened) > MAX_REMEMBERED:
            self._round, self._opened = plan.round, {}
        for item in items:
            if item not in self._opened:
                envelope = decode_envelope(item)
                open_envelope(envelope, domain=kind.DOMAIN, run_id=self._manifest.run_id, round_number=plan.round)
                self._opened[item] = envelope.author, decode(kind, envelope.body)
            author, body = self._opened[item]
            if isinstance(body, kind) and plan.member(author) is not None:
                yield author, body, item

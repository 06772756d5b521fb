"""What a member believes of the others' contributions: only what they signed, and committed to beforehand."""

from __future__ import annotations

from collections.abc import Iterable

from psyche.network.identity import BadSignature, WrongContext, open_envelope
from psyche.protocol.messages import Commitment, Contribution, Plan, RunStatus
from psyche.protocol.wire import Envelope, MalformedMessage, decode, decode_envelope


class Reveals:
    """The contributions of one round whose commitment and opening were both checked here."""

    def __init__(self, run_id: bytes, plan: Plan) -> None:
        self._run_id, self._plan = run_id, plan
        self._seen: set[bytes] = set()
        self._commitments: dict[str, bytes] = {}
        self.contributions: dict[str, Contribution] = {}
        self.commitments_shown: tuple[bytes, ...] = ()
        """Signed, as is each of the next: what a later leader needs to go on with the round."""
        self.contributions_shown: tuple[bytes, ...] = ()

    def update(self, status: RunStatus) -> list[str]:
        """Take in what a board shows; the nodes whose contribution is new. Ignores whatever does not hold up."""
        if not self._commitments:  # shown all at once; what is added when openings can be seen proves nothing
            for envelope in self._fresh(status.commitments, Commitment.DOMAIN):
                made = decode(Commitment, envelope.body)
                if made.term == self._plan.term:
                    self._commitments.setdefault(envelope.author, made.digest)
            self.commitments_shown = status.commitments
        new = []
        for envelope in self._fresh(status.contributions, Contribution.DOMAIN):
            given, node = decode(Contribution, envelope.body), envelope.author
            if self._commitments.get(node) == given.commitment(node, self._run_id, self._plan.round):
                self.contributions[node] = given
                new.append(node)
        if new:
            self.contributions_shown = status.contributions
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

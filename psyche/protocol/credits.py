"""What nodes have earned: a fold over certified records, in integers, that anyone can repeat.

One credit is paid for one token of verified work. Pay is linear in tokens and depends on nothing else about an
identity, so that many names earn no more than one:

- An accepted contribution earns its tokens. One from private data, which nobody can audit, earns the share of them that
  ``protocol/contributions.py`` lets count (:func:`private_credit`).
- An auditor whose finding agrees with the outcome of the audit earns the tokens of the contribution it replayed.
- A contribution that passed its audit earns up to a tenth more (:data:`BONUS`), by how far it alone lowers the held-out
  loss.
- Credit is pending for the window of rounds in which it can be challenged, then final, in the order in which it was
  earned. Credit under audit holds up what was earned after it.
- Nothing becomes final on probation, so an abandoned identity is paid nothing; one that stays loses nothing.
- A node that is convicted, as a cheat or as a lying auditor, forfeits everything pending and earns nothing more.
- A node that does not provide its work to auditors forfeits the credit of that round; so does an outvoted reducer.
- After the last round everything becomes final except what is under audit or belongs to a node on probation. So
  cheating in the last few rounds, too late for an audit, is paid; and an audit that the run did not live to finish
  costs an honest node the credit of that round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from msgspec.structs import replace

from psyche.protocol.audit_messages import Closed
from psyche.protocol.messages import Excluded, Record
from psyche.protocol.round_state import Rules
from psyche.protocol.wire import Message

BONUS = 10
"""A gain adds at most 1/``BONUS`` of a contribution's credit. Loss can be gamed by overfitting the held-out set, so the
bonus must never be worth cheating for."""

Kind = Literal["work", "private", "audit", "gain", "excluded"]
Status = Literal["pending", "final", "forfeited"]


class Change(Message, frozen=True):
    """An amount that was earned, and what became of it."""

    round: int
    """The round of the record that it came with."""
    node: str
    amount: int
    kind: Kind
    reason: str
    """A sentence for the node's owner; an ``ExclusionReason`` for the kind ``excluded``."""
    status: Status
    settled: int
    """The round in which it became final or was forfeited; 0 while it is pending."""
    because: str
    """Why it was forfeited."""


class Work(Message, frozen=True):
    """What an accepted contribution is paid for."""

    node: str
    tokens: int
    private: bool
    payout: bytes


class RoundWork(Message, frozen=True):
    """The part of a record that credits depend on, small enough to pass between processes."""

    round: int
    work: tuple[Work, ...]
    excluded: tuple[Excluded, ...]
    """Members without credit for the round, and why."""
    dissenters: tuple[str, ...]
    newcomers: tuple[str, ...]
    """Nodes that contributed and are still on probation."""
    audits: tuple[tuple[str, int, int], ...]
    """Open ones: accused, round and tokens of the contribution."""
    closed: tuple[Closed, ...]
    banned: tuple[str, ...]


def round_work(record: Record, probation: int) -> RoundWork:
    """Return the part of ``record`` that credits depend on."""
    audit_state = record.audit_state
    return RoundWork(
        record.plan.round,
        tuple(
            Work(one.node, one.contribution.tokens, one.contribution.private, one.contribution.payout)
            for one in record.accepted
        ),
        record.excluded,
        record.dissenters,
        tuple(one.node for one in record.standing if one.rounds < probation and one.last == record.plan.round),
        tuple((one.accused, one.round, one.tokens) for one in audit_state.audits),
        audit_state.closed,
        audit_state.banned,
    )


def private_credit(tokens: int, private: int, total: int, share: Fraction) -> int:
    """Return the credit of a contribution from private data, rounded down.

    It is ``tokens`` times the ratio of the weight that the contribution had to the weight it would have had without the
    cap: ``private`` of the round's ``total`` tokens are private, and have at most ``share`` of the weight together.
    """
    if private <= share * total:
        return tokens
    return share.numerator * total * tokens // (share.denominator * private)


@dataclass
class Account:
    """A node's credit: ``earned`` = ``final`` + ``waiting`` + ``forfeited``."""

    node: str
    earned: int = 0
    final: int = 0
    forfeited: int = 0
    pending: deque[Change] = field(default_factory=deque)
    """Pending credit in the order in which it was earned."""
    private: int = 0
    """Accepted tokens from private data, which were not audited."""
    payout: bytes = b""
    """The payout address of its last accepted contribution that had one; empty if none had."""
    audited: int = 0
    """Audits of its contributions that ended with a finding."""
    passed: int = 0
    """Audits of its contributions that it passed."""
    audits: int = 0
    """Audits of others' contributions that it was paid for."""
    banned: int = 0
    """The round in which it was convicted; 0: never."""
    newcomer: bool = False
    """Whether it is on probation."""

    @property
    def waiting(self) -> int:
        """Return the pending credit."""
        return sum(change.amount for change in self.pending)


class CreditAccounts:
    """The accounts of a run after the records entered so far."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.accounts: dict[str, Account] = {}
        self.round = 0
        """The last round entered."""
        self._open: dict[tuple[str, int], int] = {}
        """Tokens of the contributions under audit, by accused and round."""
        self._audited: dict[str, set[int]] = {}
        """Rounds under audit, by accused."""
        self._gains: deque[tuple[int, int, int]] = deque()
        """Round in which an audit closed, gain and tokens of its contribution, if both are positive."""
        self._settled: list[Change] = []

    def enter(self, done: RoundWork) -> list[Change]:
        """Enter the record of a later round than all before. Return what became final or was forfeited with it."""
        self.round, self._settled = done.round, []
        for one in done.closed:
            self._convict(one)
        for node in done.banned:
            if not self.account(node).banned:
                self._ban(node, "it was convicted in a round that this ledger does not have")
        self._pay_work(done)
        for one in done.closed:
            self._close(one)
        self._open = {(accused, round_number): tokens for accused, round_number, tokens in done.audits}
        self._audited = {}
        for accused, round_number, _ in done.audits:
            self._audited.setdefault(accused, set()).add(round_number)
        newcomers = set(done.newcomers)
        for work in done.work:
            self.account(work.node).newcomer = work.node in newcomers
        for account in self.accounts.values():
            self._mature(account)
        return self._settled

    def account(self, node: str) -> Account:
        """Return the account of ``node``, empty if it has done nothing so far."""
        if node not in self.accounts:
            self.accounts[node] = Account(node)
        return self.accounts[node]

    # -------------------------------------------------------------------------------------- earning

    def _pay_work(self, done: RoundWork) -> None:
        total = sum(one.tokens for one in done.work)
        private = sum(one.tokens for one in done.work if one.private)
        share = Fraction(self._rules.private_share)
        dissenters = set(done.dissenters)
        for one in done.work:
            account = self.account(one.node)
            account.payout = one.payout or account.payout
            amount, reason = one.tokens, "its contribution was accepted"
            if one.private:
                account.private += one.tokens
                amount = private_credit(one.tokens, private, total, share)
                reason = "its contribution from private data was accepted; nobody can audit it"
                if amount < one.tokens:
                    reason += f", and {amount:,} of its {one.tokens:,} tokens count"
            outvoted = "it reported another result than the majority" if one.node in dissenters else ""
            self._earn(account, amount, "private" if one.private else "work", reason, outvoted)
        for other in done.excluded:
            self._settled.append(Change(done.round, other.node, 0, "excluded", other.reason, "final", done.round, ""))

    def _earn(self, account: Account, amount: int, kind: Kind, reason: str, lost: str = "") -> None:
        """Add an amount to ``account``; ``lost`` says why it is forfeited at once."""
        if not amount:
            return
        account.earned += amount
        change = Change(self.round, account.node, amount, kind, reason, "pending", 0, "")
        if account.banned:
            lost = f"it was convicted in round {account.banned:,}"
        if lost:
            self._forfeit(account, change, lost)
        else:
            account.pending.append(change)

    def _close(self, one: Closed) -> None:
        """Settle an audit that ended, except for convictions."""
        accused, tokens = self.account(one.accused), self._open.get((one.accused, one.round), 0)
        accused.audited += one.outcome != "dropped"
        accused.passed += one.outcome == "passed"
        for auditor in one.paid:
            account = self.account(auditor)
            account.audits += 1
            self._earn(account, tokens, "audit", f"it audited {_short(one.accused)}, round {one.round:,}")
        if one.outcome == "passed" and one.gain > 0 and tokens:
            self._gains.append((self.round, one.gain, tokens))
            amount = self._bonus(tokens, one.gain)
            nats = f"{one.gain / 1e6:.6f}"
            self._earn(
                accused, amount, "gain", f"its work of round {one.round:,} lowers the loss by {nats} nats per token"
            )
        if one.outcome == "unserved":
            self._forfeit_where(accused, one.round, "it did not provide its work to auditors")

    def _bonus(self, tokens: int, gain: int) -> int:
        """Return 1/``BONUS`` of ``tokens`` at the median gain and above, and less in proportion below.

        The median is over the audits closed within the last window, weighted by tokens, so that splitting work over
        several names changes nothing. Gains are not taken per token, because they are not linear in the work.
        """
        while self._gains[0][0] <= self.round - self._rules.audits.window:
            self._gains.popleft()
        median = _median([(gain, weight) for _, gain, weight in self._gains])
        return tokens * min(gain, median) // (BONUS * median)

    # -------------------------------------------------------------------------- losing and keeping it

    def _convict(self, one: Closed) -> None:
        if one.outcome == "convicted":
            by = f", by {', '.join(map(_short, one.paid))}" if one.paid else ""
            self._ban(one.accused, f"its work of round {one.round:,} was found to be false{by}")
        for auditor in one.lied:
            self._ban(auditor, f"its verdict on {_short(one.accused)}, round {one.round:,}, contradicts the jury")

    def _ban(self, node: str, because: str) -> None:
        account = self.account(node)
        account.banned = account.banned or self.round
        while account.pending:
            self._forfeit(account, account.pending.popleft(), because)

    def _forfeit(self, account: Account, change: Change, because: str) -> None:
        account.forfeited += change.amount
        self._settled.append(replace(change, status="forfeited", settled=self.round, because=because))

    def _forfeit_where(self, account: Account, round_number: int, because: str) -> None:
        lost = [change for change in account.pending if _is_for(change, round_number)]
        account.pending = deque(change for change in account.pending if not _is_for(change, round_number))
        for change in lost:
            self._forfeit(account, change, because)

    def _mature(self, account: Account) -> None:
        """Make final what can no longer be challenged."""
        if account.newcomer:
            return
        over = self.round >= self._rules.rounds
        audited = self._audited.get(account.node, ())
        held: deque[Change] = deque()
        while account.pending:
            first = account.pending[0]
            if first.round + self._rules.audits.window > self.round and not over:
                break
            challenged = first.round in audited and _is_for(first, first.round)
            if challenged and not over:
                break
            account.pending.popleft()
            if challenged:
                held.append(first)
                continue
            account.final += first.amount
            self._settled.append(replace(first, status="final", settled=self.round))
        account.pending.extendleft(reversed(held))


def _is_for(change: Change, round_number: int) -> bool:
    """Return whether a change pays for the contribution to a round."""
    return change.round == round_number and change.kind in ("work", "private")


def _median(weighted: list[tuple[int, int]]) -> int:
    """Return the weighted median of ``weighted``, which is not empty."""
    half, seen = sum(weight for _, weight in weighted), 0
    for value, weight in sorted(weighted):
        seen += 2 * weight
        if seen > half:
            return value
    raise ValueError("no value has any weight")


def fold(rules: Rules, records: Iterable[Record]) -> CreditAccounts:
    """Return the accounts after ``records``, which ascend by round."""
    books = CreditAccounts(rules)
    for record in records:
        books.enter(round_work(record, rules.probation))
    return books


def _short(node: str) -> str:
    return f"…{node[-6:]}"

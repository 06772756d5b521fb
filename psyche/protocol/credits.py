"""What nodes have earned: a fold over certified records, in integers, that anybody can do again.

One credit is paid for one token of verified work. Pay is linear in tokens, and nothing else about an identity enters
into it, so that who comes under many names earns no more than under one:

- An accepted contribution earns its tokens; one from private data, which nobody can audit, the part of them that
  ``protocol/contributions.py`` lets count (:func:`private_credit`).
- An auditor whose word agrees with how an audit ended earns the tokens of the contribution, for it has done the work.
- A contribution that passed its audit earns up to a tenth more (:data:`BONUS`), by how far it alone lowers the held-out
  loss.
- What is earned is pending for the window of rounds in which it can be challenged, then final. It becomes final in the
  order in which it was earned; what is under audit holds up what came after it.
- On probation nothing becomes final: a name that was thrown away before it was past it is paid nothing. A name that
  stays loses nothing by it.
- Whoever is convicted, or has lied about another as an auditor, forfeits all that is pending, and earns nothing more.
- Whose work was not handed over to its auditors forfeits the credit of that round; a reducer that is outvoted on a
  result, too.
- After the run's last round nobody can be challenged any more: all becomes final but what is under audit or of a node
  on probation. So what is cheated in the last few rounds, too late for an audit, is paid; and an audit that the run did
  not live to see the end of costs an honest node the credit of that round.
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
"""The most that a gain adds to a contribution's credit, as a part of it: a tenth. Loss can be gamed (who has seen the
held-out set overfits it), so it may make good work a little dearer and never be worth cheating for."""

Kind = Literal["work", "private", "audit", "gain", "excluded"]
Status = Literal["pending", "final", "forfeited"]


class Change(Message, frozen=True):
    """A credit that was earned. There is one for each, whatever becomes of it."""

    round: int
    """Whose record it came with."""
    node: str
    amount: int
    kind: Kind
    reason: str
    """In words, for the node's owner; of kind ``excluded``, an ``ExclusionReason``."""
    status: Status
    settled: int
    """Round in which it became final or was forfeited; 0 while it is pending."""
    because: str
    """Why it was forfeited."""


class Work(Message, frozen=True):
    """An accepted contribution, as far as it is paid."""

    node: str
    tokens: int
    private: bool
    payout: bytes


class RoundWork(Message, frozen=True):
    """All of a record that credits depend on; a small part of its bytes, for they cross from process to process."""

    round: int
    work: tuple[Work, ...]
    excluded: tuple[Excluded, ...]
    """Members without credit for the round, and why."""
    dissenters: tuple[str, ...]
    newcomers: tuple[str, ...]
    """Those who contributed and are still on probation."""
    audits: tuple[tuple[str, int, int], ...]
    """Open ones: accused, round and tokens of the contribution."""
    closed: tuple[Closed, ...]
    banned: tuple[str, ...]


def round_work(record: Record, probation: int) -> RoundWork:
    """What is paid, or not, because of ``record``."""
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
    """What a contribution of ``tokens`` from private data earns: tokens · the weight it was given / the weight it would
    have had among contributions that can be audited. Rounded down.

    ``private`` of the round's ``total`` tokens are of its kind, and have at most ``share`` of the weight together: it
    was given share · tokens / private where that is less than tokens / total.
    """
    if private <= share * total:
        return tokens
    return share.numerator * total * tokens // (share.denominator * private)


@dataclass
class Account:
    """A node's credit. ``earned`` is ``final``, ``waiting`` and ``forfeited`` together."""

    node: str
    earned: int = 0
    final: int = 0
    forfeited: int = 0
    pending: deque[Change] = field(default_factory=deque)
    """In the order in which it was earned."""
    private: int = 0
    """Tokens from private data among those that were accepted: unaudited."""
    payout: bytes = b""
    """The last address that came with an accepted contribution; empty: none ever did."""
    audited: int = 0
    """Audits of its contributions that have ended, and"""
    passed: int = 0
    """those among them that it passed."""
    audits: int = 0
    """Of others' contributions, that it was paid for."""
    banned: int = 0
    """Round in which it was convicted; 0: never."""
    newcomer: bool = False
    """On probation."""

    @property
    def waiting(self) -> int:
        """Credit that is pending."""
        return sum(change.amount for change in self.pending)


class CreditAccounts:
    """The accounts of a run, as far as its records were entered."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self.accounts: dict[str, Account] = {}
        self.round = 0
        """The last one entered."""
        self._open: dict[tuple[str, int], int] = {}
        """Tokens of the contributions under audit, by accused and round."""
        self._audited: dict[str, set[int]] = {}
        """Of each accused their rounds."""
        self._gains: deque[tuple[int, int, int]] = deque()
        """Round in which an audit closed, gain and tokens of its contribution, where both were positive."""
        self._settled: list[Change] = []

    def enter(self, done: RoundWork) -> list[Change]:
        """Take in the record of a later round than all before. What became final or was forfeited with it."""
        self.round, self._settled = done.round, []
        for one in done.closed:
            self._convict(one)
        for node in done.banned:
            if not self.account(node).banned:
                self._ban(node, "it was convicted in a round that is not at hand here")
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
        """Of ``node``; an empty one where it has done nothing so far."""
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
            outvoted = "it reported another result than the one believed" if one.node in dissenters else ""
            self._earn(account, amount, "private" if one.private else "work", reason, outvoted)
        for other in done.excluded:
            self._settled.append(Change(done.round, other.node, 0, "excluded", other.reason, "final", done.round, ""))

    def _earn(self, account: Account, amount: int, kind: Kind, reason: str, lost: str = "") -> None:
        """``lost``: why it is forfeited at once."""
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
        """What follows from how an audit ended, but for convictions."""
        accused, tokens = self.account(one.accused), self._open.get((one.accused, one.round), 0)
        accused.audited += one.outcome != "dropped"
        accused.passed += one.outcome == "passed"
        for auditor in one.paid:
            account = self.account(auditor)
            account.audits += 1
            self._earn(
                account, tokens, "audit", f"it did the work of {_short(one.accused)} in round {one.round:,} again"
            )
        if one.outcome == "passed" and one.gain > 0 and tokens:
            self._gains.append((self.round, one.gain, tokens))
            amount = self._bonus(tokens, one.gain)
            nats = f"{one.gain / 1e6:.6f}"
            self._earn(
                accused, amount, "gain", f"its work of round {one.round:,} lowers the loss by {nats} nats a token"
            )
        if one.outcome == "unserved":
            self._forfeit_where(accused, one.round, "it did not hand its work over to be audited")

    def _bonus(self, tokens: int, gain: int) -> int:
        """A :data:`BONUS` th of ``tokens`` at the median gain and above, less in proportion below.

        The median is of the audits closed within the last window, each counted as often as it has tokens: who splits
        work over several names has no more say in it. Gains are not taken for each token: a part of some work gains
        less than the whole, and more than its part of it.
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
            self._ban(
                auditor, f"it said of round {one.round:,} of {_short(one.accused)} the opposite of what was found"
            )

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
        """Make final what nobody can challenge any more."""
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
    """Whether a change pays for the contribution to ``round``."""
    return change.round == round_number and change.kind in ("work", "private")


def _median(weighted: list[tuple[int, int]]) -> int:
    """The least value that, with those below it, has more than half of the weight; ``weighted`` is not empty."""
    half, seen = sum(weight for _, weight in weighted), 0
    for value, weight in sorted(weighted):
        seen += 2 * weight
        if seen > half:
            return value
    raise ValueError("no value has any weight")


def fold(rules: Rules, records: Iterable[Record]) -> CreditAccounts:
    """The books after ``records``, ascending by round."""
    books = CreditAccounts(rules)
    for record in records:
        books.enter(round_work(record, rules.probation))
    return books


def _short(node: str) -> str:
    return f"…{node[-6:]}"

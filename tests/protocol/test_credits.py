"""The payment rules of ``protocol/credits.py``; no credit is created or lost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from psyche.numerics.capped_shares import Cap, exact_capped_shares
from psyche.protocol.audit_messages import Closed, Outcome
from psyche.protocol.credits import BONUS, Change, CreditAccounts, RoundWork, Work, fold, private_credit, round_work
from psyche.protocol.round_state import AuditRules
from tests.chains import NAMES, RULES, chain
from tests.protocol.one_leader import nodes

WINDOW, LAST = 3, 20
TRUST = replace(RULES, rounds=LAST, probation=2, private_share=0.25, audits=AuditRules(window=WINDOW))
A, B, C, D = nodes(4)


def round_with(
    round_number: int,
    *work: tuple[str, int],
    private: tuple[str, ...] = (),
    dissenters: tuple[str, ...] = (),
    newcomers: tuple[str, ...] = (),
    audits: tuple[tuple[str, int, int], ...] = (),
    closed: tuple[Closed, ...] = (),
    banned: tuple[str, ...] = (),
    payout: bytes = b"",
) -> RoundWork:
    done = tuple(Work(node, tokens, node in private, payout) for node, tokens in work)
    return RoundWork(round_number, done, (), dissenters, newcomers, audits, closed, banned)


def closed_audit(
    round_number: int,
    outcome: Outcome,
    *,
    accused: str = A,
    paid: tuple[str, ...] = (),
    lied: tuple[str, ...] = (),
    gain: int = 0,
) -> Closed:
    return Closed(accused, round_number, outcome, paid, lied, gain)


def accounts_after(*done: RoundWork) -> tuple[CreditAccounts, list[Change]]:
    """Return the accounts after ``done``, and the changes that became final or forfeited."""
    accounts = CreditAccounts(TRUST)
    return accounts, [change for one in done for change in accounts.enter(one)]


def test_tokens_are_pending_for_the_window_and_then_final() -> None:
    accounts = CreditAccounts(TRUST)
    accounts.enter(round_with(1, (A, 100)))
    for round_number in range(2, 1 + WINDOW):
        assert accounts.enter(round_with(round_number, (B, 7))) == []
        assert (accounts.account(A).final, accounts.account(A).waiting) == (0, 100)
    (change,) = accounts.enter(round_with(1 + WINDOW, (B, 7)))
    assert (change.node, change.amount, change.round, change.status, change.settled) == (A, 100, 1, "final", 4)
    assert (accounts.account(A).final, accounts.account(A).waiting) == (100, 0)
    assert "accepted" in change.reason


def test_credit_after_an_audited_round_waits_for_the_audit() -> None:
    accounts, settled = accounts_after(
        round_with(1, (A, 100)),
        round_with(2, (A, 50), audits=((A, 1, 100),)),
        round_with(6, (B, 1), audits=((A, 1, 100),)),
    )
    assert settled == []
    accounts.enter(round_with(7, (B, 1), closed=(closed_audit(1, "inconclusive"),)))
    assert (accounts.account(A).final, accounts.account(A).waiting) == (150, 0)


def test_a_conviction_forfeits_all_pending_and_future_credit() -> None:
    accounts, settled = accounts_after(
        round_with(1, (A, 10)),
        round_with(4, (A, 100), (B, 100), audits=((A, 3, 100),)),
        round_with(5, (A, 100), closed=(closed_audit(3, "convicted", paid=(B, C)),), banned=(A,)),
        round_with(6, (A, 100), (B, 1), banned=(A,)),
    )
    account = accounts.account(A)
    assert (account.final, account.waiting, account.forfeited, account.banned) == (10, 0, 300, 5)
    reasons = [change.because for change in settled if change.status == "forfeited"]
    assert "its work of round 3 was found to be false" in reasons[0]
    assert f"…{B[-6:]}, …{C[-6:]}" in reasons[0], "the reason names the auditors"
    assert reasons[1:] == ["it was convicted in round 5"] * 2
    assert accounts.account(B).earned == 100 + 100 + 1, "an auditor is paid the tokens it replays"
    assert accounts.account(C).earned == 100


def test_an_auditor_that_lied_is_treated_like_a_cheating_node() -> None:
    accounts, settled = accounts_after(
        round_with(1, (A, 100), (B, 100), audits=((A, 1, 100),)),
        round_with(2, (B, 100), closed=(closed_audit(1, "passed", paid=(C,), lied=(B,)),), banned=(B,)),
    )
    assert (accounts.account(B).forfeited, accounts.account(B).banned, accounts.account(B).audits) == (200, 2, 0)
    assert "contradicts the jury" in settled[0].because
    assert accounts.account(C).waiting == 100


def test_a_conviction_in_a_gap_of_the_ledger_still_bans() -> None:
    accounts, settled = accounts_after(round_with(1, (A, 100)), round_with(9, (B, 1), banned=(A,)))
    assert (accounts.account(A).forfeited, accounts.account(A).banned) == (100, 9)
    assert "does not have" in settled[0].because


def test_withheld_work_forfeits_only_its_round() -> None:
    accounts, settled = accounts_after(
        round_with(1, (A, 1)),
        round_with(2, (A, 20), audits=((A, 2, 20),)),
        round_with(3, (A, 300), closed=(closed_audit(2, "unserved", paid=(B,)),)),
    )
    assert (accounts.account(A).waiting, accounts.account(A).forfeited) == (301, 20)
    assert "did not provide its work" in settled[0].because


def test_an_outvoted_reducer_earns_nothing_for_the_round() -> None:
    accounts, settled = accounts_after(round_with(1, (A, 5), (B, 5), dissenters=(B,)), round_with(2, (B, 5)))
    assert (accounts.account(B).forfeited, accounts.account(B).waiting) == (5, 5)
    assert "another result" in settled[0].because


def test_nothing_is_final_on_probation() -> None:
    accounts, _ = accounts_after(round_with(1, (A, 5), newcomers=(A,)), round_with(10, (B, 5), newcomers=(A,)))
    assert (accounts.account(A).final, accounts.account(A).waiting, accounts.account(A).newcomer) == (0, 5, True)
    accounts.enter(round_with(11, (A, 5)))
    assert (accounts.account(A).final, accounts.account(A).waiting) == (5, 5)


def test_after_the_last_round_all_credit_is_final_except_of_open_audits_and_new_nodes() -> None:
    accounts, _ = accounts_after(
        round_with(LAST - 1, (A, 5), (C, 7), (D, 7)),
        round_with(LAST, (A, 5), (B, 5), (C, 5), (D, 5), newcomers=(B,), audits=((C, LAST, 5), (D, LAST - 1, 7))),
    )
    found = [(accounts.account(node).final, accounts.account(node).waiting) for node in (A, B, C, D)]
    assert found == [(10, 0), (0, 5), (7, 5), (5, 7)]


def test_the_bonus_grows_with_the_gain_up_to_the_median_and_is_at_most_a_tenth() -> None:
    audits = ((A, 1, 1000), (B, 1, 1000), (C, 1, 1000), (D, 1, 1000))
    accounts, _ = accounts_after(
        round_with(1, audits=audits),
        round_with(
            2,
            closed=tuple(
                closed_audit(1, "passed", accused=node, gain=gain)
                for node, gain in ((A, 100), (B, 900), (C, 200), (D, -50))
            ),
        ),
    )
    # Each closed audit counts for the median of those after it: 100, 900, 200.
    assert [accounts.account(node).earned for node in (A, B, C, D)] == [100, 100, 100, 0]
    accounts.enter(round_with(3, audits=((A, 2, 1000),)))
    accounts.enter(round_with(4, closed=(closed_audit(2, "passed", gain=100),)))
    assert accounts.account(A).earned == 100 + 50, "half the median"
    accounts.enter(round_with(5, audits=((A, 4, 1000),)))
    accounts.enter(round_with(9, closed=(closed_audit(4, "passed", gain=1),)))
    assert accounts.account(A).earned == 250, "audits closed before the window do not count for the median"


def test_other_outcomes_have_no_bonus() -> None:
    for outcome in ("inconclusive", "unserved", "dropped"):
        accounts, _ = accounts_after(
            round_with(1, audits=((A, 1, 1000),)), round_with(2, closed=(closed_audit(1, outcome, gain=9),))
        )
        assert accounts.account(A).earned == 0


def test_the_latest_payout_address_counts() -> None:
    accounts, _ = accounts_after(
        round_with(1, (A, 5), payout=b"a" * 20),
        round_with(2, (A, 5), payout=b"b" * 20),
        round_with(3, (A, 5)),
        round_with(4, (B, 5)),
    )
    assert accounts.account(A).payout == b"b" * 20
    assert accounts.account(B).payout == b""


@given(st.dictionaries(st.sampled_from([A, B, C, D]), st.tuples(st.integers(1, 10**6), st.booleans()), min_size=1))
def test_private_work_is_paid_by_its_capped_weight(given_: dict[str, tuple[int, bool]]) -> None:
    total, private = sum(t for t, _ in given_.values()), sum(t for t, hidden in given_.values() if hidden)
    accounts, _ = accounts_after(
        round_with(1, *((n, t) for n, (t, _) in given_.items()), private=tuple(n for n in given_ if given_[n][1]))
    )
    parts, hidden = {n: t for n, (t, _) in given_.items()}, frozenset(n for n in given_ if given_[n][1])
    weighed = exact_capped_shares(parts, [Cap(hidden, Fraction(TRUST.private_share))])
    for node, tokens in parts.items():
        earned = accounts.account(node).earned
        if node not in hidden:
            assert earned == tokens
        else:
            assert earned == int(tokens * min(Fraction(1), weighed[node] / Fraction(tokens, total)))
            assert earned == private_credit(tokens, private, total, Fraction(TRUST.private_share))


# ----------------------------------------------------------------- no gain from splitting work


SPLIT = nodes(12)


@given(
    rounds=st.lists(
        st.tuples(st.lists(st.integers(1, 10**5), min_size=1, max_size=4), st.integers(0, 10**5)),
        min_size=1,
        max_size=6,
    ),
    private=st.booleans(),
    throwaway=st.booleans(),
)
def test_the_same_work_under_many_identities_earns_no_more(
    rounds: list[tuple[list[int], int]], private: bool, throwaway: bool
) -> None:
    """``rounds``: parts of the work and the tokens of others. ``throwaway``: new identities in each round."""
    whole, parted = CreditAccounts(TRUST), CreditAccounts(TRUST)
    me, other, names = SPLIT[0], SPLIT[1], SPLIT[2:]
    for round_number, (parts, others) in enumerate(rounds, 1):
        mine = [(names[(at + 4 * throwaway * round_number) % len(names)], tokens) for at, tokens in enumerate(parts)]
        rest = [(other, others)] if others else []
        whole.enter(round_with(round_number, (me, sum(parts)), *rest, private=(me,) if private else ()))
        parted.enter(round_with(round_number, *mine, *rest, private=tuple(names) if private else ()))
    for paid in ("earned", "final", "waiting"):
        assert sum(getattr(parted.account(name), paid) for name in names) <= getattr(whole.account(me), paid)


@given(
    parts=st.lists(st.tuples(st.integers(1, 10**5), st.floats(0, 1)), min_size=1, max_size=4),
    gain=st.integers(1, 10**6),
    others=st.lists(st.tuples(st.integers(1, 10**5), st.integers(1, 10**6)), max_size=5),
)
def test_a_bonus_is_bounded_however_work_is_split(
    parts: list[tuple[int, float]], gain: int, others: list[tuple[int, int]]
) -> None:
    """A part of some work gains at most what the whole does. Other nodes' gains are recorded before."""

    def earned(mine: list[tuple[int, int]]) -> int:
        accounts = CreditAccounts(TRUST)
        owners = SPLIT[len(mine) :]
        accounts.enter(round_with(1, audits=tuple((owners[at], 1, tokens) for at, (tokens, _) in enumerate(others))))
        closed = tuple(closed_audit(1, "passed", accused=owners[at], gain=one) for at, (_, one) in enumerate(others))
        accounts.enter(
            round_with(2, audits=tuple((SPLIT[at], 2, tokens) for at, (tokens, _) in enumerate(mine)), closed=closed)
        )
        before = {name: accounts.account(name).earned for name in SPLIT}
        found = tuple(closed_audit(2, "passed", accused=SPLIT[at], gain=one) for at, (_, one) in enumerate(mine))
        accounts.enter(round_with(3, closed=found))
        return sum(accounts.account(name).earned - before[name] for name in SPLIT[: len(mine)])

    total = sum(tokens for tokens, _ in parts)
    assert earned([(tokens, max(1, int(gain * part))) for tokens, part in parts]) <= total // BONUS
    assert earned([(total, gain)]) <= total // BONUS


# ------------------------------------------------------------------------------------ conservation


OUTCOMES: tuple[Outcome, ...] = ("passed", "inconclusive", "convicted", "unserved", "dropped")
NODES = st.sampled_from([A, B, C, D])
CLOSED = st.builds(
    Closed,
    NODES,
    st.integers(1, 8),
    st.sampled_from(OUTCOMES),
    st.sets(NODES, max_size=2).map(lambda found: tuple(sorted(found))),
    st.sets(NODES, max_size=1).map(tuple),
    st.integers(-5, 5),
)
SUBSET = st.sets(NODES, max_size=2).map(lambda found: tuple(sorted(found)))


@given(
    st.lists(
        st.builds(
            lambda work, private, dissenters, newcomers, audits, closed: (
                work, private, dissenters, newcomers, audits, closed,
            ),
            st.dictionaries(NODES, st.integers(1, 1000)),
            SUBSET,
            SUBSET,
            SUBSET,
            st.sets(st.tuples(NODES, st.integers(1, 8), st.integers(1, 1000)), max_size=3).map(tuple),
            st.lists(CLOSED, max_size=2).map(tuple),
        ),
        max_size=LAST,
    )
)  # fmt: skip
def test_every_credit_is_settled_once_and_none_is_created_or_lost(history: list[tuple]) -> None:  # type: ignore[type-arg]
    accounts, settled = CreditAccounts(TRUST), []
    for round_number, (work, private, dissenters, newcomers, audits, closed) in enumerate(history, 1):
        before = {name: one.final for name, one in accounts.accounts.items()}
        settled += accounts.enter(
            round_with(
                round_number,
                *work.items(),
                private=private,
                dissenters=dissenters,
                newcomers=newcomers,
                audits=audits,
                closed=closed,
            )
        )
        assert all(accounts.account(name).final >= final for name, final in before.items()), "final is final"
    by: Counter[tuple[str, str]] = Counter()
    for change in settled:
        assert change.status in ("final", "forfeited")
        assert change.round <= change.settled
        assert bool(change.because) == (change.status == "forfeited")
        by[change.node, change.status] += change.amount
    for name, account in accounts.accounts.items():
        assert all(change.status == "pending" for change in account.pending)
        assert (by[name, "final"], by[name, "forfeited"]) == (account.final, account.forfeited)
        assert account.final + account.waiting + account.forfeited == account.earned
        assert not (account.banned and account.pending), "a convicted node has pending credit"


def test_records_are_paid_in_order() -> None:
    records = [one.record for one in chain(6)]
    accounts = fold(replace(RULES, rounds=6), records)
    each = RULES.inner_steps * RULES.tokens_per_step
    earned = {name: account.earned for name, account in accounts.accounts.items()}
    assert earned == dict.fromkeys(NAMES[:-1], 6 * each) | {NAMES[-1]: 3 * each}
    audited = Counter(one.accused for one in records[-1].audit_state.audits)
    assert {name: account.waiting for name, account in accounts.accounts.items()} == {
        name: each * audited[name] for name in NAMES
    }
    done = round_work(records[0], RULES.probation)
    assert [one.node for one in done.excluded] == [NAMES[-1]]
    (left_out,) = CreditAccounts(RULES).enter(done)
    assert (left_out.amount, left_out.kind, left_out.node) == (0, "excluded", NAMES[-1])

"""What is paid for what: the rules of ``protocol/credits.py``, and that no credit is made or lost."""

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


def deed(
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


def ended(
    round_number: int,
    outcome: Outcome,
    *,
    accused: str = A,
    paid: tuple[str, ...] = (),
    lied: tuple[str, ...] = (),
    gain: int = 0,
) -> Closed:
    return Closed(accused, round_number, outcome, paid, lied, gain)


def books(*done: RoundWork) -> tuple[CreditAccounts, list[Change]]:
    """After ``done``, and all that was settled meanwhile."""
    kept = CreditAccounts(TRUST)
    return kept, [change for one in done for change in kept.enter(one)]


def test_tokens_are_pending_for_the_window_and_then_final() -> None:
    kept = CreditAccounts(TRUST)
    kept.enter(deed(1, (A, 100)))
    for round_number in range(2, 1 + WINDOW):
        assert kept.enter(deed(round_number, (B, 7))) == []
        assert (kept.account(A).final, kept.account(A).waiting) == (0, 100)
    (change,) = kept.enter(deed(1 + WINDOW, (B, 7)))
    assert (change.node, change.amount, change.round, change.status, change.settled) == (A, 100, 1, "final", 4)
    assert (kept.account(A).final, kept.account(A).waiting) == (100, 0)
    assert "accepted" in change.reason


def test_what_is_under_audit_holds_up_what_came_after_it() -> None:
    kept, settled = books(
        deed(1, (A, 100)),
        deed(2, (A, 50), audits=((A, 1, 100),)),
        deed(6, (B, 1), audits=((A, 1, 100),)),
    )
    assert settled == []
    kept.enter(deed(7, (B, 1), closed=(ended(1, "inconclusive"),)))
    assert (kept.account(A).final, kept.account(A).waiting) == (150, 0)


def test_a_conviction_takes_all_that_is_pending_and_all_that_would_come() -> None:
    kept, settled = books(
        deed(1, (A, 10)),
        deed(4, (A, 100), (B, 100), audits=((A, 3, 100),)),
        deed(5, (A, 100), closed=(ended(3, "convicted", paid=(B, C)),), banned=(A,)),
        deed(6, (A, 100), (B, 1), banned=(A,)),
    )
    account = kept.account(A)
    assert (account.final, account.waiting, account.forfeited, account.banned) == (10, 0, 300, 5)
    reasons = [change.because for change in settled if change.status == "forfeited"]
    assert "its work of round 3 was found to be false" in reasons[0]
    assert f"…{B[-6:]}, …{C[-6:]}" in reasons[0], "and by whom"
    assert reasons[1:] == ["it was convicted in round 5"] * 2
    assert kept.account(B).earned == 100 + 100 + 1, "an auditor is paid the tokens of what it did again"
    assert kept.account(C).earned == 100


def test_an_auditor_that_lied_is_treated_like_a_cheat() -> None:
    kept, settled = books(
        deed(1, (A, 100), (B, 100), audits=((A, 1, 100),)),
        deed(2, (B, 100), closed=(ended(1, "passed", paid=(C,), lied=(B,)),), banned=(B,)),
    )
    assert (kept.account(B).forfeited, kept.account(B).banned, kept.account(B).audits) == (200, 2, 0)
    assert "contradicts the jury" in settled[0].because
    assert kept.account(C).waiting == 100


def test_who_was_convicted_where_the_ledger_has_a_gap_is_banned_all_the_same() -> None:
    kept, settled = books(deed(1, (A, 100)), deed(9, (B, 1), banned=(A,)))
    assert (kept.account(A).forfeited, kept.account(A).banned) == (100, 9)
    assert "does not have" in settled[0].because


def test_work_that_is_not_handed_over_forfeits_its_round_only() -> None:
    kept, settled = books(
        deed(1, (A, 1)),
        deed(2, (A, 20), audits=((A, 2, 20),)),
        deed(3, (A, 300), closed=(ended(2, "unserved", paid=(B,)),)),
    )
    assert (kept.account(A).waiting, kept.account(A).forfeited) == (301, 20)
    assert "did not provide its work" in settled[0].because


def test_an_outvoted_reducer_earns_nothing_for_the_round() -> None:
    kept, settled = books(deed(1, (A, 5), (B, 5), dissenters=(B,)), deed(2, (B, 5)))
    assert (kept.account(B).forfeited, kept.account(B).waiting) == (5, 5)
    assert "another result" in settled[0].because


def test_nothing_is_final_on_probation() -> None:
    kept, _ = books(deed(1, (A, 5), newcomers=(A,)), deed(10, (B, 5), newcomers=(A,)))
    assert (kept.account(A).final, kept.account(A).waiting, kept.account(A).newcomer) == (0, 5, True)
    kept.enter(deed(11, (A, 5)))
    assert (kept.account(A).final, kept.account(A).waiting) == (5, 5)


def test_with_the_last_round_all_is_final_but_what_is_under_audit_or_of_a_newcomer() -> None:
    kept, _ = books(
        deed(LAST - 1, (A, 5), (C, 7), (D, 7)),
        deed(LAST, (A, 5), (B, 5), (C, 5), (D, 5), newcomers=(B,), audits=((C, LAST, 5), (D, LAST - 1, 7))),
    )
    found = [(kept.account(node).final, kept.account(node).waiting) for node in (A, B, C, D)]
    assert found == [(10, 0), (0, 5), (7, 5), (5, 7)]


def test_gains_are_paid_in_proportion_up_to_the_median_and_never_over_a_tenth() -> None:
    audits = ((A, 1, 1000), (B, 1, 1000), (C, 1, 1000), (D, 1, 1000))
    kept, _ = books(
        deed(1, audits=audits),
        deed(
            2,
            closed=tuple(
                ended(1, "passed", accused=node, gain=gain) for node, gain in ((A, 100), (B, 900), (C, 200), (D, -50))
            ),
        ),
    )
    # In the order in which they are closed, so that each counts for those after it: the medians are 100, 900, 200.
    assert [kept.account(node).earned for node in (A, B, C, D)] == [100, 100, 100, 0]
    kept.enter(deed(3, audits=((A, 2, 1000),)))
    kept.enter(deed(4, closed=(ended(2, "passed", gain=100),)))
    assert kept.account(A).earned == 100 + 50, "half the median"
    kept.enter(deed(5, audits=((A, 4, 1000),)))
    kept.enter(deed(9, closed=(ended(4, "passed", gain=1),)))
    assert kept.account(A).earned == 250, "what was closed before the window is forgotten"


def test_other_outcomes_have_no_bonus() -> None:
    for outcome in ("inconclusive", "unserved", "dropped"):
        kept, _ = books(deed(1, audits=((A, 1, 1000),)), deed(2, closed=(ended(1, outcome, gain=9),)))
        assert kept.account(A).earned == 0


def test_the_last_address_given_counts() -> None:
    kept, _ = books(
        deed(1, (A, 5), payout=b"a" * 20), deed(2, (A, 5), payout=b"b" * 20), deed(3, (A, 5)), deed(4, (B, 5))
    )
    assert kept.account(A).payout == b"b" * 20
    assert kept.account(B).payout == b""


@given(st.dictionaries(st.sampled_from([A, B, C, D]), st.tuples(st.integers(1, 10**6), st.booleans()), min_size=1))
def test_private_work_is_paid_as_its_weight_is_capped(given_: dict[str, tuple[int, bool]]) -> None:
    total, private = sum(t for t, _ in given_.values()), sum(t for t, hidden in given_.values() if hidden)
    kept, _ = books(
        deed(1, *((n, t) for n, (t, _) in given_.items()), private=tuple(n for n in given_ if given_[n][1]))
    )
    parts, hidden = {n: t for n, (t, _) in given_.items()}, frozenset(n for n in given_ if given_[n][1])
    weighed = exact_capped_shares(parts, [Cap(hidden, Fraction(TRUST.private_share))])
    for node, tokens in parts.items():
        earned = kept.account(node).earned
        if node not in hidden:
            assert earned == tokens
        else:
            assert earned == int(tokens * min(Fraction(1), weighed[node] / Fraction(tokens, total)))
            assert earned == private_credit(tokens, private, total, Fraction(TRUST.private_share))


# ------------------------------------------------------------------------------ nothing by splitting


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
def test_the_same_work_under_many_names_earns_no_more(
    rounds: list[tuple[list[int], int]], private: bool, throwaway: bool
) -> None:
    """Of each round the parts, and what others do. ``throwaway``: new names in each round."""
    whole, parted = CreditAccounts(TRUST), CreditAccounts(TRUST)
    me, other, names = SPLIT[0], SPLIT[1], SPLIT[2:]
    for round_number, (parts, others) in enumerate(rounds, 1):
        mine = [(names[(at + 4 * throwaway * round_number) % len(names)], tokens) for at, tokens in enumerate(parts)]
        rest = [(other, others)] if others else []
        whole.enter(deed(round_number, (me, sum(parts)), *rest, private=(me,) if private else ()))
        parted.enter(deed(round_number, *mine, *rest, private=tuple(names) if private else ()))
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
    """A part of some work gains at most what the whole does. Others' gains are on record before."""

    def earned(mine: list[tuple[int, int]]) -> int:
        kept = CreditAccounts(TRUST)
        owners = SPLIT[len(mine) :]
        kept.enter(deed(1, audits=tuple((owners[at], 1, tokens) for at, (tokens, _) in enumerate(others))))
        closed = tuple(ended(1, "passed", accused=owners[at], gain=one) for at, (_, one) in enumerate(others))
        kept.enter(deed(2, audits=tuple((SPLIT[at], 2, tokens) for at, (tokens, _) in enumerate(mine)), closed=closed))
        before = {name: kept.account(name).earned for name in SPLIT}
        found = tuple(ended(2, "passed", accused=SPLIT[at], gain=one) for at, (_, one) in enumerate(mine))
        kept.enter(deed(3, closed=found))
        return sum(kept.account(name).earned - before[name] for name in SPLIT[: len(mine)])

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
def test_every_credit_has_one_change_and_none_is_made_or_lost(history: list[tuple]) -> None:  # type: ignore[type-arg]
    kept, settled = CreditAccounts(TRUST), []
    for round_number, (work, private, dissenters, newcomers, audits, closed) in enumerate(history, 1):
        before = {name: one.final for name, one in kept.accounts.items()}
        settled += kept.enter(
            deed(
                round_number,
                *work.items(),
                private=private,
                dissenters=dissenters,
                newcomers=newcomers,
                audits=audits,
                closed=closed,
            )
        )
        assert all(kept.account(name).final >= final for name, final in before.items()), "final is final"
    by: Counter[tuple[str, str]] = Counter()
    for change in settled:
        assert change.status in ("final", "forfeited")
        assert change.round <= change.settled
        assert bool(change.because) == (change.status == "forfeited")
        by[change.node, change.status] += change.amount
    for name, account in kept.accounts.items():
        assert all(change.status == "pending" for change in account.pending)
        assert (by[name, "final"], by[name, "forfeited"]) == (account.final, account.forfeited)
        assert account.final + account.waiting + account.forfeited == account.earned
        assert not (account.banned and account.pending), "whoever is convicted has nothing to wait for"


def test_records_are_read_as_they_are_paid() -> None:
    records = [one.record for one in chain(6)]
    kept = fold(replace(RULES, rounds=6), records)
    each = RULES.inner_steps * RULES.tokens_per_step
    earned = {name: account.earned for name, account in kept.accounts.items()}
    assert earned == dict.fromkeys(NAMES[:-1], 6 * each) | {NAMES[-1]: 3 * each}
    audited = Counter(one.accused for one in records[-1].audit_state.audits)
    assert {name: account.waiting for name, account in kept.accounts.items()} == {
        name: each * audited[name] for name in NAMES
    }
    done = round_work(records[0], RULES.probation)
    assert [one.node for one in done.excluded] == [NAMES[-1]]
    (left_out,) = CreditAccounts(RULES).enter(done)
    assert (left_out.amount, left_out.kind, left_out.node) == (0, "excluded", NAMES[-1])

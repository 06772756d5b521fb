"""Audits: who is drawn, who is asked, and that what is on record follows from what was said."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.numerics.digest import digest
from psyche.protocol.audit_messages import JURY, Audit, DeclinedAudit, Finding, Opinion, SealedVerdict
from psyche.protocol.audit_outcome import Ended, decide, unlike
from psyche.protocol.audits import InvalidAudits, asked, busy, statement
from psyche.protocol.messages import Leave
from psyche.protocol.round_state import AuditRules, StatementReceived
from psyche.protocol.wire import MalformedMessage
from tests.protocol.audit_scenarios import FAIL, FALSE, PASS, UNSERVED, UNSURE, Court, said, signed, verdict
from tests.protocol.one_leader import RULES, nodes

ALWAYS = AuditRules(rate=1.0, second=0.0, patience=3, window=20, pass_error=20_000, fail_error=40_000)
EIGHT = nodes(8)


def court(count: int = 8, **changes: object) -> Court:
    return Court(nodes(count), replace(RULES, rounds=10**6, audits=replace(ALWAYS, **changes)))  # type: ignore[arg-type]


def test_what_is_honest_passes_and_its_auditor_is_paid() -> None:
    trial = court()
    trial.play(1, lambda node, audit: PASS)
    assert [audit.accused for audit in trial.audit_state.audits] == EIGHT
    first = trial.audit_state.audits[0]
    trial.play(3, lambda node, audit: PASS)
    ended = [one for one in trial.closed if one.round == 1]
    assert {one.outcome for one in ended} == {"passed"}
    assert ended[0].paid == first.candidates[:1]
    assert ended[0].gain == PASS.gain


def test_a_cheat_is_convicted_by_a_jury_and_takes_no_part_any_more() -> None:
    trial = court()
    trial.play(8, lambda node, audit: FAIL if audit.accused == EIGHT[2] else PASS)
    assert trial.audit_state.banned == (EIGHT[2],)
    convicted = [one for one in trial.closed if one.outcome == "convicted"]
    assert [(one.accused, one.round, len(one.paid)) for one in convicted] == [(EIGHT[2], 1, 7)]
    assert EIGHT[2] not in {audit.accused for audit in trial.audit_state.audits}
    assert {one.outcome for one in trial.closed if one.accused != EIGHT[2]} == {"passed"}


def test_one_verdict_never_convicts() -> None:
    trial = court(2)
    trial.play(30, lambda node, audit: FAIL)
    assert trial.audit_state.banned == ()
    assert {one.outcome for one in trial.closed} == {"inconclusive"}


def test_a_lying_auditor_is_found_out_by_a_jury() -> None:
    liar = EIGHT[0]
    trial = court()
    trial.play(40, lambda node, audit: FAIL if node == liar else PASS)
    assert trial.audit_state.banned == (liar,)
    assert {one.outcome for one in trial.closed if one.accused != liar} == {"passed"}


def test_who_passes_a_cheat_is_found_out_by_a_second_look() -> None:
    cheat, friend = EIGHT[0], EIGHT[1]
    trial = court(second=1.0)
    trial.play(60, lambda node, audit: FAIL if audit.accused == cheat and node != friend else PASS)
    assert cheat in trial.audit_state.banned
    assert set(trial.audit_state.banned) <= {cheat, friend}


def shown(finding: Finding, audit: Audit, *, off: float = 0.0, noise: int = 5_000) -> Finding:
    """``finding`` of somebody who looked, and whose arithmetic is ``off`` from others' by so much."""
    way = [int.from_bytes(digest("way", audit.accused.encode(), bytes([i]))[:2], "little") - 2**15 for i in range(64)]
    odd = [(-1) ** i * round(off * abs(number)) for i, number in enumerate(way)]
    return msgspec.structs.replace(finding, sketch=tuple(map(sum, zip(way, odd, strict=True))), noise=noise)


LAZY = {
    "nothing": PASS,
    "zeros": msgspec.structs.replace(PASS, sketch=(0,) * 64),
    "something": msgspec.structs.replace(PASS, sketch=tuple(range(-32, 32))),
    "unsure of everything": UNSURE,
}


@pytest.mark.parametrize("says", LAZY)
def test_who_passes_unseen_is_found_out_where_all_are_honest(says: str) -> None:
    """By a second look; and where the second was lazy and the first honest as well."""
    lazy = EIGHT[3]
    trial = court(second=0.2)
    trial.play(40, lambda node, audit: LAZY[says] if node == lazy else shown(PASS, audit))
    assert trial.audit_state.banned == (lazy,)
    assert {one.outcome for one in trial.closed if one.accused != lazy} <= {"passed", "inconclusive"}
    assert all(lazy not in one.paid for one in trial.closed if lazy in one.lied)


def test_nobody_knows_when_it_shows_its_verdict_whether_a_second_is_asked() -> None:
    """Else it would wait for a round in which none is."""
    trial = court(second=0.5)
    trial.next([])
    looks = set()
    for _ in range(30):
        shows = [one for one in trial.audit_state.audits if one.looks == 1 and any(o.finding for o in one.opinions)]
        asked_twice = {(one.accused, one.round) for one in trial.audit_state.audits if one.looks == 2}
        looks |= {(one.accused, one.round) in asked_twice for one in shows}
        trial.play(1, lambda node, audit: shown(PASS, audit))
    assert looks == {False}, "what was just shown is still open, and nothing is drawn yet"


def test_other_hardware_is_not_laziness() -> None:
    trial = court(second=1.0)
    trial.play(30, lambda node, audit: shown(PASS, audit, off=0.24 if node in EIGHT[:3] else 0.0))
    assert trial.audit_state.banned == ()
    assert {one.looks for one in trial.audit_state.audits} <= {1, 2}, "no jury is troubled"


def test_where_rounding_is_enlarged_nobody_is_taken_for_lazy() -> None:
    """Whoever did that: an audited node hands over the optimizer that it is audited with."""
    trial = court(second=1.0)
    trial.play(30, lambda node, audit: shown(PASS, audit, off=1.5 if node in EIGHT[:2] else 0.0, noise=300_000))
    assert trial.audit_state.banned == ()
    assert {one.outcome for one in trial.closed} == {"passed"}


def test_three_that_agree_are_too_few_to_call_others_lazy() -> None:
    trial = court(4, second=1.0)
    trial.play(30, lambda node, audit: LAZY["zeros"] if node == EIGHT[0] else shown(PASS, audit))
    assert trial.audit_state.banned == ()


@given(st.lists(st.integers(-(10**9), 10**9), min_size=64, max_size=64), st.floats(0, 0.49))
def test_ways_are_unlike_from_half_of_the_way_on(way: list[int], off: float) -> None:
    one = msgspec.structs.replace(PASS, sketch=tuple(way))
    near = msgspec.structs.replace(PASS, sketch=tuple(number + int(off * number) for number in way))
    signs = msgspec.structs.replace(PASS, sketch=tuple(-number for number in way))
    assert not unlike(one, one)
    assert not unlike(one, near)
    assert unlike(one, signs) == unlike(signs, one) == any(way)
    assert unlike(one, PASS)


def test_between_the_thresholds_nobody_is_punished() -> None:
    trial = court()
    trial.play(30, lambda node, audit: UNSURE)
    assert trial.audit_state.banned == ()
    assert {one.outcome for one in trial.closed} == {"inconclusive"}


def test_who_finds_nothing_clear_may_be_looked_at_as_well() -> None:
    trial, looks = court(second=1.0), set()
    for _ in range(10):
        trial.play(1, lambda node, audit: UNSURE)
        looks |= {audit.looks for audit in trial.audit_state.audits}
    assert looks == {1, 2}


def test_what_is_false_to_the_bit_fails() -> None:
    trial = court()
    trial.play(9, lambda node, audit: FALSE if audit.accused == EIGHT[3] else PASS)
    assert trial.audit_state.banned == (EIGHT[3],)


def test_a_node_that_withholds_its_work_again_and_again_is_convicted() -> None:
    """One that served nobody kept 92 % of the pay."""
    trial = court()
    trial.play(10, lambda node, audit: UNSERVED if audit.accused == EIGHT[3] else PASS)
    outcomes = [one.outcome for one in trial.closed if one.accused == EIGHT[3]]
    assert outcomes[:3] == ["unserved", "unserved", "convicted"]
    assert trial.audit_state.banned == (EIGHT[3],)


def test_a_node_that_serves_in_between_is_not_convicted_for_withholding() -> None:
    trial = court()
    trial.play(20, lambda node, audit: UNSERVED if audit.accused == EIGHT[3] and audit.round % 3 else PASS)
    assert trial.audit_state.banned == ()


def test_a_cheat_that_serves_one_auditor_only_is_convicted() -> None:
    """It never was: one fail beside withheld states was inconclusive."""
    trial, served = court(), {}

    def find(node: str, audit: Audit) -> Finding:
        if audit.accused != EIGHT[3]:
            return PASS
        return FAIL if served.setdefault(audit.round, node) == node else UNSERVED

    trial.play(10, find)
    assert EIGHT[3] in trial.audit_state.banned


def test_one_auditor_that_fails_honest_work_convicts_nobody() -> None:
    trial = court()
    trial.play(20, lambda node, audit: FAIL if node == EIGHT[0] else PASS)
    assert set(trial.audit_state.banned) <= {EIGHT[0]}


def test_names_without_weight_are_outvoted_in_a_jury() -> None:
    """Eight names with a hundredth of the weight each fail the work of an honest node."""
    names = nodes(16)[8:]
    weights = dict.fromkeys(EIGHT, 100) | dict.fromkeys(names, 1)
    jury = tuple(node for node in weights if node != EIGHT[3])[:JURY]
    audit = Audit(EIGHT[3], 1, 40, JURY, 1, jury, tuple(weights[node] for node in jury), ())
    opinions = tuple(Opinion(node, bytes(32), FAIL if node in names else PASS) for node in jury)
    found = decide(
        msgspec.structs.replace(audit, opinions=opinions),
        court().rules.audits,
        fresh=False,
        again=False,
        late=False,
        expired=True,
    )
    assert isinstance(found, Ended)
    assert found.outcome == "passed"
    assert found.lied == set(names) & set(jury)


def test_an_auditor_who_is_silent_is_replaced() -> None:
    trial = court()
    trial.play(12, lambda node, audit: None if node in EIGHT[:2] else PASS)
    assert {one.outcome for one in trial.closed if one.round == 1} == {"passed"}
    assert not [audit for audit in trial.audit_state.audits if audit.round == 1]


def test_a_jury_does_not_wait_for_those_who_are_gone() -> None:
    cheat, gone = EIGHT[2], EIGHT[:2]
    trial = court(window=40)
    trial.play(10, lambda node, audit: None if node in gone else FAIL if audit.accused == cheat else PASS)
    assert cheat in trial.audit_state.banned
    first = next(one for one in trial.closed if one.accused == cheat)
    assert len(first.paid) == 5, "who was in time"


def test_audits_that_nobody_does_end_with_the_window() -> None:
    trial = court(window=5)
    trial.play(8, lambda node, audit: None)
    assert {one.outcome for one in trial.closed} == {"dropped"}
    assert min(audit.round for audit in trial.audit_state.audits) == 8 - 5 + 1


def test_a_verdict_is_shown_only_after_its_digest_is_on_record_and_only_once() -> None:
    trial = court()
    trial.next([])
    audit = trial.audit_state.audits[0]
    node, stranger = audit.candidates[0], audit.candidates[1]
    full, other = verdict(node, audit, PASS), verdict(node, audit, FAIL)
    sealed = SealedVerdict(audit.accused, audit.round, full.digest)
    with pytest.raises(InvalidAudits, match="not the one it sealed"):
        trial.next([said(node, full)])
    with pytest.raises(InvalidAudits, match="was not asked"):
        trial.next([said(stranger, sealed)])
    with pytest.raises(InvalidAudits, match="already sealed"):
        trial.next([said(node, sealed), said(node, sealed)])
    trial.next([said(node, sealed)])
    with pytest.raises(InvalidAudits, match="not the one it sealed"):
        trial.next([said(node, other)])
    trial.next([said(node, full)])
    with pytest.raises(InvalidAudits, match="not the one it sealed"):
        trial.next([said(node, full)])
    trial.next([])
    with pytest.raises(InvalidAudits, match="not open"):
        trial.next([said(node, full)])


def test_a_statement_is_signed_for_the_round_it_speaks_of() -> None:
    sealed = SealedVerdict(EIGHT[0], 3, bytes(32))
    assert statement(signed(EIGHT[1], 3, sealed)).body == sealed
    with pytest.raises(MalformedMessage, match="signed for round 4"):
        statement(signed(EIGHT[1], 4, sealed))
    with pytest.raises(MalformedMessage, match="is not a statement on an audit"):
        statement(signed(EIGHT[1], 4, Leave("bye")))


def test_who_audits_is_busy_until_its_digest_is_on_record() -> None:
    trial = court(3, rate=1.0)
    trial.next([])
    audits = trial.audit_state.audits
    assert busy(trial.audit_state, 2, trial.rules.audits) == {audit.candidates[0] for audit in audits}
    node = audits[0].candidates[0]
    mine = [audit for audit in audits if audit.candidates[0] == node]
    trial.rules = replace(trial.rules, audits=replace(ALWAYS, rate=0.0))
    trial.next([said(node, SealedVerdict(one.accused, one.round, bytes(32))) for one in mine])
    assert node not in busy(trial.audit_state, 3, trial.rules.audits)


def test_private_contributions_are_not_audited_and_their_authors_audit_nobody() -> None:
    trial = court()
    trial.next([], private=EIGHT[:2])
    assert not {audit.accused for audit in trial.audit_state.audits} & set(EIGHT[:2])
    assert not {node for audit in trial.audit_state.audits for node in audit.candidates} & set(EIGHT[:2])


def test_rates() -> None:
    """Within five standard deviations of the binomial."""
    trial = court(rate=0.05, window=10**6, patience=10**6)
    trial.rules = replace(trial.rules, probation=0)
    for _ in range(400):
        trial.audit_state = replace_audits(trial)
        trial.next([])
    found = Counter(audit.accused for audit in trial.opened)
    assert 3200 * 0.05 - 5 * (3200 * 0.05) ** 0.5 < sum(found.values()) < 2 * 3200 * 0.05 + 5 * (3200 * 0.05) ** 0.5


def test_a_contribution_that_stood_out_is_audited_itself_and_once() -> None:
    trial = court(rate=0.05)
    trial.suspects = frozenset(EIGHT[:1])
    trial.next([])
    for _ in range(20):
        trial.silent = frozenset(EIGHT[:1]) if trial.round % 2 else frozenset()
        contributed = EIGHT[0] in {one.node for one in trial.audit_state.pool.given}
        trial.next([])
        earlier = [one for one in trial.opened if (one.accused, one.round) == (EIGHT[0], trial.round - 1)]
        assert len(earlier) == contributed, "whether it takes part in the next round or not"


def test_who_stood_out_and_contributed_nothing_is_not_believed() -> None:
    trial = court(rate=0.05)
    trial.next([], private=EIGHT[:1])
    trial.suspects = frozenset(EIGHT[:1])
    assert trial.next([]).suspects == ()


def replace_audits(trial: Court) -> object:
    """The docket with nothing open."""
    return msgspec.structs.replace(trial.audit_state, audits=())


FINDINGS = st.sampled_from([PASS, FAIL, FALSE, UNSURE, UNSERVED, None])


@settings(deadline=None, max_examples=60)
@given(count=st.integers(8, 14), seed=st.randoms(use_true_random=False), second=st.sampled_from([0.0, 0.3]))
def test_a_quarter_that_conspires_convicts_nobody_who_is_honest(count: int, seed: object, second: float) -> None:
    """Hostile auditors say whatever hurts, each for itself; honest ones what is so."""
    trial = court(count, rate=0.5, second=second)
    hostile = set(trial.nodes[: (count - 1) // 4])

    def says(node: str, audit: Audit) -> Finding | None:
        if node not in hostile:
            return FAIL if audit.accused in hostile else PASS
        return seed.choice([FAIL, FAIL, FALSE, UNSERVED])  # type: ignore[attr-defined,no-any-return]

    trial.play(40, says)
    assert set(trial.audit_state.banned) <= hostile


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_whatever_auditors_say_a_docket_stays_in_bounds(data: st.DataObject) -> None:
    trial = court(data.draw(st.integers(1, 6)), rate=data.draw(st.sampled_from([0.3, 1.0])), window=6, patience=2)
    trial.play(15, lambda node, audit: data.draw(FINDINGS))
    assert all(trial.round - audit.round < 6 for audit in trial.audit_state.audits)
    assert all(set(asked(a, trial.round, trial.rules.audits)) <= set(a.candidates) for a in trial.audit_state.audits)
    assert all(one.accused not in one.paid for one in trial.closed)
    assert all(one.outcome != "convicted" or len(one.paid) >= 2 for one in trial.closed)


def test_the_next_candidate_is_asked_as_soon_as_one_declines() -> None:
    trial = court(rate=1.0)
    trial.next([])
    trial.rules = replace(trial.rules, audits=replace(ALWAYS, rate=0.0, patience=100))
    audit = trial.audit_state.audits[0]
    first, second = audit.candidates[:2]
    decline = said(first, DeclinedAudit(audit.accused, audit.round))
    mine = [one for one in trial.audit_state.audits if one.candidates[0] == first and one != audit]
    others = [said(first, DeclinedAudit(one.accused, one.round)) for one in mine]
    assert first not in busy(trial.audit_state, 2, trial.rules.audits, [decline, *others]), "pending counts"
    assert first in busy(trial.audit_state, 2, trial.rules.audits, others) | busy(
        trial.audit_state, 2, trial.rules.audits, []
    )
    trial.next([decline, *others])
    after = next(one for one in trial.audit_state.audits if (one.accused, one.round) == (audit.accused, audit.round))
    assert asked(after, 3, trial.rules.audits) == (second,)
    assert first not in busy(trial.audit_state, 3, trial.rules.audits)
    with pytest.raises(InvalidAudits, match="has declined"):
        trial.next([said(first, SealedVerdict(audit.accused, audit.round, bytes(32)))])
    with pytest.raises(InvalidAudits, match="has declined"):
        trial.next([decline])


def test_who_has_sealed_a_verdict_cannot_decline() -> None:
    trial = court()
    trial.next([])
    audit = trial.audit_state.audits[0]
    node = audit.candidates[0]
    trial.next([said(node, SealedVerdict(audit.accused, audit.round, bytes(32)))])
    with pytest.raises(InvalidAudits, match="already sealed"):
        trial.next([said(node, DeclinedAudit(audit.accused, audit.round))])


def test_an_audit_that_all_candidates_decline_ends_at_once() -> None:
    trial = court(3)
    trial.next([])
    audit = trial.audit_state.audits[0]
    trial.rules = replace(trial.rules, audits=replace(ALWAYS, rate=0.0, patience=100))
    for node in audit.candidates:
        trial.next([said(node, DeclinedAudit(audit.accused, audit.round))])
    (ended,) = [one for one in trial.closed if (one.accused, one.round) == (audit.accused, audit.round)]
    assert ended.outcome == "dropped"


def test_a_few_that_are_left_when_most_decline_convict_nobody() -> None:
    """All honest nodes started again, say: what they need to look was in memory."""
    trial = court()
    trial.next([])
    trial.rules = replace(trial.rules, audits=replace(ALWAYS, rate=0.0, patience=100, window=100))
    audit = trial.audit_state.audits[0]
    pair = audit.candidates[:2]
    for _ in range(8):
        words = []
        for one in trial.audit_state.audits:
            if (one.accused, one.round) != (audit.accused, audit.round):
                continue
            full = {node: verdict(node, one, FAIL) for node in pair}
            for node in asked(one, trial.round + 1, trial.rules.audits):
                mine = next((opinion for opinion in one.opinions if opinion.auditor == node), None)
                if node not in pair:
                    words.append(said(node, DeclinedAudit(one.accused, one.round)))
                elif mine is None:
                    words.append(said(node, SealedVerdict(one.accused, one.round, full[node].digest)))
                elif mine.finding is None:
                    words.append(said(node, full[node]))
        trial.next(words)
    assert [one.outcome for one in trial.closed if one.accused == audit.accused] == ["inconclusive"]


def test_a_jury_is_decided_by_those_who_have_not_declined() -> None:
    """A node that started again since the round cannot repeat it: its seat does not hold up the others."""
    trial = court(rate=1.0)
    trial.next([])
    trial.rules = replace(trial.rules, audits=replace(ALWAYS, rate=0.0, patience=100, window=100))
    accused, unable = trial.audit_state.audits[0].accused, trial.audit_state.audits[0].candidates[-2:]

    def words() -> list[StatementReceived]:
        found = []
        for audit in trial.audit_state.audits:
            for node in asked(audit, trial.round + 1, trial.rules.audits):
                mine = next((one for one in audit.opinions if one.auditor == node), None)
                full = verdict(node, audit, FAIL if audit.accused == accused else PASS)
                if node in unable and mine is None:
                    found.append(said(node, DeclinedAudit(audit.accused, audit.round)))
                elif mine is None:
                    found.append(said(node, SealedVerdict(audit.accused, audit.round, full.digest)))
                elif mine.finding is None:
                    found.append(said(node, full))
        return found

    for _ in range(8):
        trial.next(words())
    outcomes = {one.accused: one.outcome for one in trial.closed}
    assert outcomes[accused] == "convicted"
    assert set(outcomes.values()) == {"convicted", "passed"}

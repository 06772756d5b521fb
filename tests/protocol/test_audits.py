"""Audits: sampling, assignment of auditors, and how the record follows from their statements."""

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
from tests.protocol.audit_scenarios import FAIL, FALSE, PASS, UNSERVED, UNSURE, AuditedRounds, received, signed, verdict
from tests.protocol.one_leader import RULES, nodes

ALWAYS = AuditRules(rate=1.0, second=0.0, patience=3, window=20, pass_error=20_000, fail_error=40_000)
EIGHT = nodes(8)


def audited_rounds(count: int = 8, **changes: object) -> AuditedRounds:
    return AuditedRounds(nodes(count), replace(RULES, rounds=10**6, audits=replace(ALWAYS, **changes)))  # type: ignore[arg-type]


def test_honest_work_passes_and_its_auditor_is_paid() -> None:
    run = audited_rounds()
    run.run_rounds(1, lambda node, audit: PASS)
    assert [audit.accused for audit in run.audit_state.audits] == EIGHT
    first = run.audit_state.audits[0]
    run.run_rounds(3, lambda node, audit: PASS)
    ended = [one for one in run.closed if one.round == 1]
    assert {one.outcome for one in ended} == {"passed"}
    assert ended[0].paid == first.candidates[:1]
    assert ended[0].gain == PASS.gain


def test_a_cheating_node_is_convicted_by_a_jury_and_excluded_from_then_on() -> None:
    run = audited_rounds()
    run.run_rounds(8, lambda node, audit: FAIL if audit.accused == EIGHT[2] else PASS)
    assert run.audit_state.banned == (EIGHT[2],)
    convicted = [one for one in run.closed if one.outcome == "convicted"]
    assert [(one.accused, one.round, len(one.paid)) for one in convicted] == [(EIGHT[2], 1, 7)]
    assert EIGHT[2] not in {audit.accused for audit in run.audit_state.audits}
    assert {one.outcome for one in run.closed if one.accused != EIGHT[2]} == {"passed"}


def test_a_single_verdict_never_convicts() -> None:
    run = audited_rounds(2)
    run.run_rounds(30, lambda node, audit: FAIL)
    assert run.audit_state.banned == ()
    assert {one.outcome for one in run.closed} == {"inconclusive"}


def test_an_auditor_that_fails_honest_work_is_convicted_by_a_jury() -> None:
    liar = EIGHT[0]
    run = audited_rounds()
    run.run_rounds(40, lambda node, audit: FAIL if node == liar else PASS)
    assert run.audit_state.banned == (liar,)
    assert {one.outcome for one in run.closed if one.accused != liar} == {"passed"}


def test_an_auditor_that_passes_a_cheating_node_is_exposed_by_a_second_audit() -> None:
    cheat, friend = EIGHT[0], EIGHT[1]
    run = audited_rounds(second=1.0)
    run.run_rounds(60, lambda node, audit: FAIL if audit.accused == cheat and node != friend else PASS)
    assert cheat in run.audit_state.banned
    assert set(run.audit_state.banned) <= {cheat, friend}


def sketched(finding: Finding, audit: Audit, *, off: float = 0.0, noise: int = 5_000) -> Finding:
    """Return ``finding`` with the sketch of a replay whose arithmetic deviates by ``off``."""
    sketch = [
        int.from_bytes(digest("way", audit.accused.encode(), bytes([i]))[:2], "little") - 2**15 for i in range(64)
    ]
    odd = [(-1) ** i * round(off * abs(number)) for i, number in enumerate(sketch)]
    return msgspec.structs.replace(finding, sketch=tuple(map(sum, zip(sketch, odd, strict=True))), noise=noise)


LAZY = {
    "nothing": PASS,
    "zeros": msgspec.structs.replace(PASS, sketch=(0,) * 64),
    "something": msgspec.structs.replace(PASS, sketch=tuple(range(-32, 32))),
    "unsure of everything": UNSURE,
}


@pytest.mark.parametrize("policy", LAZY)
def test_an_auditor_that_does_not_replay_is_convicted_even_if_all_work_is_honest(policy: str) -> None:
    """A second audit exposes it, also when the second auditor is lazy and the first was honest."""
    lazy = EIGHT[3]
    run = audited_rounds(second=0.2)
    run.run_rounds(40, lambda node, audit: LAZY[policy] if node == lazy else sketched(PASS, audit))
    assert run.audit_state.banned == (lazy,)
    assert {one.outcome for one in run.closed if one.accused != lazy} <= {"passed", "inconclusive"}
    assert all(lazy not in one.paid for one in run.closed if lazy in one.lied)


def test_a_second_audit_is_drawn_only_after_the_first_verdict_is_revealed() -> None:
    """Otherwise an auditor would lie only in rounds without a second audit."""
    run = audited_rounds(second=0.5)
    run.run_round([])
    looks = set()
    for _ in range(30):
        shows = [one for one in run.audit_state.audits if one.looks == 1 and any(o.finding for o in one.opinions)]
        asked_twice = {(one.accused, one.round) for one in run.audit_state.audits if one.looks == 2}
        looks |= {(one.accused, one.round) in asked_twice for one in shows}
        run.run_rounds(1, lambda node, audit: sketched(PASS, audit))
    assert looks == {False}, "the second audit was drawn before the first verdict was revealed"


def test_sketches_from_other_hardware_convict_no_auditor() -> None:
    run = audited_rounds(second=1.0)
    run.run_rounds(30, lambda node, audit: sketched(PASS, audit, off=0.24 if node in EIGHT[:3] else 0.0))
    assert run.audit_state.banned == ()
    assert {one.looks for one in run.audit_state.audits} <= {1, 2}, "a jury was called"


def test_sketches_that_differ_by_amplified_rounding_convict_no_auditor() -> None:
    """The audited node may have caused it: it supplies the optimizer state of its replay."""
    run = audited_rounds(second=1.0)
    run.run_rounds(30, lambda node, audit: sketched(PASS, audit, off=1.5 if node in EIGHT[:2] else 0.0, noise=300_000))
    assert run.audit_state.banned == ()
    assert {one.outcome for one in run.closed} == {"passed"}


def test_three_agreeing_auditors_are_too_few_to_convict_another_by_its_sketch() -> None:
    run = audited_rounds(4, second=1.0)
    run.run_rounds(30, lambda node, audit: LAZY["zeros"] if node == EIGHT[0] else sketched(PASS, audit))
    assert run.audit_state.banned == ()


@given(st.lists(st.integers(-(10**9), 10**9), min_size=64, max_size=64), st.floats(0, 0.49))
def test_sketches_match_unless_they_differ_by_half_of_their_length(sketch: list[int], off: float) -> None:
    one = msgspec.structs.replace(PASS, sketch=tuple(sketch))
    near = msgspec.structs.replace(PASS, sketch=tuple(number + int(off * number) for number in sketch))
    signs = msgspec.structs.replace(PASS, sketch=tuple(-number for number in sketch))
    assert not unlike(one, one)
    assert not unlike(one, near)
    assert unlike(one, signs) == unlike(signs, one) == any(sketch)
    assert unlike(one, PASS)


def test_findings_between_the_thresholds_are_inconclusive() -> None:
    run = audited_rounds()
    run.run_rounds(30, lambda node, audit: UNSURE)
    assert run.audit_state.banned == ()
    assert {one.outcome for one in run.closed} == {"inconclusive"}


def test_a_finding_between_the_thresholds_may_get_a_second_audit() -> None:
    run, looks = audited_rounds(second=1.0), set()
    for _ in range(10):
        run.run_rounds(1, lambda node, audit: UNSURE)
        looks |= {audit.looks for audit in run.audit_state.audits}
    assert looks == {1, 2}


def test_a_commitment_mismatch_counts_as_a_fail() -> None:
    run = audited_rounds()
    run.run_rounds(9, lambda node, audit: FALSE if audit.accused == EIGHT[3] else PASS)
    assert run.audit_state.banned == (EIGHT[3],)


def test_a_node_that_withholds_its_bundles_repeatedly_is_convicted() -> None:
    """Before this rule a node that served nobody kept 92 % of the pay."""
    run = audited_rounds()
    run.run_rounds(10, lambda node, audit: UNSERVED if audit.accused == EIGHT[3] else PASS)
    outcomes = [one.outcome for one in run.closed if one.accused == EIGHT[3]]
    assert outcomes[:3] == ["unserved", "unserved", "convicted"]
    assert run.audit_state.banned == (EIGHT[3],)


def test_a_node_that_serves_some_audits_is_not_convicted_for_withholding() -> None:
    run = audited_rounds()
    run.run_rounds(20, lambda node, audit: UNSERVED if audit.accused == EIGHT[3] and audit.round % 3 else PASS)
    assert run.audit_state.banned == ()


def test_a_cheating_node_that_serves_only_one_auditor_is_convicted() -> None:
    """One fail beside withheld bundles used to be inconclusive."""
    run, served = audited_rounds(), {}

    def find(node: str, audit: Audit) -> Finding:
        if audit.accused != EIGHT[3]:
            return PASS
        return FAIL if served.setdefault(audit.round, node) == node else UNSERVED

    run.run_rounds(10, find)
    assert EIGHT[3] in run.audit_state.banned


def test_one_auditor_that_fails_honest_work_convicts_nobody() -> None:
    run = audited_rounds()
    run.run_rounds(20, lambda node, audit: FAIL if node == EIGHT[0] else PASS)
    assert set(run.audit_state.banned) <= {EIGHT[0]}


def test_jurors_with_little_voting_weight_are_outvoted() -> None:
    """Eight identities with a hundredth of the weight each fail the work of an honest node."""
    names = nodes(16)[8:]
    weights = dict.fromkeys(EIGHT, 100) | dict.fromkeys(names, 1)
    jury = tuple(node for node in weights if node != EIGHT[3])[:JURY]
    audit = Audit(EIGHT[3], 1, 40, JURY, 1, jury, tuple(weights[node] for node in jury), ())
    opinions = tuple(Opinion(node, bytes(32), FAIL if node in names else PASS) for node in jury)
    found = decide(
        msgspec.structs.replace(audit, opinions=opinions),
        audited_rounds().rules.audits,
        fresh=False,
        again=False,
        late=False,
        expired=True,
    )
    assert isinstance(found, Ended)
    assert found.outcome == "passed"
    assert found.lied == set(names) & set(jury)


def test_a_silent_auditor_is_replaced() -> None:
    run = audited_rounds()
    run.run_rounds(12, lambda node, audit: None if node in EIGHT[:2] else PASS)
    assert {one.outcome for one in run.closed if one.round == 1} == {"passed"}
    assert not [audit for audit in run.audit_state.audits if audit.round == 1]


def test_a_jury_does_not_wait_for_nodes_that_left() -> None:
    cheat, gone = EIGHT[2], EIGHT[:2]
    run = audited_rounds(window=40)
    run.run_rounds(10, lambda node, audit: None if node in gone else FAIL if audit.accused == cheat else PASS)
    assert cheat in run.audit_state.banned
    first = next(one for one in run.closed if one.accused == cheat)
    assert len(first.paid) == 5, "only those that answered in time are paid"


def test_audits_that_no_auditor_answers_are_dropped_after_the_window() -> None:
    run = audited_rounds(window=5)
    run.run_rounds(8, lambda node, audit: None)
    assert {one.outcome for one in run.closed} == {"dropped"}
    assert min(audit.round for audit in run.audit_state.audits) == 8 - 5 + 1


def test_a_verdict_is_revealed_only_after_its_digest_is_recorded_and_only_once() -> None:
    run = audited_rounds()
    run.run_round([])
    audit = run.audit_state.audits[0]
    node, stranger = audit.candidates[0], audit.candidates[1]
    full, other = verdict(node, audit, PASS), verdict(node, audit, FAIL)
    sealed = SealedVerdict(audit.accused, audit.round, full.digest)
    with pytest.raises(InvalidAudits, match="not the one it sealed"):
        run.run_round([received(node, full)])
    with pytest.raises(InvalidAudits, match="was not asked"):
        run.run_round([received(stranger, sealed)])
    with pytest.raises(InvalidAudits, match="already sealed"):
        run.run_round([received(node, sealed), received(node, sealed)])
    run.run_round([received(node, sealed)])
    with pytest.raises(InvalidAudits, match="not the one it sealed"):
        run.run_round([received(node, other)])
    run.run_round([received(node, full)])
    with pytest.raises(InvalidAudits, match="not the one it sealed"):
        run.run_round([received(node, full)])
    run.run_round([])
    with pytest.raises(InvalidAudits, match="not open"):
        run.run_round([received(node, full)])


def test_a_statement_is_signed_for_the_audited_round() -> None:
    sealed = SealedVerdict(EIGHT[0], 3, bytes(32))
    assert statement(signed(EIGHT[1], 3, sealed)).body == sealed
    with pytest.raises(MalformedMessage, match="signed for round 4"):
        statement(signed(EIGHT[1], 4, sealed))
    with pytest.raises(MalformedMessage, match="is not a statement on an audit"):
        statement(signed(EIGHT[1], 4, Leave("bye")))


def test_an_auditor_is_busy_until_its_verdict_digest_is_recorded() -> None:
    run = audited_rounds(3, rate=1.0)
    run.run_round([])
    audits = run.audit_state.audits
    assert busy(run.audit_state, 2, run.rules.audits) == {audit.candidates[0] for audit in audits}
    node = audits[0].candidates[0]
    mine = [audit for audit in audits if audit.candidates[0] == node]
    run.rules = replace(run.rules, audits=replace(ALWAYS, rate=0.0))
    run.run_round([received(node, SealedVerdict(one.accused, one.round, bytes(32))) for one in mine])
    assert node not in busy(run.audit_state, 3, run.rules.audits)


def test_private_contributions_are_not_audited_and_their_authors_audit_nobody() -> None:
    run = audited_rounds()
    run.run_round([], private=EIGHT[:2])
    assert not {audit.accused for audit in run.audit_state.audits} & set(EIGHT[:2])
    assert not {node for audit in run.audit_state.audits for node in audit.candidates} & set(EIGHT[:2])


def test_audits_are_sampled_at_the_configured_rate() -> None:
    """Within five standard deviations of the binomial."""
    run = audited_rounds(rate=0.05, window=10**6, patience=10**6)
    run.rules = replace(run.rules, probation=0)
    for _ in range(400):
        run.audit_state = without_open_audits(run)
        run.run_round([])
    found = Counter(audit.accused for audit in run.opened)
    assert 3200 * 0.05 - 5 * (3200 * 0.05) ** 0.5 < sum(found.values()) < 2 * 3200 * 0.05 + 5 * (3200 * 0.05) ** 0.5


def test_a_contribution_reported_as_an_outlier_is_audited_exactly_once() -> None:
    run = audited_rounds(rate=0.05)
    run.suspects = frozenset(EIGHT[:1])
    run.run_round([])
    for _ in range(20):
        run.silent = frozenset(EIGHT[:1]) if run.round % 2 else frozenset()
        contributed = EIGHT[0] in {one.node for one in run.audit_state.pool.given}
        run.run_round([])
        earlier = [one for one in run.opened if (one.accused, one.round) == (EIGHT[0], run.round - 1)]
        assert len(earlier) == contributed, "audited once, whether it takes part in the next round or not"


def test_an_outlier_report_about_a_node_without_a_contribution_is_ignored() -> None:
    run = audited_rounds(rate=0.05)
    run.run_round([], private=EIGHT[:1])
    run.suspects = frozenset(EIGHT[:1])
    assert run.run_round([]).suspects == ()


def without_open_audits(run: AuditedRounds) -> object:
    """Return the audit state with no open audits."""
    return msgspec.structs.replace(run.audit_state, audits=())


FINDINGS = st.sampled_from([PASS, FAIL, FALSE, UNSURE, UNSERVED, None])


@settings(deadline=None, max_examples=60)
@given(count=st.integers(8, 14), seed=st.randoms(use_true_random=False), second=st.sampled_from([0.0, 0.3]))
def test_a_malicious_quarter_convicts_no_honest_node(count: int, seed: object, second: float) -> None:
    """Malicious auditors submit arbitrary failing verdicts; honest ones the truth."""
    run = audited_rounds(count, rate=0.5, second=second)
    hostile = set(run.nodes[: (count - 1) // 4])

    def policy(node: str, audit: Audit) -> Finding | None:
        if node not in hostile:
            return FAIL if audit.accused in hostile else PASS
        return seed.choice([FAIL, FAIL, FALSE, UNSERVED])  # type: ignore[attr-defined,no-any-return]

    run.run_rounds(40, policy)
    assert set(run.audit_state.banned) <= hostile


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_the_audit_state_stays_bounded_whatever_auditors_find(data: st.DataObject) -> None:
    run = audited_rounds(
        data.draw(st.integers(1, 6)), rate=data.draw(st.sampled_from([0.3, 1.0])), window=6, patience=2
    )
    run.run_rounds(15, lambda node, audit: data.draw(FINDINGS))
    assert all(run.round - audit.round < 6 for audit in run.audit_state.audits)
    assert all(set(asked(a, run.round, run.rules.audits)) <= set(a.candidates) for a in run.audit_state.audits)
    assert all(one.accused not in one.paid for one in run.closed)
    assert all(one.outcome != "convicted" or len(one.paid) >= 2 for one in run.closed)


def test_the_next_candidate_is_assigned_as_soon_as_one_declines() -> None:
    run = audited_rounds(rate=1.0)
    run.run_round([])
    run.rules = replace(run.rules, audits=replace(ALWAYS, rate=0.0, patience=100))
    audit = run.audit_state.audits[0]
    first, second = audit.candidates[:2]
    decline = received(first, DeclinedAudit(audit.accused, audit.round))
    mine = [one for one in run.audit_state.audits if one.candidates[0] == first and one != audit]
    others = [received(first, DeclinedAudit(one.accused, one.round)) for one in mine]
    assert first not in busy(run.audit_state, 2, run.rules.audits, [decline, *others]), "pending counts"
    assert first in busy(run.audit_state, 2, run.rules.audits, others) | busy(run.audit_state, 2, run.rules.audits, [])
    run.run_round([decline, *others])
    after = next(one for one in run.audit_state.audits if (one.accused, one.round) == (audit.accused, audit.round))
    assert asked(after, 3, run.rules.audits) == (second,)
    assert first not in busy(run.audit_state, 3, run.rules.audits)
    with pytest.raises(InvalidAudits, match="has declined"):
        run.run_round([received(first, SealedVerdict(audit.accused, audit.round, bytes(32)))])
    with pytest.raises(InvalidAudits, match="has declined"):
        run.run_round([decline])


def test_an_auditor_that_sealed_a_verdict_cannot_decline() -> None:
    run = audited_rounds()
    run.run_round([])
    audit = run.audit_state.audits[0]
    node = audit.candidates[0]
    run.run_round([received(node, SealedVerdict(audit.accused, audit.round, bytes(32)))])
    with pytest.raises(InvalidAudits, match="already sealed"):
        run.run_round([received(node, DeclinedAudit(audit.accused, audit.round))])


def test_an_audit_that_all_candidates_decline_is_dropped_at_once() -> None:
    run = audited_rounds(3)
    run.run_round([])
    audit = run.audit_state.audits[0]
    run.rules = replace(run.rules, audits=replace(ALWAYS, rate=0.0, patience=100))
    for node in audit.candidates:
        run.run_round([received(node, DeclinedAudit(audit.accused, audit.round))])
    (ended,) = [one for one in run.closed if (one.accused, one.round) == (audit.accused, audit.round)]
    assert ended.outcome == "dropped"


def test_a_few_auditors_left_when_most_decline_cannot_convict() -> None:
    """For instance, all honest nodes restarted and lost the states they need to replay."""
    run = audited_rounds()
    run.run_round([])
    run.rules = replace(run.rules, audits=replace(ALWAYS, rate=0.0, patience=100, window=100))
    audit = run.audit_state.audits[0]
    pair = audit.candidates[:2]
    for _ in range(8):
        statements = []
        for one in run.audit_state.audits:
            if (one.accused, one.round) != (audit.accused, audit.round):
                continue
            full = {node: verdict(node, one, FAIL) for node in pair}
            for node in asked(one, run.round + 1, run.rules.audits):
                mine = next((opinion for opinion in one.opinions if opinion.auditor == node), None)
                if node not in pair:
                    statements.append(received(node, DeclinedAudit(one.accused, one.round)))
                elif mine is None:
                    statements.append(received(node, SealedVerdict(one.accused, one.round, full[node].digest)))
                elif mine.finding is None:
                    statements.append(received(node, full[node]))
        run.run_round(statements)
    assert [one.outcome for one in run.closed if one.accused == audit.accused] == ["inconclusive"]


def test_a_jury_is_decided_by_the_members_that_did_not_decline() -> None:
    """A node that restarted since the round cannot replay it; it must not block the jury."""
    run = audited_rounds(rate=1.0)
    run.run_round([])
    run.rules = replace(run.rules, audits=replace(ALWAYS, rate=0.0, patience=100, window=100))
    accused, unable = run.audit_state.audits[0].accused, run.audit_state.audits[0].candidates[-2:]

    def statements() -> list[StatementReceived]:
        found = []
        for audit in run.audit_state.audits:
            for node in asked(audit, run.round + 1, run.rules.audits):
                mine = next((one for one in audit.opinions if one.auditor == node), None)
                full = verdict(node, audit, FAIL if audit.accused == accused else PASS)
                if node in unable and mine is None:
                    found.append(received(node, DeclinedAudit(audit.accused, audit.round)))
                elif mine is None:
                    found.append(received(node, SealedVerdict(audit.accused, audit.round, full.digest)))
                elif mine.finding is None:
                    found.append(received(node, full))
        return found

    for _ in range(8):
        run.run_round(statements())
    outcomes = {one.accused: one.outcome for one in run.closed}
    assert outcomes[accused] == "convicted"
    assert set(outcomes.values()) == {"convicted", "passed"}

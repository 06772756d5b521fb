"""Voting weight follows verified work: what it takes to get some, how fast it moves, and what it never does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.messages import Accepted, Member, Plan, Standing
from psyche.protocol.proposals import draw_seats, round_seed
from psyche.protocol.round_state import AuditRules, Rules, State
from psyche.protocol.standing import (
    FOUNDER_WEIGHT,
    founding_weights,
    probation_note,
    standing_after,
    standing_fault,
    total,
    weights_of,
)
from psyche.protocol.wire import MAX_MEMBERS
from tests.protocol.one_leader import (
    GENESIS,
    RULES,
    RUN_ID,
    Table,
    contribution,
    nodes,
    rejected,
    root_after,
)

FOUNDERS, NEW = nodes(8)[:3], nodes(8)[3:]
A, B, C = FOUNDERS
RUN = replace(RULES, rounds=600, start_members=3, min_members=1, probation=3, inner_steps=100)
AUDITED = replace(RUN, audits=AuditRules(rate=0.05, window=64))


def after(
    before: tuple[Standing, ...], steps: Mapping[str, int], rules: Rules = RUN, due: int = 0, **changes: object
) -> tuple[Standing, ...]:
    """The standing after a round in which nodes took so many inner steps, of ``due`` that they owed (or just those)."""
    weights = weights_of(before) or founding_weights(FOUNDERS)
    members = tuple(Member(node, max(due, count), weights.get(node, 0)) for node, count in sorted(steps.items()))
    number = max((one.last for one in before), default=0) + 1
    plan = Plan(number, number, RUN_ID, GENESIS, round_seed(RUN_ID), 0, "gather", 0, members)
    accepted = tuple(
        Accepted(node, contribution(node, plan, rules, inner_steps=count, tokens=count * rules.tokens_per_step))
        for node, count in sorted(steps.items())
    )
    known = {"electorate": weights, "audit_state": EMPTY, "audits_before": EMPTY} | changes
    return standing_after(before, plan=plan, accepted=accepted, rules=rules, **known)  # type: ignore[arg-type]


def share(standing: tuple[Standing, ...], *names: str) -> float:
    weights = weights_of(standing)
    return total(weights, names) / total(weights)


def test_founders_begin_as_equals() -> None:
    weights = weights_of(after((), dict.fromkeys(FOUNDERS, 100)))
    assert weights == dict.fromkeys(FOUNDERS, FOUNDER_WEIGHT)


def test_a_newcomer_has_no_weight_before_its_probation_is_over() -> None:
    standing = after((), {A: 100})
    for rounds in (1, 2):
        standing = after(standing, {A: 100, NEW[0]: 100})
        (newcomer,) = (one for one in standing if one.node == NEW[0])
        assert (newcomer.rounds, newcomer.weight) == (rounds, 0)
    assert weights_of(after(standing, {A: 100, NEW[0]: 100}))[NEW[0]] > 0


def test_rounds_with_less_than_the_quota_do_not_count_for_probation() -> None:
    standing = after((), dict.fromkeys(FOUNDERS, 100))
    for _ in range(20):
        standing = after(standing, {**dict.fromkeys(FOUNDERS, 100), NEW[0]: 99}, due=100)
    assert NEW[0] not in weights_of(standing)


def test_names_with_little_work_never_have_a_say() -> None:
    """12 names did 124 inner steps against 2,468 of 3 honest nodes, and had 71 % of the votes in round 21."""
    names = nodes(20)[8:]
    standing: tuple[Standing, ...] = ()
    for round_number in range(1, 300):
        work = dict.fromkeys(FOUNDERS, 40) | (dict.fromkeys(names, 1) if round_number > 9 else {})
        standing = after(standing, work)
        assert share(standing, *names) < 12 / 132
        if round_number == 21:
            assert share(standing, *names) < 0.005


@given(st.lists(st.dictionaries(st.sampled_from(nodes(12)), st.integers(1, 100), min_size=1), min_size=1, max_size=40))
def test_at_most_an_eighth_changes_hands_in_32_rounds(rounds: list[dict[str, int]]) -> None:
    history = [after((), dict.fromkeys(FOUNDERS, 100), AUDITED)]
    for steps in rounds:
        history.append(after(history[-1], steps, AUDITED))
    for standing, later in zip(history, history[32:], strict=False):
        gained = sum(max(0.0, share(later, node) - share(standing, node)) for node in nodes(12))
        assert gained <= 1 / 8
    for standing in history:
        assert [one.node for one in standing] == sorted({one.node for one in standing})
        assert all(one.pending >= 0 and one.weight >= 0 for one in standing)


def test_weight_converges_to_the_share_of_the_work() -> None:
    standing = after((), dict.fromkeys(FOUNDERS, 10), AUDITED)
    for _ in range(2000):
        standing = after(standing, {A: 60, B: 30, NEW[0]: 10}, AUDITED)
    assert abs(share(standing, A) - 0.6) < 0.01
    assert abs(share(standing, NEW[0]) - 0.1) < 0.01
    assert share(standing, C) < 0.001, "absence fades"


def test_tokens_mature_over_the_challenge_window() -> None:
    one_round = after(after((), dict.fromkeys(FOUNDERS, 64), AUDITED), dict.fromkeys(FOUNDERS, 64), AUDITED)
    assert all(one.pending > 64 * RUN.tokens_per_step for one in one_round)


def test_a_conviction_takes_all_weight() -> None:
    standing = after((), dict.fromkeys(FOUNDERS, 100))
    banned = replace_audits(banned=(A,))
    standing = after(standing, dict.fromkeys(FOUNDERS, 100), audit_state=banned)
    assert A not in weights_of(standing)
    assert next(one for one in standing if one.node == A).pending == 0


def replace_audits(**changes: object):  # type: ignore[no-untyped-def]
    return type(EMPTY)(**{name: changes.get(name, getattr(EMPTY, name)) for name in EMPTY.__struct_fields__})


def test_survivors_of_less_than_half_continue_alone_and_those_of_more_do_not() -> None:
    standing = after((), dict.fromkeys(FOUNDERS, 100))
    weights = weights_of(standing)
    most = after(standing, {A: 100}, electorate={name: weights[name] for name in (A, B)})
    assert set(weights_of(most)) == set(FOUNDERS), "an absent voter keeps its weight"
    few = after(standing, {A: 100}, electorate={A: weights[A]})
    assert set(weights_of(few)) == {A}


def test_strangers_push_no_voter_out_of_the_record() -> None:
    many = nodes(MAX_MEMBERS + 2)
    founders = many[-2:]
    standing = after((), dict.fromkeys(founders, 5), electorate=founding_weights(founders))
    standing = after(standing, dict.fromkeys(many[:MAX_MEMBERS], 1))
    assert len(standing) == MAX_MEMBERS
    assert set(founders) <= set(weights_of(standing))


# ------------------------------------------------------------------------------------------- in a run


def begun() -> Table:
    """Three founders have done two rounds; five newcomers are there since the second."""
    table = Table(RUN)
    table.arrive(FOUNDERS)
    table.play_round(FOUNDERS)
    table.arrive(NEW)
    table.wait(5)
    table.close(FOUNDERS)
    table.exchange(FOUNDERS)
    table.certify(FOUNDERS)
    table.settle([*NEW, *FOUNDERS])
    return table


def wait_for_another_proposal(table: Table, alive: list[str] | None = None) -> None:
    before = table.state.round.proposal if table.state.round else None
    while table.state.round is None or table.state.round.proposal in (None, before):
        table.wait(1.0, alive)


def test_any_number_of_newcomers_changes_nothing_about_who_votes() -> None:
    table = begun()
    voters = []
    for _ in range(4):
        assert set(table.plan.weights) == set(table.state.electorate)
        table.wait(5)
        record = table.play_round([*FOUNDERS, *NEW])
        assert {one.node for one in record.accepted} == {*FOUNDERS, *NEW}, "their work counts"
        voters.append(len(record.voters))
    assert voters == [3, 3, 8, 8]
    assert share(table.state.standing, *NEW) < 0.01


def test_newcomers_do_not_say_what_the_state_is() -> None:
    table = begun()
    table.close([*FOUNDERS, *NEW])
    table.exchange([*FOUNDERS, *NEW])
    table.certify(FOUNDERS)
    for node in NEW:
        table.attest(node, b"x" * 32)
    table.attest(A)
    assert table.state.rounds == 2
    table.attest(B)
    table.attest(C)
    assert table.state.rounds == 3
    assert table.state.state_root == root_after(table.certified[3])


def test_newcomers_do_not_say_what_can_be_had() -> None:
    """However many claim that a founder's payload never came."""
    table = begun()
    table.wait(5)
    table.close([*FOUNDERS, *NEW])
    for node in [*FOUNDERS, *NEW]:
        table.open(node)
    for node in FOUNDERS:
        table.hold(node, [*FOUNDERS, *NEW])
    for node in NEW:
        table.hold(node, NEW)
    wait_for_another_proposal(table)
    assert {one.node for one in table.proposal.accepted} == {*FOUNDERS, *NEW}


def test_newcomers_never_become_an_electorate() -> None:
    """Not even where all voters are silent: one stranger named the model 15 s after a restart."""
    table = begun()
    table.wait(RUN.round_bounds[1] + 25 * RUN.silence, alive=NEW, step=5)
    assert table.state.round is None
    assert not [record for number, record in table.certified.items() if number > 2]
    assert "waiting for votes of" in table.state.note


def test_a_minority_waits_longer_before_it_continues_alone() -> None:
    table = begun()
    table.wait(RUN.round_bounds[1] + 3 * RUN.silence, alive=[A, *NEW])
    assert table.state.round is None
    table.wait(25 * RUN.silence, alive=[A, *NEW], step=5)
    assert table.state.electorate == (A,)
    record = table.play_round([A, *NEW])
    assert record.reconfiguration
    assert record.electorate == (A,)


def test_a_voter_that_was_not_ready_when_the_round_was_planned_votes_in_it() -> None:
    table = Table(replace(RUN, start_members=4))
    late = NEW[0]
    table.arrive([*FOUNDERS, late])
    table.close([*FOUNDERS, late])
    table.exchange([*FOUNDERS, late])
    table.certify([*FOUNDERS, late])
    table.settle(FOUNDERS)  # the next round is planned before the fourth has taken its outer step
    table.wait(RUN.exchange_bounds[1])
    assert late in table.state.electorate
    assert table.plan.member(late) is None
    table.arrive([late])
    table.close(FOUNDERS)
    table.exchange(FOUNDERS)
    table.certify([A, B, late])
    assert table.certified[2].electorate == tuple(sorted([*FOUNDERS, late]))


def test_who_is_not_of_the_electorate_and_only_follows_has_no_vote() -> None:
    table = Table(RUN)
    table.arrive(FOUNDERS)
    table.arrive(NEW)
    table.close(FOUNDERS)
    table.exchange(FOUNDERS)
    assert "not-a-member: not in the electorate" in rejected(table.vote(NEW[0]))


def test_a_newcomer_is_told_how_far_it_is() -> None:
    table = begun()
    notes = []
    for _ in range(4):
        table.wait(5)
        notes.append(probation_note(table.play_round([*FOUNDERS, *NEW]), NEW[0], 3))
    assert notes == [
        "on probation: 1 of 3 full contributions accepted",
        "on probation: 2 of 3 full contributions accepted",
        "this node now has voting weight; it grows with each round of verified work",
        None,
    ]
    assert probation_note(table.certified[6], A, 3) is None


def test_a_crowd_of_newcomers_takes_no_voters_seat() -> None:
    many = nodes(MAX_MEMBERS + 60)
    voters = many[::140]
    standing = tuple(Standing(node, 3, 1, 0, 0, 0, FOUNDER_WEIGHT) for node in voters)
    seats = draw_seats(replace(State.initial(RUN), standing=standing), many)
    assert len(seats) == MAX_MEMBERS
    assert set(voters) <= set(seats)
    assert seats == sorted(seats)


def test_strangers_that_do_nothing_delay_a_round_by_a_tenth_at_most() -> None:
    """Five of them stretched rounds from 45 s to 2,405 s, because their lateness fed the deadline."""
    table = Table(RUN)
    table.arrive(FOUNDERS)
    table.play_round(FOUNDERS)
    strangers = nodes(60)[20:]
    for _ in range(4):
        table.arrive(strangers, table.state.state_root)
        began = table.now
        table.wait(20)
        table.close(FOUNDERS)
        while not table.state.round.closed:
            table.wait(0.5, step=0.5)
        table.exchange(FOUNDERS)
        while table.state.round.proposal is None:
            table.wait(0.5, step=0.5)
        table.certify(FOUNDERS)
        number = table.plan.round
        table.settle(FOUNDERS)
        while table.state.rounds < number:
            table.wait(0.5, step=0.5)
        assert table.now - began <= 20 * 1.3 + 1.5, "a tenth of the training time in each of three stages"


def test_no_leader_gets_rid_of_voters_by_a_plan_without_them() -> None:
    table = begun()
    (lonely,) = (member for member in table.plan.members if member.node == A)
    record = msgspec.structs.replace(
        table.play_round([*FOUNDERS, *NEW]), plan=msgspec.structs.replace(table.plan, members=(lonely,))
    )
    assert "leaves out more than half" in (standing_fault(record, table.state.standing, EMPTY, RUN) or "")

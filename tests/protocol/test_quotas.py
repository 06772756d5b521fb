"""Quotas of inner steps: what is owed follows what was measured, and nobody can make the others owe nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.coordinator.status import status_of
from psyche.protocol.acceptor import Refusal
from psyche.protocol.assignment import next_position, positions
from psyche.protocol.contributions import contribution_fault
from psyche.protocol.messages import Member
from psyche.protocol.pacing import ALIKE, EXCHANGES, SPEED_WINDOW, quota_fault, quotas
from psyche.protocol.proposals import mostly_done
from psyche.protocol.round_state import Arrived, Left, Promised, Restored, Stage
from tests.protocol.one_leader import GENESIS, RULES, Table, contribution, nodes, root_after
from tests.protocol.test_acceptor import PLAN, RECORD, changed, vote

H = 100
EVERYBODY = nodes(8)
SPEEDS = st.lists(st.floats(0.5, 50.0), min_size=1, max_size=8)
MANY = replace(RULES, inner_steps=H, rounds=10**6, min_members=1, round_bounds=(10.0, 1e6), silence=1e9)


def owed(speeds: Mapping[str, float], last: Mapping[str, int] | None = None) -> dict[str, int]:
    return quotas(H, list(speeds), set(speeds), {node: (speed,) for node, speed in speeds.items()}, last or {})


class Mixed:
    """A swarm whose members take real time: ``speeds`` in inner steps a second, ``overhead`` seconds for the rest, and
    ``exchange`` seconds to fetch what the others did."""

    def __init__(
        self,
        speeds: Mapping[str, float],
        overhead: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
        exchange: float = 0.0,
    ) -> None:
        self.speeds, self.overhead, self.noise, self.random = dict(speeds), overhead, noise, Random(seed)
        self.exchange = exchange
        self.table = Table(replace(MANY, start_members=len(speeds)))
        self.table.arrive(list(speeds), GENESIS)

    def due(self) -> dict[str, int]:
        return {member.node: member.inner_steps for member in self.table.plan.members}

    def round(
        self,
        did: Mapping[str, int] | None = None,
        at: Mapping[str, float] | None = None,
        away: str = "",
        comes: str = "",
    ) -> dict[str, float]:
        """One round; seconds that each took. ``did``, ``at``: of whom takes other steps, or commits at another time."""
        table, due = self.table, self.due()
        done = {node: steps for node, steps in (due | dict(did or {})).items() if node != away}
        took = {}
        for node, steps in done.items():
            speed = self.speeds[node] * (1 + self.noise * self.random.uniform(-1, 1))
            took[node] = (at or {}).get(node, steps / speed + self.overhead)
        changes = {n: {"inner_steps": s, "tokens": s * table.rules.tokens_per_step} for n, s in done.items()}
        began, plan = table.now, table.plan
        for node in sorted(took, key=lambda one: took[one]):
            table.now = began + took[node]
            table.commit(node, **changes[node])
        for node in done:
            table.open(node, **changes[node])
        table.now += self.exchange
        for node in done:
            table.hold(node, done)
        table.certify(sorted(done))
        root = root_after(table.proposal)
        for node in (*done, comes) if comes else done:
            if table.state.round is not None and table.state.round.plan == plan:
                table.attest(node, root)
        return took


# ------------------------------------------------------------------------------------ what is owed


@given(SPEEDS, st.integers(1, 500))
def test_the_fastest_owes_h_and_nobody_more_or_nothing(speeds: list[float], most: int) -> None:
    given_ = {node: (speed,) for node, speed in zip(EVERYBODY, speeds, strict=False)}
    found = quotas(most, list(given_), set(given_), given_, {})
    assert max(found.values()) == most
    assert min(found.values()) >= 1
    for one in given_:
        for other in given_:
            if given_[one] <= given_[other]:
                assert found[one] <= found[other]


@given(st.lists(st.floats(0.95, 1.05), min_size=1, max_size=8))
def test_equal_nodes_owe_the_same_where_rounds_differ_by_five_percent(noise: list[float]) -> None:
    assert set(owed(dict(zip(EVERYBODY, noise, strict=False))).values()) == {H}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1.0, 6.0), min_size=2, max_size=8), st.floats(0.0, 2.0))
def test_all_end_together_after_a_few_rounds_whatever_their_speeds(speeds: list[float], overhead: float) -> None:
    swarm = Mixed(dict(zip(EVERYBODY, speeds, strict=False)), overhead)
    for _ in range(4):
        swarm.round()
    took, fastest = swarm.round(), H / max(speeds) + overhead
    assert max(took.values()) <= fastest / (1 - ALIKE) * 1.001
    for node, steps in swarm.due().items():
        assert took[node] + 1.01 / swarm.speeds[node] >= fastest * (1 - 0.02) or steps == H


def test_speeds_of_one_two_and_four_end_together_in_the_second_round() -> None:
    swarm = Mixed(dict(zip(EVERYBODY, (1.0, 2.0, 4.0), strict=False)))
    assert sorted(swarm.round().values()) == [25.0, 50.0, 100.0]
    assert list(swarm.due().values()) == [25, 50, 100]
    assert set(swarm.round().values()) == {25.0}


def test_equal_nodes_on_noisy_machines_keep_h_nearly_always() -> None:
    swarm, kept = Mixed(dict.fromkeys(EVERYBODY[:4], 4.0), noise=0.08, seed=1), 0
    for _ in range(200):
        swarm.round()
        kept += set(swarm.due().values()) == {H}
    assert kept > 180


def test_what_most_of_the_last_rounds_say_is_believed() -> None:
    swarm = Mixed(dict.fromkeys(EVERYBODY[:3], 4.0))
    slow = EVERYBODY[0]
    for _ in range(SPEED_WINDOW):
        swarm.round()
    for _ in range(SPEED_WINDOW // 2):
        swarm.round(at={slow: 50.0})
        assert swarm.due()[slow] == H
    swarm.round(at={slow: 50.0})
    assert swarm.due()[slow] == H // 2


def test_who_fell_short_is_asked_for_what_it_can_at_once() -> None:
    """A game started, and it gave the rest back."""
    swarm = Mixed(dict.fromkeys(EVERYBODY[:3], 4.0))
    for _ in range(SPEED_WINDOW):
        swarm.round()
    swarm.round(did={EVERYBODY[0]: 40}, at={EVERYBODY[0]: 27.5})
    assert swarm.due()[EVERYBODY[0]] == int(40 / 27.5 * 25)
    swarm.round()
    assert swarm.due()[EVERYBODY[0]] > 60, "the game is over"


def test_who_misses_the_deadline_is_asked_for_less_until_it_makes_it() -> None:
    swarm = Mixed(dict.fromkeys(EVERYBODY[:3], 4.0))
    slow, table = EVERYBODY[0], swarm.table
    for _ in range(2):
        swarm.round()
    owed_ = [swarm.due()[slow]]
    for _ in range(3):
        plan, here = table.plan, EVERYBODY[1:3]
        table.now += 25.0
        table.close(here)
        while table.state.round is not None and table.state.round.stage is Stage.COMMITTING:
            table.wait(0.5)
        for node in here:
            table.open(node)
        for node in EVERYBODY[:3]:
            table.hold(node, here)
        table.certify(EVERYBODY[:3])
        root = root_after(table.proposal)
        for node in EVERYBODY[:3]:
            if table.state.round is not None and table.state.round.plan == plan:
                table.attest(node, root)
        owed_.append(swarm.due()[slow])
    assert owed_ == sorted(owed_, reverse=True)
    assert owed_[-1] < 0.6 * H


def test_a_round_that_took_no_time_says_nothing_of_who_missed_it() -> None:
    """All others commit within one tick of the clock, and the last member has come back without the base state."""
    table, (late, *others) = Table(replace(MANY, start_members=5)), EVERYBODY[:5]
    table.arrive([late, *others], GENESIS)
    table.send(Arrived(late, b"another state".ljust(32), "cpu", 0))
    table.close(others)
    table.exchange(others)
    table.certify(others)
    table.settle(others)
    assert 1 in table.certified
    assert late in table.state.peers
    assert not table.state.speeds


@pytest.mark.parametrize(("count", "needed"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 4)])
def test_who_is_not_done_holds_up_the_others_once_more_than_half_of_them_are(count: int, needed: int) -> None:
    table = Table(replace(MANY, start_members=count))
    table.arrive(EVERYBODY[:count], GENESIS)
    for done, node in enumerate(EVERYBODY[: count - 1]):
        current = table.state.round
        assert current is not None
        assert mostly_done(table.state, current) is (done >= needed)
        assert status_of(
            table.state, version=1, claim=b"", proposal=None, certificate=None, attestations=()
        ).mostly_done is (done >= needed)
        table.commit(node)
    assert table.state.round is not None
    assert mostly_done(table.state, table.state.round) is (count > 1)


# --------------------------------------------------------------------------------------- who lies


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1.0, 6.0), min_size=1, max_size=6), st.integers(1, H), st.integers(1, 6))
def test_a_liar_cannot_make_the_others_owe_nothing(speeds: list[float], claims: int, rounds: int) -> None:
    """It commits at once, to few steps or to all of them. The others train for two thirds of the time all the same."""
    liar, honest = EVERYBODY[0], dict(zip(EVERYBODY[1:], speeds, strict=False))
    swarm = Mixed({liar: 1.0} | honest, exchange=2.0)
    for _ in range(rounds):
        swarm.round(did={liar: min(claims, swarm.due()[liar])}, at={liar: 0.001})
    for node, steps in swarm.due().items():
        if node in honest:
            assert steps >= int(EXCHANGES * swarm.exchange * honest[node]) - 1


@given(st.floats(0.5, 200.0))
def test_honest_nodes_are_not_held_up_by_that(ratio: float) -> None:
    """A GPU among laptops, where an exchange takes a tenth of its round."""
    speeds = {EVERYBODY[0]: (1.0,), EVERYBODY[1]: (1.0,), EVERYBODY[2]: (ratio,)}
    owed_, seconds = quotas(H, list(speeds), set(speeds), speeds, {}, H / max(ratio, 1.0) / 10), H / max(ratio, 1.0)
    for node, (speed,) in speeds.items():
        assert owed_[node] / speed <= max(seconds, 1 / speed) / (1 - ALIKE) * 1.001


def test_who_has_no_vote_makes_nobody_owe_less() -> None:
    speeds = {EVERYBODY[0]: (4.0,), EVERYBODY[1]: (4.0,)} | dict.fromkeys(EVERYBODY[2:], (1e6,))
    assert set(quotas(H, EVERYBODY, set(EVERYBODY[:2]), speeds, {}).values()) == {H}


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 90), st.integers(0, 20))
def test_claiming_late_steps_never_earns_a_larger_quota(late: int, more: int) -> None:
    """Late steps took none of the time: who claims more of them has done less in it."""

    def after(claimed: int) -> int:
        rules = replace(MANY, start_members=2, overlap_steps=H)
        table, (one, other) = Table(rules), EVERYBODY[:2]
        table.arrive([one, other], GENESIS)
        for node, seconds, steps in ((other, 25.0, 0), (one, 40.0, claimed)):
            table.now = 1000.0 + seconds
            table.commit(node, overlap_steps=steps)
        for node, steps in ((one, claimed), (other, 0)):
            table.open(node, overlap_steps=steps)
        for node in (one, other):
            table.hold(node, [one, other])
        table.certify([one, other])
        root = root_after(table.proposal)
        for node in (one, other):
            table.attest(node, root)
        return {member.node: member.inner_steps for member in table.plan.members}[one]

    assert after(min(late + more, 99)) <= after(late)


# ------------------------------------------------------------------------- newcomers and new leaders


def test_of_a_newcomer_as_much_is_asked_as_of_the_slowest() -> None:
    swarm = Mixed(dict(zip(EVERYBODY, (1.0, 2.0, 4.0), strict=False)))
    swarm.round()
    newcomer = EVERYBODY[5]
    swarm.table.send(Arrived(newcomer, swarm.table.plan.base_root, "cpu", 1))
    swarm.round(comes=newcomer)
    assert swarm.due()[newcomer] == 25
    swarm.speeds[newcomer] = 8.0
    swarm.round()
    assert swarm.due()[newcomer] == H


def test_who_leaves_is_forgotten_and_memory_is_bounded() -> None:
    swarm = Mixed(dict.fromkeys(EVERYBODY[:4], 4.0))
    for _ in range(3 * SPEED_WINDOW):
        swarm.round()
    assert all(len(found) == SPEED_WINDOW for found in swarm.table.state.speeds.values())
    gone = EVERYBODY[3]
    swarm.table.send(Left(gone, "bye"))
    for _ in range(2):
        swarm.round(away=gone)
    assert set(swarm.table.state.speeds) == set(EVERYBODY[:3])
    assert set(swarm.table.state.last_steps) == set(EVERYBODY[:3])


def test_a_new_leader_begins_with_what_the_last_record_says() -> None:
    swarm = Mixed(dict(zip(EVERYBODY, (1.0, 2.0, 4.0), strict=False)))
    for _ in range(2):
        swarm.round()
    record = swarm.table.certified[2]
    new = Table(swarm.table.rules)
    new.certified = dict(swarm.table.certified)
    new.promising = False
    new.send(Restored(record))
    for node in record.voters:
        new.send(Arrived(node, root_after(record), "cpu", 2))
    for node in record.voters:
        new.send(Promised(node, new.state.lead_term, 2))
    assert {member.node: member.inner_steps for member in new.plan.members} == swarm.due()
    assert list(swarm.due().values()) == [25, 50, 100]


# ----------------------------------------------------------------------------- what everybody checks


def test_more_than_h_is_refused_by_every_voter() -> None:
    generous = changed(PLAN, members=(changed(PLAN.members[0], inner_steps=RULES.inner_steps + 1), *PLAN.members[1:]))
    fewer = changed(PLAN, members=(changed(PLAN.members[0], inner_steps=1), *PLAN.members[1:]))
    assert quota_fault(PLAN, RULES) is None
    assert quota_fault(fewer, RULES) is None
    with pytest.raises(Refusal, match="is given 6 inner steps, and H is 5"):
        vote(changed(RECORD, plan=generous))


def test_more_steps_than_are_due_are_refused_unless_they_were_taken_late() -> None:
    rules, plan = (
        replace(RULES, overlap_steps=3),
        changed(PLAN, members=tuple(Member(m.node, 2, 1) for m in PLAN.members)),
    )
    table = Table(rules)
    for steps, late, allowed in (
        (2, 0, True),
        (3, 0, False),
        (3, 2, False),
        (3, 3, True),
        (4, 3, False),
        (4, 4, False),
    ):
        work = contribution(plan.members[0].node, plan, rules, inner_steps=steps, tokens=40 * steps, overlap_steps=late)
        assert (contribution_fault(table.rules, plan, plan.members[0], work) is None) is allowed, (steps, late)


@given(
    st.dictionaries(st.sampled_from(EVERYBODY), st.integers(1, 50), min_size=1),
    st.integers(1, 4),
    st.integers(0, 5),
    st.binary(min_size=32, max_size=32),
)
def test_data_of_unequal_quotas_are_disjoint_and_leave_no_gap(
    due: dict[str, int], batch: int, late: int, seed: bytes
) -> None:
    members = tuple(Member(node, due[node], 1) for node in sorted(due))
    plan = msgspec.structs.replace(PLAN, members=members, seed=seed, position=7)
    used = [at for node in due for at in positions(plan, node, batch, late)]
    assert sorted(used) == list(range(7, next_position(plan, batch, late)))
    for node, steps in due.items():
        assert len(positions(plan, node, batch, late)) == (steps + late) * batch

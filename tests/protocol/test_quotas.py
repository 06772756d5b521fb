"""Quotas of inner steps: they follow measured speeds, and a malicious node cannot lower those of others."""

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
from tests.protocol.one_leader import GENESIS, RULES, Leader, contribution, nodes, root_after
from tests.protocol.test_acceptor import PLAN, RECORD, changed, vote

H = 100
NODES = nodes(8)
SPEEDS = st.lists(st.floats(0.5, 50.0), min_size=1, max_size=8)
MANY = replace(RULES, inner_steps=H, rounds=10**6, min_members=1, round_bounds=(10.0, 1e6), silence=1e9)


def quotas_at(speeds: Mapping[str, float], last: Mapping[str, int] | None = None) -> dict[str, int]:
    return quotas(H, list(speeds), set(speeds), {node: (speed,) for node, speed in speeds.items()}, last or {})


class TimedSwarm:
    """A swarm whose members take time.

    ``speeds`` in inner steps per second; ``overhead``: other seconds per round; ``exchange``: seconds to fetch
    payloads.
    """

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
        self.leader = Leader(replace(MANY, start_members=len(speeds)))
        self.leader.arrive(list(speeds), GENESIS)

    def quotas(self) -> dict[str, int]:
        return {member.node: member.inner_steps for member in self.leader.plan.members}

    def round(
        self,
        did: Mapping[str, int] | None = None,
        at: Mapping[str, float] | None = None,
        away: str = "",
        comes: str = "",
    ) -> dict[str, float]:
        """Run one round; return the seconds that each node took.

        ``did`` overrides the steps of some nodes, ``at`` the seconds at which they commit.
        """
        leader, due = self.leader, self.quotas()
        done = {node: steps for node, steps in (due | dict(did or {})).items() if node != away}
        took = {}
        for node, steps in done.items():
            speed = self.speeds[node] * (1 + self.noise * self.random.uniform(-1, 1))
            took[node] = (at or {}).get(node, steps / speed + self.overhead)
        changes = {n: {"inner_steps": s, "tokens": s * leader.rules.tokens_per_step} for n, s in done.items()}
        began, plan = leader.now, leader.plan
        for node in sorted(took, key=lambda one: took[one]):
            leader.now = began + took[node]
            leader.commit(node, **changes[node])
        for node in done:
            leader.reveal(node, **changes[node])
        leader.now += self.exchange
        for node in done:
            leader.hold(node, done)
        leader.certify(sorted(done))
        root = root_after(leader.proposal)
        for node in (*done, comes) if comes else done:
            if leader.state.round is not None and leader.state.round.plan == plan:
                leader.attest(node, root)
        return took


# ---------------------------------------------------------------------------------------- quotas


@given(SPEEDS, st.integers(1, 500))
def test_the_fastest_node_gets_h_steps_and_every_node_at_least_one(speeds: list[float], most: int) -> None:
    given_ = {node: (speed,) for node, speed in zip(NODES, speeds, strict=False)}
    found = quotas(most, list(given_), set(given_), given_, {})
    assert max(found.values()) == most
    assert min(found.values()) >= 1
    for one in given_:
        for other in given_:
            if given_[one] <= given_[other]:
                assert found[one] <= found[other]


@given(st.lists(st.floats(0.95, 1.05), min_size=1, max_size=8))
def test_nodes_whose_speeds_differ_by_five_percent_get_equal_quotas(noise: list[float]) -> None:
    assert set(quotas_at(dict(zip(NODES, noise, strict=False))).values()) == {H}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1.0, 6.0), min_size=2, max_size=8), st.floats(0.0, 2.0))
def test_all_nodes_finish_together_after_a_few_rounds_whatever_their_speeds(
    speeds: list[float], overhead: float
) -> None:
    swarm = TimedSwarm(dict(zip(NODES, speeds, strict=False)), overhead)
    for _ in range(4):
        swarm.round()
    took, fastest = swarm.round(), H / max(speeds) + overhead
    assert max(took.values()) <= fastest / (1 - ALIKE) * 1.001
    for node, steps in swarm.quotas().items():
        assert took[node] + 1.01 / swarm.speeds[node] >= fastest * (1 - 0.02) or steps == H


def test_nodes_with_speeds_one_two_and_four_finish_together_in_the_second_round() -> None:
    swarm = TimedSwarm(dict(zip(NODES, (1.0, 2.0, 4.0), strict=False)))
    assert sorted(swarm.round().values()) == [25.0, 50.0, 100.0]
    assert list(swarm.quotas().values()) == [25, 50, 100]
    assert set(swarm.round().values()) == {25.0}


def test_equal_nodes_on_noisy_machines_nearly_always_keep_h() -> None:
    swarm, kept = TimedSwarm(dict.fromkeys(NODES[:4], 4.0), noise=0.08, seed=1), 0
    for _ in range(200):
        swarm.round()
        kept += set(swarm.quotas().values()) == {H}
    assert kept > 180


def test_a_quota_follows_the_median_of_recent_rounds() -> None:
    swarm = TimedSwarm(dict.fromkeys(NODES[:3], 4.0))
    slow = NODES[0]
    for _ in range(SPEED_WINDOW):
        swarm.round()
    for _ in range(SPEED_WINDOW // 2):
        swarm.round(at={slow: 50.0})
        assert swarm.quotas()[slow] == H
    swarm.round(at={slow: 50.0})
    assert swarm.quotas()[slow] == H // 2


def test_a_node_that_fell_short_gets_a_smaller_quota_at_once() -> None:
    """Its machine was busy for one round, and it returned the rest of its quota."""
    swarm = TimedSwarm(dict.fromkeys(NODES[:3], 4.0))
    for _ in range(SPEED_WINDOW):
        swarm.round()
    swarm.round(did={NODES[0]: 40}, at={NODES[0]: 27.5})
    assert swarm.quotas()[NODES[0]] == int(40 / 27.5 * 25)
    swarm.round()
    assert swarm.quotas()[NODES[0]] > 60, "the quota recovers"


def test_a_node_that_misses_the_deadline_gets_less_until_it_makes_it() -> None:
    swarm = TimedSwarm(dict.fromkeys(NODES[:3], 4.0))
    slow, leader = NODES[0], swarm.leader
    for _ in range(2):
        swarm.round()
    assigned = [swarm.quotas()[slow]]
    for _ in range(3):
        plan, here = leader.plan, NODES[1:3]
        leader.now += 25.0
        leader.commit_all(here)
        while leader.state.round is not None and leader.state.round.stage is Stage.COMMITTING:
            leader.wait(0.5)
        for node in here:
            leader.reveal(node)
        for node in NODES[:3]:
            leader.hold(node, here)
        leader.certify(NODES[:3])
        root = root_after(leader.proposal)
        for node in NODES[:3]:
            if leader.state.round is not None and leader.state.round.plan == plan:
                leader.attest(node, root)
        assigned.append(swarm.quotas()[slow])
    assert assigned == sorted(assigned, reverse=True)
    assert assigned[-1] < 0.6 * H


def test_a_round_that_took_no_time_measures_no_speed() -> None:
    """All others commit within one tick of the clock; the last member came back without the base state."""
    leader, (late, *others) = Leader(replace(MANY, start_members=5)), NODES[:5]
    leader.arrive([late, *others], GENESIS)
    leader.send(Arrived(late, b"another state".ljust(32), "cpu", 0))
    leader.commit_all(others)
    leader.exchange(others)
    leader.certify(others)
    leader.attest_all(others)
    assert 1 in leader.certified
    assert late in leader.state.peers
    assert not leader.state.speeds


@pytest.mark.parametrize(("count", "needed"), [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (8, 4)])
def test_a_round_is_mostly_done_once_more_than_half_of_the_others_have_committed(count: int, needed: int) -> None:
    leader = Leader(replace(MANY, start_members=count))
    leader.arrive(NODES[:count], GENESIS)
    for done, node in enumerate(NODES[: count - 1]):
        current = leader.state.round
        assert current is not None
        assert mostly_done(leader.state, current) is (done >= needed)
        assert status_of(
            leader.state, version=1, claim=b"", proposal=None, certificate=None, attestations=()
        ).mostly_done is (done >= needed)
        leader.commit(node)
    assert leader.state.round is not None
    assert mostly_done(leader.state, leader.state.round) is (count > 1)


# --------------------------------------------------------------------------------- malicious nodes


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(1.0, 6.0), min_size=1, max_size=6), st.integers(1, H), st.integers(1, 6))
def test_a_node_that_claims_any_speed_cannot_lower_the_others_quotas_to_nothing(
    speeds: list[float], claims: int, rounds: int
) -> None:
    """It commits at once, to few steps or all. The others still train for two thirds of the time."""
    malicious, honest = NODES[0], dict(zip(NODES[1:], speeds, strict=False))
    swarm = TimedSwarm({malicious: 1.0} | honest, exchange=2.0)
    for _ in range(rounds):
        swarm.round(did={malicious: min(claims, swarm.quotas()[malicious])}, at={malicious: 0.001})
    for node, steps in swarm.quotas().items():
        if node in honest:
            assert steps >= int(EXCHANGES * swarm.exchange * honest[node]) - 1


@given(st.floats(0.5, 200.0))
def test_the_minimum_quota_does_not_delay_honest_nodes(ratio: float) -> None:
    """A GPU among laptops, where an exchange takes a tenth of the GPU's round."""
    speeds = {NODES[0]: (1.0,), NODES[1]: (1.0,), NODES[2]: (ratio,)}
    assigned, seconds = quotas(H, list(speeds), set(speeds), speeds, {}, H / max(ratio, 1.0) / 10), H / max(ratio, 1.0)
    for node, (speed,) in speeds.items():
        assert assigned[node] / speed <= max(seconds, 1 / speed) / (1 - ALIKE) * 1.001


def test_a_node_without_a_vote_lowers_no_quota() -> None:
    speeds = {NODES[0]: (4.0,), NODES[1]: (4.0,)} | dict.fromkeys(NODES[2:], (1e6,))
    assert set(quotas(H, NODES, set(NODES[:2]), speeds, {}).values()) == {H}


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 90), st.integers(0, 20))
def test_claiming_overlapped_steps_never_raises_a_quota(late: int, more: int) -> None:
    """Overlapped steps took none of the round's time: claiming more of them means having done less in it."""

    def after(claimed: int) -> int:
        rules = replace(MANY, start_members=2, overlap_steps=H)
        leader, (one, other) = Leader(rules), NODES[:2]
        leader.arrive([one, other], GENESIS)
        for node, seconds, steps in ((other, 25.0, 0), (one, 40.0, claimed)):
            leader.now = 1000.0 + seconds
            leader.commit(node, overlap_steps=steps)
        for node, steps in ((one, claimed), (other, 0)):
            leader.reveal(node, overlap_steps=steps)
        for node in (one, other):
            leader.hold(node, [one, other])
        leader.certify([one, other])
        root = root_after(leader.proposal)
        for node in (one, other):
            leader.attest(node, root)
        return {member.node: member.inner_steps for member in leader.plan.members}[one]

    assert after(min(late + more, 99)) <= after(late)


# ------------------------------------------------------------------------- new nodes and new leaders


def test_a_new_node_gets_the_quota_of_the_slowest() -> None:
    swarm = TimedSwarm(dict(zip(NODES, (1.0, 2.0, 4.0), strict=False)))
    swarm.round()
    newcomer = NODES[5]
    swarm.leader.send(Arrived(newcomer, swarm.leader.plan.base_root, "cpu", 1))
    swarm.round(comes=newcomer)
    assert swarm.quotas()[newcomer] == 25
    swarm.speeds[newcomer] = 8.0
    swarm.round()
    assert swarm.quotas()[newcomer] == H


def test_speeds_of_nodes_that_left_are_dropped_and_memory_is_bounded() -> None:
    swarm = TimedSwarm(dict.fromkeys(NODES[:4], 4.0))
    for _ in range(3 * SPEED_WINDOW):
        swarm.round()
    assert all(len(found) == SPEED_WINDOW for found in swarm.leader.state.speeds.values())
    gone = NODES[3]
    swarm.leader.send(Left(gone, "bye"))
    for _ in range(2):
        swarm.round(away=gone)
    assert set(swarm.leader.state.speeds) == set(NODES[:3])
    assert set(swarm.leader.state.last_steps) == set(NODES[:3])


def test_a_new_leader_starts_from_the_quotas_of_the_last_record() -> None:
    swarm = TimedSwarm(dict(zip(NODES, (1.0, 2.0, 4.0), strict=False)))
    for _ in range(2):
        swarm.round()
    record = swarm.leader.certified[2]
    new = Leader(swarm.leader.rules)
    new.certified = dict(swarm.leader.certified)
    new.promising = False
    new.send(Restored(record))
    for node in record.voters:
        new.send(Arrived(node, root_after(record), "cpu", 2))
    for node in record.voters:
        new.send(Promised(node, new.state.lead_term, 2))
    assert {member.node: member.inner_steps for member in new.plan.members} == swarm.quotas()
    assert list(swarm.quotas().values()) == [25, 50, 100]


# ------------------------------------------------------------------------------ what voters check


def test_a_plan_with_more_than_h_steps_is_refused_by_every_voter() -> None:
    generous = changed(PLAN, members=(changed(PLAN.members[0], inner_steps=RULES.inner_steps + 1), *PLAN.members[1:]))
    fewer = changed(PLAN, members=(changed(PLAN.members[0], inner_steps=1), *PLAN.members[1:]))
    assert quota_fault(PLAN, RULES) is None
    assert quota_fault(fewer, RULES) is None
    with pytest.raises(Refusal, match="is given 6 inner steps, and H is 5"):
        vote(changed(RECORD, plan=generous))


def test_more_steps_than_assigned_are_rejected_unless_they_overlapped() -> None:
    rules, plan = (
        replace(RULES, overlap_steps=3),
        changed(PLAN, members=tuple(Member(m.node, 2, 1) for m in PLAN.members)),
    )
    leader = Leader(rules)
    for steps, late, allowed in (
        (2, 0, True),
        (3, 0, False),
        (3, 2, False),
        (3, 3, True),
        (4, 3, False),
        (4, 4, False),
    ):
        work = contribution(plan.members[0].node, plan, rules, inner_steps=steps, tokens=40 * steps, overlap_steps=late)
        assert (contribution_fault(leader.rules, plan, plan.members[0], work) is None) is allowed, (steps, late)


@given(
    st.dictionaries(st.sampled_from(NODES), st.integers(1, 50), min_size=1),
    st.integers(1, 4),
    st.integers(0, 5),
    st.binary(min_size=32, max_size=32),
)
def test_data_ranges_of_unequal_quotas_are_disjoint_and_leave_no_gap(
    due: dict[str, int], batch: int, late: int, seed: bytes
) -> None:
    members = tuple(Member(node, due[node], 1) for node in sorted(due))
    plan = msgspec.structs.replace(PLAN, members=members, seed=seed, position=7)
    used = [at for node in due for at in positions(plan, node, batch, late)]
    assert sorted(used) == list(range(7, next_position(plan, batch, late)))
    for node, steps in due.items():
        assert len(positions(plan, node, batch, late)) == (steps + late) * batch

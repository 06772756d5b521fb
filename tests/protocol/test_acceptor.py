"""When a member votes for a record, and every reason for which it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from psyche.protocol.acceptor import Acceptor, Chain, Refusal, consider, plan_fault, promise
from psyche.protocol.assignment import reducer_order
from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.messages import (
    NO_COMMITMENT,
    Accepted,
    Excluded,
    ExclusionReason,
    Member,
    Plan,
    Proposal,
    Record,
    Standing,
)
from psyche.protocol.proposals import round_seed
from psyche.protocol.round_state import Rules
from psyche.protocol.standing import FOUNDER_WEIGHT, standing_after
from tests.protocol.one_leader import GENESIS, RULES, RUN_ID, contribution, nodes, peer_id, with_electorate

A, B, C, D = nodes(4)
STRANGER = peer_id(70)
CHAIN = Chain(0, RUN_ID, GENESIS, 0)
W = FOUNDER_WEIGHT
PLAN = Plan(
    1, 1, RUN_ID, GENESIS, round_seed(RUN_ID), 0, "gather", 0, tuple(Member(node, 5, W) for node in (A, B, C, D))
)
REVEALED = {node: contribution(node, PLAN) for node in (A, B, C)}
ACCEPTED = tuple(Accepted(node, REVEALED[node]) for node in (A, B, C))


def standing(before: tuple[Standing, ...] = (), rules: Rules = RULES, **changes: Any) -> tuple[Standing, ...]:
    """Return the standing that a record of the round must have."""
    known = {"plan": PLAN, "electorate": PLAN.weights, "accepted": ACCEPTED} | changes
    return standing_after(before, audit_state=EMPTY, audits_before=EMPTY, rules=rules, **known)


RECORD = Record(
    plan=PLAN,
    accepted=ACCEPTED,
    excluded=(Excluded(D, ExclusionReason.NO_COMMITMENT),),
    reconfiguration=0,
    electorate=(A, B, C, D),
    voting_weights=(W, W, W, W),
    standing=standing(),
    audit_state=EMPTY,
    commitments=(),
    reducer_order=(),
    results=(),
    dissenters=(),
)


def changed(struct: Any, **fields: object) -> Any:
    return msgspec.structs.replace(struct, **fields)


def by_name(accepted: Accepted) -> str:
    return accepted.node


def vote(record: Record, *, term: int = 2, acceptor: Acceptor | None = None, **situation: Any) -> Acceptor:
    committed = {node: one.commitment(node, RUN_ID, 1) for node, one in REVEALED.items()}
    known = {
        "rules": RULES,
        "chain": CHAIN,
        "committed": committed,
        "opened": REVEALED,
        "held": frozenset((A, B, C)),
    } | situation
    return consider(acceptor or Acceptor(), Proposal(term, record, ()), **known)


def test_a_valid_record_gets_the_vote() -> None:
    assert vote(RECORD) == Acceptor(0, 2, RECORD.hash)
    assert vote(RECORD, held=frozenset((A, B, C, D))) == Acceptor(0, 2, RECORD.hash)


def test_voting_twice_for_the_same_record_is_idempotent() -> None:
    first = vote(RECORD)
    assert vote(RECORD, acceptor=first) == first


def test_a_proposal_in_a_higher_term_supersedes_an_earlier_vote() -> None:
    other = changed(
        RECORD,
        accepted=RECORD.accepted[:2],
        excluded=(Excluded(C, ExclusionReason.NO_COMMITMENT), Excluded(D, ExclusionReason.NO_COMMITMENT)),
        standing=standing(accepted=ACCEPTED[:2]),
    )
    assert vote(other, term=3, acceptor=vote(RECORD)) == Acceptor(0, 3, other.hash)


def other_contribution(**changes: object) -> Record:
    given = contribution(B, PLAN, **changes)
    return changed(RECORD, accepted=(RECORD.accepted[0], Accepted(B, given), RECORD.accepted[2]))


def with_plan(**fields: object) -> Record:
    return changed(RECORD, plan=changed(PLAN, **fields))


SHORT = contribution(B, PLAN, tokens=1)
REFUSED: dict[str, tuple[Record, dict[str, Any]]] = {
    "term 2 is over": (RECORD, {"acceptor": Acceptor(3, 3, RECORD.hash)}),
    "two different records in term 2": (RECORD, {"acceptor": Acceptor(2, 2, b"o" * 32)}),
    "does not follow this node's last record": (with_plan(round=2), {}),
    "does not follow": (with_plan(previous=b"o" * 32), {}),
    "another state": (with_plan(base_root=b"o" * 32), {}),
    "data is not what follows": (with_plan(seed=b"o" * 32), {}),
    "the plan's data": (with_plan(position=4), {}),
    "members are not in ascending order": (with_plan(members=PLAN.members[::-1]), {}),
    "in ascending order": (with_plan(members=(PLAN.members[0], *PLAN.members)), {}),
    "this node is in term 3": (RECORD, {"acceptor": promise(Acceptor(), 3)}),
    "the electorate is not": (with_electorate(RECORD, (A, B, C)), {}),
    "no reconfiguration names another": (changed(RECORD, voting_weights=(W, W, W, W + 1)), {}),
    "names nodes without voting weight": (with_electorate(RECORD, (A, B, STRANGER), reconfiguration=1), {}),
    "voting weights are not those": (with_plan(members=tuple(Member(n, 5, W + (n == A)) for n in (A, B, C, D))), {}),
    "the standing of nodes does not follow": (changed(RECORD, standing=RECORD.standing[1:]), {}),
    "not in ascending order of node": (changed(RECORD, accepted=RECORD.accepted[::-1]), {}),
    "accepted contributions are not": (changed(RECORD, accepted=(RECORD.accepted[0], *RECORD.accepted)), {}),
    "is no member of the round": (
        changed(RECORD, accepted=tuple(sorted((Accepted(STRANGER, REVEALED[A]), *RECORD.accepted), key=by_name))),
        {},
    ),
    "not the one it committed to": (other_contribution(salt=b"o" * 32), {}),
    "the contribution of": (RECORD, {"opened": {A: REVEALED[A], C: REVEALED[C]}}),
    "tokens claimed": (other_contribution(tokens=1), {"opened": REVEALED | {B: SHORT}}),
    "has not been fetched": (RECORD, {"held": frozenset((A, C))}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_an_invalid_record_gets_no_vote(reason: str) -> None:
    record, situation = REFUSED[reason]
    with pytest.raises(Refusal, match=reason):
        vote(record, **situation)


def test_a_reconfiguration_names_survivors_of_the_round() -> None:
    record = with_electorate(RECORD, (A, B, C), reconfiguration=1)
    assert vote(record).record == record.hash


def test_a_plan_that_follows_from_the_chain_is_valid() -> None:
    assert plan_fault(PLAN, CHAIN) is None
    later = Chain(4, b"h" * 32, b"s" * 32, 80)
    assert plan_fault(PLAN, later) is not None
    following = changed(PLAN, round=5, previous=b"h" * 32, base_root=b"s" * 32, seed=round_seed(b"h" * 32), position=80)
    assert plan_fault(following, later) is None


def test_a_member_that_promised_a_term_refuses_earlier_ones() -> None:
    """If the coordinator dies with its quorum, the next one learns of the votes before it proposes."""
    voted = vote(RECORD)
    following = promise(voted, 6)
    assert (following.term, following.record) == (2, RECORD.hash), "the earlier vote is kept"
    assert promise(following, 6) == following
    for term in (1, 2, 5):
        with pytest.raises(Refusal, match="is over"):
            promise(following, term)
        with pytest.raises(Refusal, match="is over"):
            vote(RECORD, term=term, acceptor=following)
    assert vote(RECORD, term=6, acceptor=following) == Acceptor(6, 6, RECORD.hash)


# ---------------------------------------------------------------------------------- sharded rounds

SHARDING = replace(RULES, sharded_from=2)
SHARDED_PLAN = changed(PLAN, exchange="sharded", reducers=2)
COMMITTED = {node: one.commitment(node, RUN_ID, 1) for node, one in REVEALED.items()}
ORDER = reducer_order(SHARDED_PLAN, COMMITTED)
COMMITMENTS = (*COMMITTED.values(), NO_COMMITMENT)
ROOTS = tuple(bytes([group]) * 32 for group in range(3))
SHARDED = changed(RECORD, plan=SHARDED_PLAN, commitments=COMMITMENTS, reducer_order=ORDER, results=ROOTS)


def with_commitments(*commitments: bytes) -> Record:
    """Return ``SHARDED`` with other commitments of A to D, and the reducers that follow from them."""
    order = reducer_order(
        SHARDED_PLAN, {node: one for node, one in zip((A, B, C, D), commitments, strict=True) if one != NO_COMMITMENT}
    )
    return changed(SHARDED, commitments=commitments, reducer_order=order, results=ROOTS[:1] * len(order))


OTHER_ROOTS = (b"o" * 32, *ROOTS[1:])


def test_a_valid_sharded_record_gets_the_vote() -> None:
    for dissenters in ((), (B,)):
        record = changed(SHARDED, dissenters=dissenters)
        assert vote(record, rules=SHARDING, reduced={1: ROOTS[1]}).record == record.hash


def test_any_round_may_use_gather() -> None:
    """A sharded round falls back to it, and it trusts no reducer."""
    assert vote(RECORD, rules=SHARDING).record == RECORD.hash


@pytest.mark.parametrize(
    ("reason", "record"),
    [
        ("a result is not what this node found", changed(SHARDED, results=OTHER_ROOTS)),
        ("not one result for each group", changed(SHARDED, results=ROOTS[:2])),
        ("not one result for each group", changed(SHARDED, results=(*ROOTS, ROOTS[0]))),
        ("not one result for each group", changed(SHARDED, results=())),
        ("order drawn from", changed(SHARDED, reducer_order=(*ORDER[1:], ORDER[0]))),
        ("the reducers are not", changed(SHARDED, reducer_order=(*ORDER[:2], STRANGER))),
        ("the reducers are not", changed(SHARDED, reducer_order=ORDER[:2], results=ROOTS[:2])),
        ("not one commitment for each voter", changed(SHARDED, commitments=COMMITMENTS[:3])),
        (
            "is not the one that was published",
            with_commitments(COMMITMENTS[0], COMMITMENTS[1], COMMITMENTS[2], b"d" * 32),
        ),
        ("is not the one that was published", with_commitments(COMMITMENTS[1], *COMMITMENTS[1:])),
        ("is left out of the commitments", with_commitments(NO_COMMITMENT, *COMMITMENTS[1:])),
        ("not named in ascending order", changed(SHARDED, dissenters=(C, B))),
        ("not named in ascending order", changed(SHARDED, dissenters=(B, B))),
        ("did not reduce", changed(SHARDED, dissenters=(D,))),
        ("contradicts itself", changed(SHARDED, plan=changed(SHARDED_PLAN, reducers=0))),
        ("contradicts itself", changed(SHARDED, plan=changed(SHARDED_PLAN, exchange="gather"))),
        ("as the manifest does", changed(SHARDED, plan=changed(PLAN, exchange="sharded", reducers=1))),
        ("a gathered round has no", changed(RECORD, results=ROOTS)),
        ("a gathered round has no", changed(RECORD, reducer_order=ORDER)),
        ("a gathered round has no", changed(RECORD, commitments=COMMITMENTS)),
        ("a gathered round has no", changed(RECORD, dissenters=(A,))),
    ],
)
def test_an_invalid_sharded_record_gets_no_vote(reason: str, record: Record) -> None:
    with pytest.raises(Refusal, match=reason):
        vote(record, rules=SHARDING, reduced={0: ROOTS[0]})


def test_a_sharded_record_is_refused_unless_the_manifest_allows_it() -> None:
    with pytest.raises(Refusal, match="as the manifest does"):
        vote(SHARDED)


PROBATION = replace(RULES, probation=3)
BEFORE = (Standing(A, 3, 1, 0, 0, 0, W), Standing(B, 3, 1, 0, 0, 0, W), Standing(C, 1, 1, 0, 0, 200, 0))
ON_PROBATION: dict[str, Any] = {"rules": PROBATION, "chain": replace(CHAIN, standing=BEFORE)}
NEW_NODES_PLAN = changed(PLAN, members=tuple(Member(node, 5, W * (node in (A, B))) for node in (A, B, C, D)))
WITH_NEW_NODES = with_electorate(
    changed(
        RECORD,
        plan=NEW_NODES_PLAN,
        standing=standing(BEFORE, PROBATION, plan=NEW_NODES_PLAN, electorate={A: W, B: W}),
    ),
    (A, B),
)


def test_every_voter_checks_the_standing_of_new_nodes() -> None:
    assert vote(WITH_NEW_NODES, **ON_PROBATION).record == WITH_NEW_NODES.hash
    assert WITH_NEW_NODES.voters == (A, B)
    assert WITH_NEW_NODES.standing[2] == Standing(C, 2, 1, 0, 0, 400, 0)


def with_weight(weight: int) -> tuple[Standing, ...]:
    """Return the standing of ``WITH_NEW_NODES`` with voting weight for C."""
    return (*WITH_NEW_NODES.standing[:2], changed(WITH_NEW_NODES.standing[2], weight=weight))


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"standing": ()}, "does not follow"),
        ({"standing": WITH_NEW_NODES.standing[:2]}, "does not follow"),
        ({"standing": with_weight(1)}, "does not follow"),
        ({"standing": with_weight(W)}, "does not follow"),
        ({"electorate": (A, B, C), "voting_weights": (W, W, W)}, "the electorate is not"),
        ({"electorate": (C,), "voting_weights": (W,), "reconfiguration": 1}, "without voting weight"),
        ({"plan": PLAN}, "voting weights are not those"),
        ({"plan": PLAN, "reconfiguration": 1}, "voting weights are not those"),
        ({"plan": changed(PLAN, members=tuple(Member(n, 5, 0) for n in (A, B, C, D)))}, "voting weights are not"),
        ({"plan": changed(PLAN, members=(Member(C, 5, 0),)), "accepted": ACCEPTED[2:]}, "leaves out more than half"),
    ],
)
def test_a_record_that_grants_unearned_weight_gets_no_vote(lie: dict[str, Any], reason: str) -> None:
    with pytest.raises(Refusal, match=reason):
        vote(changed(WITH_NEW_NODES, **lie), **ON_PROBATION)

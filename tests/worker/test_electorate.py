"""A coordinator cannot take a run away from voters that are connected, nor replace the state that they computed."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from psyche.coordinator.status import StateAttestations
from psyche.protocol.messages import Record
from psyche.protocol.round_state import State
from psyche.protocol.standing import FOUNDER_WEIGHT
from psyche.protocol.takeover import MINORITY_SILENCES
from psyche.worker.node_state import ElectorateReplaced, NodeState
from tests.protocol.one_leader import GENESIS, RULES, with_electorate
from tests.protocol.test_acceptor import RECORD, A, B, C, D

WEIGHTS = dict.fromkeys((A, B, C, D), FOUNDER_WEIGHT)
SILENCE = 15.0


def node(name: str, contact_seconds: float) -> NodeState:
    """Return the state of a node with RECORD's weights that has been connected for ``contact_seconds``."""
    state = NodeState.__new__(NodeState)
    run = SimpleNamespace(deadlines=SimpleNamespace(silence=SILENCE))
    state._replica = SimpleNamespace(node=name, chain=SimpleNamespace(weights=WEIGHTS), run=run)  # type: ignore[assignment]
    state._contact_seconds = lambda: contact_seconds
    return state


def one_voter_only() -> Record:
    """Return a record in which the coordinator makes its friend A the only voter."""
    return with_electorate(RECORD, (A,), reconfiguration=1)


def test_a_connected_voter_does_not_follow_a_minority_that_drops_it() -> None:
    with pytest.raises(ElectorateReplaced, match=r"certified by 25% of the voting weight, without this node"):
        node(B, MINORITY_SILENCES * SILENCE + 1)._check_electorate(one_voter_only())


@pytest.mark.parametrize(
    ("name", "contact", "record"),
    [
        (B, 60.0, one_voter_only()),  # it was away, so the others may have waited for it
        (A, 1e6, one_voter_only()),  # it is not dropped
        (
            B,
            1e6,
            with_electorate(RECORD, (A, C), reconfiguration=1),
        ),  # half of the weight continues; B keeps its weight
        (B, 1e6, RECORD),
    ],
)
def test_other_electorates_are_followed(name: str, contact: float, record: Record) -> None:
    node(name, contact)._check_electorate(record)


def test_a_status_carries_just_enough_attestations_to_prove_the_state() -> None:
    state = replace(State.initial(RULES), rounds=1, state_root=GENESIS, electorate=(A, B, C, D), standing=())
    held = StateAttestations()
    assert held.proof(state) == ()
    for name in (A, B):
        held.add(name, 1, GENESIS, name.encode())
    held.add(C, 1, b"x" * 32, b"another state")
    assert held.proof(state) == (A.encode(), B.encode())
    held.add(D, 1, GENESIS, D.encode())
    assert held.proof(state) == (A.encode(), B.encode(), D.encode())
    assert held.proof(replace(state, rounds=2)) == ()

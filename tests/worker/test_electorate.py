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
    """A node with the weights of RECORD that has been connected for so long."""
    state = NodeState.__new__(NodeState)
    run = SimpleNamespace(deadlines=SimpleNamespace(silence=SILENCE))
    state._replica = SimpleNamespace(node=name, chain=SimpleNamespace(weights=WEIGHTS), run=run)  # type: ignore[assignment]
    state._contact_seconds = lambda: contact_seconds
    return state


def friend_alone() -> Record:
    """The coordinator names its friend A the only voter: five honest voters voted for such a plan once."""
    return with_electorate(RECORD, (A,), reconfiguration=1)


def test_a_connected_voter_does_not_follow_a_minority_that_drops_it() -> None:
    with pytest.raises(ElectorateReplaced, match=r"certified by 25% of the voting weight, without this node"):
        node(B, MINORITY_SILENCES * SILENCE + 1)._check_electorate(friend_alone())


@pytest.mark.parametrize(
    ("name", "contact", "record"),
    [
        (B, 60.0, friend_alone()),  # it was away, so the others may have waited for it in vain
        (A, 1e6, friend_alone()),  # it is not dropped
        (B, 1e6, with_electorate(RECORD, (A, C), reconfiguration=1)),  # half of the weight goes on; B keeps its weight
        (B, 1e6, RECORD),
    ],
)
def test_other_electorates_are_followed(name: str, contact: float, record: Record) -> None:
    node(name, contact)._check_electorate(record)


def test_a_status_proves_the_state_with_as_few_statements_as_it_takes() -> None:
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

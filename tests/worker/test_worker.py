"""Which run statuses make a worker act."""

from __future__ import annotations

from psyche.protocol.messages import Plan, RunStatus
from psyche.protocol.round_state import Phase
from psyche.worker.worker import needs_action
from tests.protocol.one_leader import RULES
from tests.protocol.test_acceptor import CHAIN, PLAN, changed


def status_with(
    plan: Plan | None, phase: Phase = Phase.TRAINING, rounds: int = 0, root: bytes = CHAIN.state_root
) -> RunStatus:
    return RunStatus(1, 1, b"", phase, rounds, root, plan, 60.0, False, (), (), None, None, None, (), "")


def test_a_worker_acts_on_a_plan_for_its_state_a_later_state_and_the_end() -> None:
    assert not needs_action(status_with(None, Phase.WAITING), CHAIN, RULES)
    assert needs_action(status_with(PLAN), CHAIN, RULES)
    assert needs_action(status_with(None, Phase.WAITING, rounds=1, root=b"x" * 32), CHAIN, RULES)
    assert needs_action(status_with(None, Phase.FINISHED), CHAIN, RULES)
    assert not needs_action(status_with(changed(PLAN, base_root=b"x" * 32)), CHAIN, RULES)


def test_a_worker_ignores_a_plan_with_more_than_h_steps() -> None:
    """Also when only another member gets more: no voter would accept the record."""
    for at, member in enumerate(PLAN.members):
        more = changed(member, inner_steps=RULES.inner_steps + 1)
        excessive = changed(PLAN, members=(*PLAN.members[:at], more, *PLAN.members[at + 1 :]))
        assert not needs_action(status_with(excessive), CHAIN, RULES)
    fewer = changed(PLAN, members=tuple(changed(member, inner_steps=1) for member in PLAN.members))
    assert needs_action(status_with(fewer), CHAIN, RULES)

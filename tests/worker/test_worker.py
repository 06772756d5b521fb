"""What a node sees on its coordinator's board, and what it does about it."""

from __future__ import annotations

from psyche.protocol.messages import Plan, RunStatus
from psyche.protocol.round_state import Phase
from psyche.worker.worker import needs_action
from tests.protocol.one_leader import RULES
from tests.protocol.test_acceptor import CHAIN, PLAN, changed


def showing(
    plan: Plan | None, phase: Phase = Phase.TRAINING, rounds: int = 0, root: bytes = CHAIN.state_root
) -> RunStatus:
    return RunStatus(1, 1, b"", phase, rounds, root, plan, 60.0, False, (), (), None, None, None, (), "")


def test_a_plan_a_later_state_and_the_end_concern_it_and_nothing_else_does() -> None:
    assert not needs_action(showing(None, Phase.WAITING), CHAIN, RULES)
    assert needs_action(showing(PLAN), CHAIN, RULES)
    assert needs_action(showing(None, Phase.WAITING, rounds=1, root=b"x" * 32), CHAIN, RULES)
    assert needs_action(showing(None, Phase.FINISHED), CHAIN, RULES)
    assert not needs_action(showing(changed(PLAN, base_root=b"x" * 32)), CHAIN, RULES)


def test_it_takes_no_part_in_a_round_that_asks_for_more_than_h() -> None:
    """Nor where it is another member that is asked: the record would get nobody's vote."""
    for at, member in enumerate(PLAN.members):
        more = changed(member, inner_steps=RULES.inner_steps + 1)
        generous = changed(PLAN, members=(*PLAN.members[:at], more, *PLAN.members[at + 1 :]))
        assert not needs_action(showing(generous), CHAIN, RULES)
    fewer = changed(PLAN, members=tuple(changed(member, inner_steps=1) for member in PLAN.members))
    assert needs_action(showing(fewer), CHAIN, RULES)

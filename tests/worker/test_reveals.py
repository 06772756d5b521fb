"""What a member believes of the others' contributions: real keys, and a coordinator that shows whatever it likes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from psyche.protocol.messages import Commitment, RunStatus
from psyche.worker.voter import Reveals
from tests.protocol.one_leader import RUN_ID, contribution
from tests.protocol.test_certificates import MEMBERS, NAMES, PLAN, STRANGER, sealed

AUTHOR, OTHER = MEMBERS[:2]
WORK = contribution(AUTHOR.peer_id, PLAN)
DIGEST = WORK.commitment(AUTHOR.peer_id, RUN_ID, PLAN.round)
COMMITTED, OPENED = sealed(AUTHOR, Commitment(DIGEST, PLAN.term)), sealed(AUTHOR, WORK)


def status(commitments: Sequence[bytes], contributions: Sequence[bytes]) -> RunStatus:
    return RunStatus(
        version=1,
        term=1,
        claim=b"",
        phase="certifying",
        rounds=0,
        state_root=PLAN.base_root,
        plan=PLAN,
        allowed=0.0,
        mostly_done=False,
        commitments=tuple(commitments),
        contributions=tuple(contributions),
        reducing=None,
        proposal=None,
        certificate=None,
        attestations=(),
        note="",
    )


def shown(commitments: Sequence[bytes], contributions: Sequence[bytes]) -> dict[str, object]:
    """What a member believes after a board with these commitments, and one with these reveals, too."""
    reveals = Reveals(RUN_ID, PLAN)
    reveals.update(status(commitments, ()))
    reveals.update(status(commitments, contributions))
    return dict(reveals.contributions)


def test_what_was_committed_to_and_opened_is_believed() -> None:
    assert shown([COMMITTED], [OPENED]) == {AUTHOR.peer_id: WORK}


@pytest.mark.parametrize(
    ("commitments", "contributions"),
    {
        "never committed to": ([], [OPENED]),
        "committed to something else": ([sealed(AUTHOR, Commitment(b"d" * 32, PLAN.term))], [OPENED]),
        "committed to by another": ([sealed(OTHER, Commitment(DIGEST, PLAN.term))], [OPENED]),
        "committed to in another attempt": ([sealed(AUTHOR, Commitment(DIGEST, PLAN.term + 1))], [OPENED]),
        "committed to in another round": ([sealed(AUTHOR, Commitment(DIGEST, PLAN.term), round_number=2)], [OPENED]),
        "committed to in another run": ([sealed(AUTHOR, Commitment(DIGEST, 1), run_id=b"x" * 32)], [OPENED]),
        "copied": ([sealed(OTHER, Commitment(DIGEST, PLAN.term))], [sealed(OTHER, WORK)]),
        "commitment tampered with": ([COMMITTED[:-1] + bytes([COMMITTED[-1] ^ 1])], [OPENED]),
        "opening tampered with": ([COMMITTED], [OPENED[:-1] + bytes([OPENED[-1] ^ 1])]),
        "no member": (
            [sealed(STRANGER, Commitment(WORK.commitment(STRANGER.peer_id, RUN_ID, 1), PLAN.term))],
            [sealed(STRANGER, WORK)],
        ),
        "not a message": ([b"\xc1"], [b"", b"\xff" * 100]),
    }.values(),
)
def test_nothing_else_is(commitments: list[bytes], contributions: list[bytes]) -> None:
    assert shown(commitments, contributions) == {}


def test_a_board_full_of_others_does_not_hide_an_honest_one() -> None:
    noise = [b"\xc1", sealed(STRANGER, Commitment(DIGEST, PLAN.term)), sealed(OTHER, Commitment(b"d" * 32, PLAN.term))]
    assert list(shown([*noise, COMMITTED], [b"", sealed(OTHER, WORK), OPENED])) == [NAMES[0]]


def test_a_commitment_stands_and_none_is_added_once_others_can_be_seen() -> None:
    reveals = Reveals(RUN_ID, PLAN)
    reveals.update(status([COMMITTED], []))
    later = contribution(OTHER.peer_id, PLAN)
    digest = later.commitment(OTHER.peer_id, RUN_ID, PLAN.round)
    changed = [sealed(AUTHOR, Commitment(b"d" * 32, PLAN.term)), sealed(OTHER, Commitment(digest, PLAN.term))]
    assert reveals.update(status([*changed, COMMITTED], [OPENED, sealed(OTHER, later)])) == [AUTHOR.peer_id]

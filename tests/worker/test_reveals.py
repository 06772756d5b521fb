"""Reveals that a member accepts from its coordinator's run status, with real keys."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from psyche.protocol.messages import Commitment, RunStatus
from psyche.worker.voter import Reveals
from tests.protocol.one_leader import RUN_ID, contribution
from tests.protocol.test_certificates import MEMBERS, NAMES, PLAN, STRANGER, signed_message

AUTHOR, OTHER = MEMBERS[:2]
WORK = contribution(AUTHOR.peer_id, PLAN)
DIGEST = WORK.commitment(AUTHOR.peer_id, RUN_ID, PLAN.round)
COMMITTED, REVEALED = signed_message(AUTHOR, Commitment(DIGEST, PLAN.term)), signed_message(AUTHOR, WORK)


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


def reveals_after(commitments: Sequence[bytes], contributions: Sequence[bytes]) -> dict[str, object]:
    """Return the accepted reveals after a status with these commitments, then one with the reveals as well."""
    reveals = Reveals(RUN_ID, PLAN)
    reveals.update(status(commitments, ()))
    reveals.update(status(commitments, contributions))
    return dict(reveals.contributions)


def test_a_reveal_that_matches_its_commitment_is_accepted() -> None:
    assert reveals_after([COMMITTED], [REVEALED]) == {AUTHOR.peer_id: WORK}


@pytest.mark.parametrize(
    ("commitments", "contributions"),
    {
        "never committed to": ([], [REVEALED]),
        "committed to something else": ([signed_message(AUTHOR, Commitment(b"d" * 32, PLAN.term))], [REVEALED]),
        "committed to by another": ([signed_message(OTHER, Commitment(DIGEST, PLAN.term))], [REVEALED]),
        "committed to in another attempt": ([signed_message(AUTHOR, Commitment(DIGEST, PLAN.term + 1))], [REVEALED]),
        "committed to in another round": (
            [signed_message(AUTHOR, Commitment(DIGEST, PLAN.term), round_number=2)],
            [REVEALED],
        ),
        "committed to in another run": ([signed_message(AUTHOR, Commitment(DIGEST, 1), run_id=b"x" * 32)], [REVEALED]),
        "copied": ([signed_message(OTHER, Commitment(DIGEST, PLAN.term))], [signed_message(OTHER, WORK)]),
        "commitment tampered with": ([COMMITTED[:-1] + bytes([COMMITTED[-1] ^ 1])], [REVEALED]),
        "reveal tampered with": ([COMMITTED], [REVEALED[:-1] + bytes([REVEALED[-1] ^ 1])]),
        "no member": (
            [signed_message(STRANGER, Commitment(WORK.commitment(STRANGER.peer_id, RUN_ID, 1), PLAN.term))],
            [signed_message(STRANGER, WORK)],
        ),
        "not a message": ([b"\xc1"], [b"", b"\xff" * 100]),
    }.values(),
)
def test_a_reveal_without_its_own_matching_commitment_is_ignored(
    commitments: list[bytes], contributions: list[bytes]
) -> None:
    assert reveals_after(commitments, contributions) == {}


def test_invalid_messages_do_not_hide_an_honest_reveal() -> None:
    noise = [
        b"\xc1",
        signed_message(STRANGER, Commitment(DIGEST, PLAN.term)),
        signed_message(OTHER, Commitment(b"d" * 32, PLAN.term)),
    ]
    assert list(reveals_after([*noise, COMMITTED], [b"", signed_message(OTHER, WORK), REVEALED])) == [NAMES[0]]


def test_commitments_are_fixed_once_reveals_arrive() -> None:
    reveals = Reveals(RUN_ID, PLAN)
    reveals.update(status([COMMITTED], []))
    later = contribution(OTHER.peer_id, PLAN)
    digest = later.commitment(OTHER.peer_id, RUN_ID, PLAN.round)
    changed = [
        signed_message(AUTHOR, Commitment(b"d" * 32, PLAN.term)),
        signed_message(OTHER, Commitment(digest, PLAN.term)),
    ]
    assert reveals.update(status([*changed, COMMITTED], [REVEALED, signed_message(OTHER, later)])) == [AUTHOR.peer_id]

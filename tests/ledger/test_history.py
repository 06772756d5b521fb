"""A ledger with gaps is completed from any peer that has the rounds; rounds that do not link are refused."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.ledger.credit_report import credit_report
from psyche.ledger.history import HistoryFetcher
from psyche.ledger.store import NAME, Ledger
from psyche.ledger.writer import writing
from psyche.network.rpc import Rpc
from tests.chains import MANIFEST, RULES, Link, chain
from tests.ledger.test_chain_sync import Peers

CHAIN = chain(8)
FORK = chain(8, left_out=lambda round_number: 2)


def completed(
    directory: Path, held: Sequence[Link], *, follow: bool = False, steps: int = 20, **peers: Sequence[Link] | bytes
) -> list[int]:
    """Return the rounds of a ledger with ``held`` after ``steps`` with these peers; all must be of CHAIN."""
    path = directory / NAME
    with Ledger.open(path, RULES.run_id) as ledger:
        for one in held:
            ledger.append(one.certificate, one.record, one.root)

    async def main() -> None:
        async def known() -> Sequence[str]:
            return list(peers)

        async with writing(Ledger.open(path, RULES.run_id), lambda text: None) as writer:
            fetcher = HistoryFetcher(MANIFEST, cast(Rpc, Peers(**peers)), writer, known, follow=follow)
            for _ in range(steps):
                await fetcher.step()

    asyncio.run(main())
    with Ledger.read(path) as ledger:
        rounds = ledger.rounds()
        assert all(ledger.hash_of(number) == CHAIN[number - 1].record.hash for number in rounds)
    return rounds


@given(st.sets(st.integers(1, 8), min_size=1))
@settings(max_examples=25)
def test_any_gaps_are_filled(held: set[int]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        mine = [CHAIN[number - 1] for number in sorted(held)]
        assert completed(Path(directory), mine, good=CHAIN) == list(range(1, max(held) + 1))


def test_a_coordinator_follows_and_starts_from_nothing(tmp_path: Path) -> None:
    assert completed(tmp_path, [], follow=True, good=CHAIN) == list(range(1, 9))


def test_a_member_does_not_take_rounds_that_it_has_not_applied(tmp_path: Path) -> None:
    assert completed(tmp_path, CHAIN[:3], good=CHAIN) == [1, 2, 3]


def test_rounds_that_do_not_link_are_not_entered(tmp_path: Path) -> None:
    damaged = [*CHAIN[:5], Link(CHAIN[5].certificate[:-1] + b"x", CHAIN[5].record, CHAIN[5].root), *CHAIN[6:]]
    for number, peer in enumerate((FORK, b"noise", b"\xff" * 40, (), CHAIN[4:5], damaged[5:6])):
        (directory := tmp_path / str(number)).mkdir()
        assert completed(directory, [CHAIN[2], CHAIN[6]], steps=3, bad=peer) == [3, 7]


def test_a_forging_peer_does_not_hide_an_honest_one(tmp_path: Path) -> None:
    found = completed(tmp_path, [CHAIN[7]], forger=FORK, noise=b"\xff" * 40, good=CHAIN)
    assert found == list(range(1, 9))


def test_completed_ledgers_give_the_same_credits(tmp_path: Path) -> None:
    """Before, six ledgers of one run gave four totals, from 1.2 to 3.9 million."""
    reports = []
    for name, held in (("first", CHAIN), ("late", CHAIN[5:]), ("away", [*CHAIN[:2], *CHAIN[6:]])):
        (directory := tmp_path / name).mkdir()
        completed(directory, held, good=CHAIN)
        with Ledger.read(directory / NAME) as ledger:
            reports.append(credit_report(ledger, MANIFEST))
    assert not reports[0].missing
    assert reports[1:] == reports[:1] * 2

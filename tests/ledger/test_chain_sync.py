"""What others tell of the past is believed for its proofs alone, and one who tells nonsense hides nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import cast

import msgspec

from psyche.ledger.chain_sync import Certificates, ChainFetcher
from psyche.network.rpc import Rpc
from psyche.network.transport import Unreachable
from psyche.protocol.acceptor import Chain
from psyche.protocol.messages import Record
from tests.chains import MANIFEST, NAMES, RULES, Link, chain, link
from tests.protocol.one_leader import with_electorate

CHAIN = chain(6)
FORGED = chain(6, flavour=b"forged")
START = Chain(0, RULES.run_id, RULES.genesis, 0)


class Others:
    """Peers by name: the certificates each has, or what it says instead."""

    def __init__(self, **peers: Sequence[Link] | bytes) -> None:
        self.peers = peers

    async def call(self, peer: str, name: str, request: bytes, *, timeout: float, max_reply: int) -> bytes:  # noqa: ASYNC109
        found = self.peers.get(peer)
        if found is None:
            raise Unreachable(peer, "is away")
        if isinstance(found, bytes):
            return found
        first = int.from_bytes(request, "little")
        wanted = (link.certificate for link in found if link.record.plan.round >= first)
        return msgspec.msgpack.encode(Certificates(tuple(wanted)))


def at(link: Link) -> Chain:
    return Chain(link.record.plan.round, link.record.hash, link.root, 0, link.record.standing)


def after(others: Others, chain: Chain, *asked: str) -> list[int]:
    found = asyncio.run(ChainFetcher(MANIFEST, cast(Rpc, others)).fetch_after(chain, asked))
    return [record.plan.round for record, _ in found]


def test_who_tells_nonsense_or_is_away_hides_nobody_else() -> None:
    others = Others(
        noise=b"\xff" * 50,
        empty=(),
        forger=FORGED,
        late=CHAIN[4:],
        good=CHAIN,
    )
    asked = ("away", "noise", "empty", "forger", "late", "good")
    assert after(others, at(CHAIN[1]), *asked) == [3, 4, 5, 6]
    assert after(others, at(CHAIN[1]), *asked[:-1]) == []


def test_a_gap_ends_what_is_believed() -> None:
    assert after(Others(good=[*CHAIN[:2], *CHAIN[3:]]), START, "good") == [1, 2]


def test_voters_that_nobody_named_are_not_believed() -> None:
    """They are no fewer, and coordinators sealed what they decided; but the record before named others."""

    def usurped(record: Record) -> Record:
        return with_electorate(record, NAMES[1:])

    third = link(CHAIN[1], mend=usurped)
    assert after(Others(good=[*CHAIN[:2], third]), START, "good") == [1, 2]


def before(others: Others, link: Link, first: int, *asked: str) -> list[int]:
    """Rounds of the records that are believed to lead up to ``link``."""
    fetcher = ChainFetcher(MANIFEST, cast(Rpc, others))
    found = asyncio.run(fetcher.fetch_before(link.record, first, asked))
    assert all(found[round_number] == CHAIN[round_number - 1].record for round_number in found)
    return sorted(found)


def test_older_rounds_are_believed_where_each_is_named_by_the_one_after_it() -> None:
    others = Others(
        forged=FORGED, gap=[*CHAIN[:1], *CHAIN[2:]], late=CHAIN[2:], nonsense=b"\xc1", empty=[], honest=CHAIN
    )
    liars = ("forged", "gap", "late", "nonsense", "empty", "away")
    assert before(others, CHAIN[4], 1, *liars) == []
    assert before(others, CHAIN[4], 1, *liars, "honest") == [1, 2, 3, 4]
    assert before(others, CHAIN[4], 3, "late") == [3, 4]

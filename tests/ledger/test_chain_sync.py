"""Certificates from peers are accepted only if they are proven; an invalid peer does not hide valid ones."""

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


class Peers:
    """Peers by name: the certificates each has, or the bytes it answers instead."""

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


def after(peers: Peers, chain: Chain, *asked: str) -> list[int]:
    found = asyncio.run(ChainFetcher(MANIFEST, cast(Rpc, peers)).fetch_after(chain, asked))
    return [record.plan.round for record, _ in found]


def test_invalid_or_absent_peers_do_not_hide_a_valid_one() -> None:
    peers = Peers(
        noise=b"\xff" * 50,
        empty=(),
        forger=FORGED,
        late=CHAIN[4:],
        good=CHAIN,
    )
    asked = ("away", "noise", "empty", "forger", "late", "good")
    assert after(peers, at(CHAIN[1]), *asked) == [3, 4, 5, 6]
    assert after(peers, at(CHAIN[1]), *asked[:-1]) == []


def test_rounds_after_a_gap_are_not_accepted() -> None:
    assert after(Peers(good=[*CHAIN[:2], *CHAIN[3:]]), START, "good") == [1, 2]


def test_an_electorate_that_the_previous_record_does_not_name_is_not_accepted() -> None:
    """Coordinators sealed its decision, and it is no smaller; but the previous record names others."""

    def with_other_electorate(record: Record) -> Record:
        return with_electorate(record, NAMES[1:])

    third = link(CHAIN[1], edit=with_other_electorate)
    assert after(Peers(good=[*CHAIN[:2], third]), START, "good") == [1, 2]


def before(peers: Peers, link: Link, first: int, *asked: str) -> list[int]:
    """Return the accepted rounds that lead up to ``link``."""
    fetcher = ChainFetcher(MANIFEST, cast(Rpc, peers))
    found = asyncio.run(fetcher.fetch_before(link.record, first, asked))
    assert all(found[round_number] == CHAIN[round_number - 1].record for round_number in found)
    return sorted(found)


def test_older_rounds_are_accepted_if_each_is_named_by_its_successor() -> None:
    peers = Peers(forged=FORGED, gap=[*CHAIN[:1], *CHAIN[2:]], late=CHAIN[2:], nonsense=b"\xc1", empty=[], honest=CHAIN)
    invalid = ("forged", "gap", "late", "nonsense", "empty", "away")
    assert before(peers, CHAIN[4], 1, *invalid) == []
    assert before(peers, CHAIN[4], 1, *invalid, "honest") == [1, 2, 3, 4]
    assert before(peers, CHAIN[4], 3, "late") == [3, 4]

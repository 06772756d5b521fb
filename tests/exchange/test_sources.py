"""Where a node that is behind finds what a round took, when those who made it are gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from psyche.exchange.base import BlobTransport, Exchange
from psyche.exchange.gather import Gather
from psyche.exchange.journal import Journal
from psyche.exchange.shape import Shape
from psyche.exchange.sharded import Sharded
from psyche.exchange.shelf import BlobRetention
from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.network.transport import FetchError
from psyche.numerics.codecs.registry import codec
from psyche.numerics.digest import payload_root
from psyche.protocol.messages import Accepted, Contribution, Member, Plan, Record
from psyche.protocol.verdicts import EMPTY
from tests.exchange.plain import MERGE

INT8, COUNT = codec("int8"), 4096


async def joined(directory: Path, name: str, *known: NetworkNode) -> tuple[NetworkNode, BlobTransport]:
    node = await NetworkNode.create(
        Identity.load_or_create(directory / f"{name}.key"),
        run_id=bytes(32),
        kinds=("m",),
        listen=["/ip4/127.0.0.1/tcp/0"],
        bootstrap=[address for other in known for address in await other.addresses()],
    )
    return node, BlobTransport(
        node, BlobRetention(node), Journal(directory / name, pytest.fail), node.peer_id, _no_liar
    )


def _no_liar(peer: str, what: str) -> None:
    pytest.fail(f"{peer}: {what}")


@pytest.mark.parametrize("reducers", [0, 1])
def test_what_a_round_took_is_had_from_who_followed_it_when_its_only_member_is_gone(
    tmp_path: Path, reducers: int
) -> None:
    async def main() -> None:
        author, of_author = await joined(tmp_path, "author")
        follower, of_follower = await joined(tmp_path, "follower", author)
        payload = [INT8.encode(torch.randn(COUNT), torch.zeros(COUNT), None, 0.0)]
        plan = Plan(
            1,
            1,
            bytes(32),
            bytes(32),
            bytes(32),
            0,
            "sharded" if reducers else "gather",
            reducers,
            (Member(author.peer_id, 1, 1),),
        )
        root = payload_root(payload)
        given = Contribution(*[bytes(32)] * 6, root, len(payload[0]), 1, 0, 1, False, b"", bytes(32))
        alone = (author.peer_id,)
        reducer_order, results = (alone, (root,)) if reducers else ((), ())
        record = Record(
            plan, (Accepted(author.peer_id, given),), (), 1, alone, alone, (), EMPTY, reducer_order, results, ()
        )

        def side(wire: BlobTransport) -> Exchange:
            shape = Shape(INT8, (COUNT,))
            return Sharded(wire, plan, shape, MERGE, INT8) if reducers else Gather(wire, plan, shape, MERGE)

        await side(of_author).offer(payload)
        await side(of_follower).prepare(record)
        await author.close()
        late, of_late = await joined(tmp_path, "late", follower)
        try:
            with pytest.raises(FetchError):
                await side(of_late).prepare(record)
            behind = side(of_late)
            behind.others = [follower.peer_id]
            gradient, found, expected = await behind.prepare(record), torch.empty(COUNT), torch.zeros(COUNT)
            gradient(0, found)
            INT8.decode_add(payload[0], 1.0, expected)
            assert torch.equal(found, expected)
        finally:
            await late.close()
            await follower.close()

    asyncio.run(main())

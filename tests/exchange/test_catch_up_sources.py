"""Where a node that is behind finds what a round took, when those who made it are gone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from psyche.exchange.base import Exchange
from psyche.exchange.gather import Gather
from psyche.exchange.payload_journal import PayloadJournal
from psyche.exchange.payload_store import BlobRetention, PayloadLayout, PayloadStore
from psyche.exchange.sharded import Sharded
from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.network.transport import FetchError
from psyche.numerics.codecs.registry import codec
from psyche.numerics.digest import payload_root
from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.messages import Accepted, Contribution, Member, Plan, Record
from tests.exchange.plain_mean import PLAIN_MEAN

INT8, COUNT = codec("int8"), 4096


async def joined(directory: Path, name: str, *known: NetworkNode) -> tuple[NetworkNode, PayloadStore]:
    node = await NetworkNode.create(
        Identity.load_or_create(directory / f"{name}.key"),
        run_id=bytes(32),
        kinds=("m",),
        listen=["/ip4/127.0.0.1/tcp/0"],
        bootstrap=[address for other in known for address in await other.addresses()],
    )
    return node, PayloadStore(
        node, BlobRetention(node.blobs), PayloadJournal(directory / name, pytest.fail), _no_violation
    )


def _no_violation(peer: str, what: str) -> None:
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
            plan, (Accepted(author.peer_id, given),), (), 1, alone, (1,), (), EMPTY, (), reducer_order, results, ()
        )

        def side(store: PayloadStore) -> Exchange:
            layout = PayloadLayout(INT8, (COUNT,))
            return (
                Sharded(store, plan, layout, PLAIN_MEAN, INT8) if reducers else Gather(store, plan, layout, PLAIN_MEAN)
            )

        await side(of_author).publish(payload)
        await side(of_follower).outer_gradient(record)
        await author.close()
        late, of_late = await joined(tmp_path, "late", follower)
        try:
            with pytest.raises(FetchError):
                await side(of_late).outer_gradient(record)
            behind = side(of_late)
            behind.followers = [follower.peer_id]
            gradient, found, expected = await behind.outer_gradient(record), torch.empty(COUNT), torch.zeros(COUNT)
            gradient(0, found)
            INT8.decode_add(payload[0], 1.0, expected)
            assert torch.equal(found, expected)
        finally:
            await late.close()
            await follower.close()

    asyncio.run(main())

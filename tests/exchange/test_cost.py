"""The cost model against the bytes that real nodes move, and what ``auto`` makes of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from psyche.config import Overlap, load_config
from psyche.exchange.cost import ExchangeSizes
from psyche.exchange.gather import Gather
from psyche.exchange.payload_journal import PayloadJournal
from psyche.exchange.payload_store import BlobRetention, PayloadLayout, PayloadStore
from psyche.exchange.sharded import Sharded
from psyche.network.identity import Identity
from psyche.network.node import NetworkNode
from psyche.numerics.backends.selection import fastest_backend
from psyche.numerics.codecs.registry import CODECS, codec
from psyche.numerics.digest import payload_root
from psyche.protocol.assignment import reducer_order
from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.messages import Accepted, Member, Plan, Record, ReductionStatus
from psyche.tools.costs import costs_of
from tests.exchange.plain_mean import PLAIN_MEAN
from tests.protocol.one_leader import contribution
from tests.tiny import write_config

COUNTS = (1 << 18,) * 9 + (1 << 16,)
PEERS = 4


async def start(directory: Path) -> list[NetworkNode]:
    nodes: list[NetworkNode] = []
    for number in range(PEERS):
        identity = Identity.load_or_create(directory / f"{number}.key")
        bootstrap = await nodes[0].addresses() if nodes else ()
        nodes.append(
            await NetworkNode.create(
                identity, run_id=bytes(32), kinds=("m",), listen=["/ip4/127.0.0.1/tcp/0"], bootstrap=bootstrap
            )
        )
    return sorted(nodes, key=lambda node: node.peer_id)


def on_violation(peer: str, what: str) -> None:
    pytest.fail(f"{peer}: {what}")


async def exchanged(directory: Path, nodes: list[NetworkNode], name: str, reducers: int) -> list[torch.Tensor]:
    """One exchange by real nodes; everybody's outer gradient."""
    used, result = fastest_backend().codec(name), fastest_backend().codec("int8")
    plan = Plan(
        1,
        1,
        bytes(32),
        bytes(32),
        bytes(32),
        0,
        "sharded" if reducers else "gather",
        reducers,
        tuple(Member(n.peer_id, 1, 1) for n in nodes),
    )
    stores = [
        PayloadStore(
            node, BlobRetention(node.blobs), PayloadJournal(directory / node.peer_id, pytest.fail), on_violation
        )
        for node in nodes
    ]
    layout = PayloadLayout(used, COUNTS)
    sides = [
        Sharded(store, plan, layout, PLAIN_MEAN, result) if reducers else Gather(store, plan, layout, PLAIN_MEAN)
        for store in stores
    ]
    payloads = [
        [used.encode(torch.randn(count), torch.zeros(count), None, 0.0) for count in COUNTS] for _ in range(PEERS)
    ]
    given = {
        node.peer_id: contribution(
            node.peer_id,
            plan,
            payload_root=payload_root(payload),
            payload_bytes=sum(map(len, payload)),
            inner_steps=1,
            tokens=1,
        )
        for node, payload in zip(nodes, payloads, strict=True)
    }
    order = reducer_order(plan, {node: one.salt for node, one in given.items()}) if reducers else ()
    reducing = ReductionStatus(1, order, (), (), tuple(sorted(given)))
    for side, payload in zip(sides, payloads, strict=True):
        await side.publish(payload)
        if isinstance(side, Sharded):
            side.set_reducers(reducing)
    await asyncio.gather(*(side.fetch_payload(node, given[node]) for side in sides for node in given))
    assert all(side.held == set(given) for side in sides)
    results: dict[int, bytes] = {}
    for side in sides:
        for group, root in (await side.reduce(reducing, given)).items() if isinstance(side, Sharded) else ():
            assert results.setdefault(group, root) == root, "reducers find the same bytes"
    record = Record(
        plan,
        tuple(Accepted(node, given[node]) for node in sorted(given)),
        (),
        1,
        tuple(sorted(given)),
        (1,) * len(given),
        (),
        EMPTY,
        (),
        order,
        tuple(results[group] for group in sorted(results)),
        (),
    )
    gradients = []
    for gradient in await asyncio.gather(*(side.outer_gradient(record) for side in sides)):
        out = [torch.empty(count) for count in COUNTS]
        for number, part in enumerate(out):
            gradient(number, part)
        gradients.append(torch.cat(out))
    return gradients


@pytest.mark.parametrize(("name", "reducers"), [("int8", 0), ("int8", 1), ("int8", 2), ("topk2-512", 0)])
def test_the_model_is_what_is_measured(tmp_path: Path, name: str, reducers: int) -> None:
    async def main() -> None:
        nodes = await start(tmp_path)
        try:
            gradients = await exchanged(tmp_path, nodes, name, reducers)
        finally:
            for node in nodes:
                await node.close()
        assert all(torch.equal(one, gradients[0]) for one in gradients), "the same bits everywhere"
        shapes = ExchangeSizes.of(codec(name), codec("int8"), COUNTS)
        cost = shapes.sharded(PEERS, reducers) if reducers else shapes.gather(PEERS)
        down = sum(node.traffic.bytes_down for node in nodes) / PEERS
        up = sum(node.traffic.bytes_up for node in nodes) / PEERS
        assert abs(down - cost.down) <= 0.02 * cost.down, (down, cost)
        assert abs(up - cost.up) <= 0.02 * cost.up, (up, cost)

    asyncio.run(main())


def test_gather_grows_with_the_peers_and_sharded_hardly_does() -> None:
    shapes = ExchangeSizes.of(codec("int8"), codec("int8"), (1 << 18,) * 96)
    assert shapes.gather(16).up == 5 * shapes.gather(4).up
    one = [shapes.sharded(peers, 1).up for peers in (4, 8, 16, 64)]
    assert one[2] / one[0] == pytest.approx(1.25, abs=0.02), "2(n−1)/n: from few to many it cannot be flat"
    assert one[2] / one[1] < 1.10
    assert one[3] / one[2] < 1.06
    assert shapes.gather(4).seconds(1e6, 1e6) == shapes.gather(4).up / 1e6


def test_every_codec_has_a_result_codec_that_is_no_coarser() -> None:
    for name in CODECS:
        result = CODECS[name].result_codec
        assert codec(result).expected_bytes(1 << 18) >= 0.9 * codec(name).expected_bytes(1 << 18), (name, result)
    assert CODECS["topk2e"].result_codec == "topk2e-512", "the same values as topk2-512 in fewer bytes"
    assert CODECS["topk2-256"].result_codec == "int2"


def test_more_reducers_than_peers_are_as_many_as_there_are() -> None:
    shapes = ExchangeSizes.of(codec("int8"), codec("int8"), (1 << 18,) * 8)
    assert shapes.sharded(2, 5) == shapes.sharded(2, 2)
    assert shapes.sharded(1, 2).up == shapes.gather(1).up == 0


@pytest.mark.parametrize(
    ("kind", "members", "taken"), [("gather", 64, "gather"), ("sharded", 2, "sharded"), ("auto", 2, "gather")]
)
def test_a_run_costs_what_its_exchange_costs(tmp_path: Path, kind: str, members: int, taken: str) -> None:
    run = load_config(write_config(tmp_path, members=members, exchange={"kind": kind})).run
    costs = costs_of(run)
    assert costs.exchange == (costs.sharded if taken == "sharded" else costs.gather)
    assert costs.bytes_per_token == members * costs.exchange.up / costs.tokens_per_round
    told = dict(costs.lines())
    assert told["exchange used"].startswith(taken)
    assert "100 Mbit/s" in told["exchange by gather"]
    assert "1 Gbit/s" in told["sharded, 2 reducers a slice"]


def test_auto_shards_from_where_the_configuration_check_says(tmp_path: Path) -> None:
    run = load_config(write_config(tmp_path, members=2, exchange={"kind": "auto"})).run
    first = costs_of(run).sharded_from
    assert first is not None
    for members in (first - 1, first):
        rounds = run.rounds.model_copy(update={"start_members": members})
        costs = costs_of(run.model_copy(update={"rounds": rounds}))
        assert (costs.exchange is costs.sharded) == (members >= first)
        assert (2 * costs.sharded.up < costs.gather.up) == (members >= first)


def test_utilisation_is_what_the_line_leaves_of_a_round(tmp_path: Path) -> None:
    run = load_config(write_config(tmp_path, members=4, exchange={"kind": "gather"})).run
    costs = costs_of(run)
    assert costs.round_flops > 6 * costs.parameters * run.tokens_per_step * run.rounds.inner_steps
    training, wire = costs.round_flops / 1e9, costs.gather.seconds(1e6, 1e6)
    assert costs.utilisation(1e6, 1e9) == pytest.approx(training / (training + wire))
    assert costs.utilisation(1e15, 1e9) == pytest.approx(1.0)
    hidden = costs_of(run.model_copy(update={"overlap": Overlap(overlap_steps=run.rounds.inner_steps)}))
    assert hidden.overlap_share == 1.0
    assert hidden.utilisation(1e6, costs.round_flops / wire) == pytest.approx(1.0), (
        "it all fits behind the next round's steps"
    )
    assert 0.0 < hidden.utilisation(1e3, 1e12) < 1.0


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_of_the_repository_can_be_launched(path: Path) -> None:
    """Its model builds, its sequences fit the model, and what a round takes is below its deadlines."""
    run = load_config(path).run
    costs = costs_of(run)
    assert run.data.sequence_length <= run.model.settings["max_position_embeddings"]
    assert costs.exchange.seconds(100e6 / 8, 100e6 / 8) < run.deadlines.exchange_max
    expected = {"150m": 150e6, "1b": 1.1e9, "7b": 6.7e9}.get(path.stem)
    assert expected is None or costs.parameters == pytest.approx(expected, rel=0.02)

"""Rejected work, warm-up of a new optimizer, and missing data in a replica."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from psyche.config import load_config
from psyche.data.prepare import prepare
from psyche.data.token_store import BadShard
from psyche.diloco.launch import launch
from psyche.network.identity import Identity
from psyche.protocol.assignment import shards
from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.messages import Accepted, Member, Plan, Record
from psyche.protocol.proposals import round_seed
from tests.tiny import replica, write_config


def test_a_contribution_that_was_not_accepted_is_kept_for_the_next_round(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, members=1))
    identity = Identity.load_or_create(tmp_path / "node.key")
    one = replica(launch(config, identity.peer_id).manifest, config.node, identity)
    chain = one.chain
    member = Member(identity.peer_id, one.run.rounds.inner_steps, 1)
    plan = Plan(1, 1, chain.head, chain.state_root, round_seed(chain.head), 0, "gather", 0, (member,))
    work = one.train(plan)
    assert one.residual is not None
    lost = one.residual.clone()
    one.restore_update(work)
    local = torch.empty_like(one.outer.theta)
    one.engine.read(local)
    learned = one.outer.theta - local
    assert float(learned.abs().max()) > 0
    assert not torch.allclose(lost, learned, atol=0, rtol=1e-3), "the residual alone is not what was learned"
    torch.testing.assert_close(one.residual, learned, rtol=1e-5, atol=1e-9)
    assert one.chain == chain, "nothing of the outer state moved"


def test_a_new_optimizer_is_warmed_up_and_keeps_its_place_in_the_schedule(tmp_path: Path) -> None:
    inner = {"lr": 0.003, "batch_size": 2, "warmup_steps": 3, "fresh_warmup_steps": 2, "schedule": "constant"}
    rounds = {"total": 4, "inner_steps": 4, "start_members": 1}
    config = load_config(write_config(tmp_path, members=1, inner=inner, rounds=rounds))
    identity = Identity.load_or_create(tmp_path / "node.key")
    manifest = launch(config, identity.peer_id).manifest
    there, joined = (replica(manifest, config.node, identity) for _ in range(2))
    lrs: dict[str, list[float]] = {"there": [], "joined": []}
    for round_number in (1, 2):
        chain, member = there.chain, Member(identity.peer_id, 4, 1)
        plan = Plan(
            round_number,
            1,
            chain.head,
            chain.state_root,
            round_seed(chain.head),
            chain.position,
            "gather",
            0,
            (member,),
        )
        work = there.train(plan, on_step=lambda step, loss, lr: lrs["there"].append(lr))
        if round_number == 1:
            node = identity.peer_id
            record = Record(plan, (Accepted(node, work.contribution),), (), 1, (node,), (1,), (), EMPTY, (), (), (), ())
            there.apply(record, there.gradient_of(record, {node: work.payload}))
            joined.adopt(there.outer.clone(), record)
        else:
            joined.train(plan, on_step=lambda step, loss, lr: lrs["joined"].append(lr))
    assert lrs["there"] == [0.001, 0.002, *[0.003] * 6]
    assert lrs["joined"] == [0.0015, *[0.003] * 3]


def test_warming_up_changes_only_the_inner_optimizer(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, members=1))
    identity = Identity.load_or_create(tmp_path / "node.key")
    manifest = launch(config, identity.peer_id).manifest
    cold, warm = (replica(manifest, config.node, identity) for _ in range(2))
    assert warm.warm_up_steps == min(100, config.run.rounds.inner_steps)
    before = warm.chain
    for step in range(warm.warm_up_steps):
        warm.warm_up(step)
    assert warm.chain == before
    assert warm.warm_up_steps == 0, "it has trained"
    member = Member(identity.peer_id, warm.run.rounds.inner_steps, 1)
    plan = Plan(1, 1, before.head, before.state_root, round_seed(before.head), 0, "gather", 0, (member,))
    works = [one.train(plan) for one in (cold, warm)]
    first, second = (work.contribution for work in works)
    assert first.data_digest == second.data_digest
    assert first.base_root == second.base_root
    assert works[1].norm < works[0].norm, "steps of a size that the gradients ask for, not all as large as can be"


def test_steps_before_missing_data_are_submitted(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, members=1, rounds={"total": 2, "inner_steps": 20, "start_members": 1}))
    store = prepare(config.run.data, config.node.cache, vocab_limit=512, shard_bytes=2048)
    identity = Identity.load_or_create(tmp_path / "node.key")
    manifest = launch(config, identity.peer_id).manifest
    some, whole = (replica(manifest, config.node, identity) for _ in range(2))
    chain, member = some.chain, Member(identity.peer_id, 20, 1)
    plan = Plan(1, 1, chain.head, chain.state_root, round_seed(chain.head), 0, "gather", 0, (member,))
    first, second = shards(range(40), store.train.layout, config.run.seed)
    whole_work = whole.train(plan, stop_early=iter([False] * 15 + [True]).__next__)
    store.path_of(store.train.shards[second]).unlink()
    work = some.train(plan)
    assert work.contribution.inner_steps == 16, "32 sequences are in the first shard, 2 in each step"
    assert work.contribution.data_digest == whole_work.contribution.data_digest
    assert work.payload == whole_work.payload
    assert not some.overlapped_step(plan)
    store.path_of(store.train.shards[first]).unlink()
    with pytest.raises(BadShard, match=store.train.shards[first].file):
        replica(manifest, config.node, identity).train(plan)

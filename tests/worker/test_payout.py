"""The payout address of a node's owner is part of its contributions; an invalid one is rejected."""

from __future__ import annotations

from pathlib import Path

import msgspec

from psyche.config import load_config
from psyche.diloco.launch import launch
from psyche.exchange.rules import rules_of
from psyche.network.identity import Identity
from psyche.protocol.contributions import contribution_fault
from psyche.protocol.messages import Member, Plan
from psyche.protocol.proposals import round_seed
from tests.tiny import replica, write_config


def test_a_contribution_carries_a_valid_payout_address(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, members=1))
    identity = Identity.load_or_create(tmp_path / "node.key")
    manifest = launch(config, identity.peer_id).manifest
    one = replica(manifest, config.node, identity)
    one.payout = b"a" * 20
    member = Member(identity.peer_id, one.run.rounds.inner_steps, 1)
    head = one.chain.head
    plan = Plan(1, 1, head, one.chain.state_root, round_seed(head), 0, "gather", 0, (member,))
    given, rules = one.train(plan).contribution, rules_of(manifest)
    assert given.payout == b"a" * 20
    assert contribution_fault(rules, plan, member, given) is None
    for payout, refused in ((b"", False), (b"a" * 19, True)):
        found = contribution_fault(rules, plan, member, msgspec.structs.replace(given, payout=payout))
        assert (found is not None and "payout address" in found) == refused

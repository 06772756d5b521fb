"""Federated mode without a network: what a private node's work says, what it costs, and what it can count for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from psyche.config import Config, Manifest, PrivateData, load_config
from psyche.diloco.launch import launch
from psyche.diloco.local_data import PrivacyBudgetSpent
from psyche.diloco.reference import simulate_rounds
from psyche.diloco.replica import Replica
from psyche.errors import PsycheError
from psyche.exchange.aggregation import Aggregation
from psyche.exchange.rules import rules_of
from psyche.federated.gaussian_mechanism import shrinkage
from psyche.federated.privacy_budget import Budget
from psyche.federated.private_text import PrivateText
from psyche.federated.private_training import PrivateTraining, open_privacy_budget
from psyche.network.bandwidth import Traffic
from psyche.network.identity import Identity
from psyche.protocol.contributions import contribution_fault, weights
from psyche.protocol.messages import WITHHELD, Member, Plan
from psyche.protocol.proposals import round_seed
from psyche.telemetry.metrics import signed_metrics
from psyche.worker.round_metrics import RoundTimer
from tests.tiny import replica, write_config

CLIP, LOTS = 0.05, 1e15
FEDERATED: dict[str, Any] = {"clip": CLIP, "max_share": 0.25}


@dataclass(frozen=True)
class World:
    """A run that allows private data, and nodes for it."""

    directory: Path
    config: Config
    manifest: Manifest

    def public(self, name: str) -> Replica:
        return replica(self.manifest, self.config.node, Identity.load_or_create(self.directory / name / "key"))

    def private(self, name: str, *, noise: float = 1e-6, releases: float = LOTS) -> Replica:
        """A node with text of its own: half of the public one's first sequences. Epsilon is enough for ``releases``."""
        one = self.public(name)
        text = PrivateText(one.store.train.batch(range(20)).astype(np.uint16))
        budget = Budget(self.directory / name, releases, 1e-6, noise)
        one.private = PrivateTraining(text, budget, CLIP, self.config.run.rounds.total)
        return one


def world(directory: Path, **changes: Any) -> World:
    path = write_config(directory, members=1, **({"federated": FEDERATED, "codec": {"name": "fp32"}} | changes))
    config = load_config(path)
    return World(directory, config, launch(config, Identity.load_or_create(directory / "key").peer_id).manifest)


def plan_for(one: Replica) -> Plan:
    chain, member = one.chain, Member(one.node, one.run.rounds.inner_steps, 1)
    return Plan(1, 1, chain.head, chain.state_root, round_seed(chain.head), chain.position, "gather", 0, (member,))


def decoded(one: Replica, payload: Any) -> torch.Tensor:
    out = torch.zeros_like(one.outer.theta)
    for part, encoded in zip(one.slices_of(1), payload, strict=True):
        one.codec.decode_add(encoded, 1.0, out[part])
    return out


def test_a_private_contribution_is_clipped_labelled_and_says_nothing_else(tmp_path: Path) -> None:
    here = world(tmp_path)
    one, public = here.private("private"), here.public("public")
    plan = plan_for(one)
    work = one.train(plan)
    given = work.contribution
    assert given.private
    assert given.data_digest == given.trace_root == WITHHELD
    assert given.tokens == one.run.rounds.inner_steps * one.run.tokens_per_step, "what the plan asks for, as of anybody"
    assert work.norm == pytest.approx(CLIP, rel=1e-3)
    assert public.train(plan_for(public)).norm > 2 * CLIP, "there was something to clip"
    rules = rules_of(here.manifest)
    assert contribution_fault(rules, plan, plan.members[0], given) is None
    reported = RoundTimer().metrics(1, one.node, work, (1.0, 1), 0.0, Traffic())
    assert "train_loss" not in signed_metrics(reported).values


def test_noise_covers_all_parameters_and_no_padding(tmp_path: Path) -> None:
    one = world(tmp_path).private("private", noise=3.0)
    found = decoded(one, one.train(plan_for(one)).payload)
    used = torch.zeros_like(found, dtype=torch.bool)
    for span in one.engine.layout.spans:
        used[span.start : span.stop] = True
    assert found[used].std() == pytest.approx(shrinkage(int(used.sum()), 3.0) * 3.0 * 2 * CLIP, rel=0.02)
    assert not found[~used].any()


@pytest.mark.parametrize("overlap", [{"overlap_steps": 2}, {"fragments": 2, "overlap_steps": 1}])
def test_nothing_trained_is_carried_into_the_next_round_unpaid(tmp_path: Path, overlap: dict[str, int]) -> None:
    """With late steps, or parameters whose turn has not come, x would keep what was not clipped and noised."""
    one = world(tmp_path, overlap=overlap).private("private")
    plan = plan_for(one)
    one.train(plan)
    assert not one.overlapped_step(plan)
    started: list[torch.Tensor] = []
    step = one.engine.step

    def watched(batch: Any, lr: float) -> float:
        if not started:
            started.append(torch.empty_like(one.outer.theta))
            one.engine.read(started[0])
        return step(batch, lr)

    one.engine.step = watched  # type: ignore[method-assign]
    one.train(plan)
    assert torch.equal(started[0], one.outer.theta)


def test_it_is_paid_before_there_is_anything_to_send_and_refused_when_spent(tmp_path: Path) -> None:
    here = world(tmp_path)
    noise = 2.0
    one = here.private("private", noise=noise, releases=0.0)
    budget = Budget(tmp_path / "private", 1e9, 1e-6, noise)
    budget.charge()
    twice = here.private("private", noise=noise, releases=2 * budget.spent)
    plan = plan_for(one)
    codec_encode = twice.codec.encode
    twice.codec.encode = lambda *_: (_ for _ in ()).throw(RuntimeError("power cut"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        twice.train(plan)
    twice.codec.encode = codec_encode  # type: ignore[method-assign]
    again = Budget(tmp_path / "private", 1e9, 1e-6, noise)
    assert again.spent > budget.spent, "what was charged before the cut stays charged"
    with pytest.raises(PrivacyBudgetSpent):
        one.train(plan)
    assert Budget(tmp_path / "private", 1e9, 1e-6, noise).spent == again.spent


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"private": False}, "not marked private"),
        ({"data_digest": bytes(32)}, "reveals a hash of its data"),
        ({"trace_root": bytes(32)}, "reveals a hash of its data"),
    ],
)
def test_a_label_that_cannot_be_right_is_refused(tmp_path: Path, changes: Mapping[str, Any], fault: str) -> None:
    here = world(tmp_path)
    one = here.private("private")
    plan = plan_for(one)
    given = msgspec.structs.replace(one.train(plan).contribution, **changes)
    assert fault in (contribution_fault(rules_of(here.manifest), plan, plan.members[0], given) or "")


def test_a_run_that_does_not_allow_it_takes_no_private_contribution(tmp_path: Path) -> None:
    here = world(tmp_path, federated=None)
    one = here.private("private")
    plan = plan_for(one)
    fault = contribution_fault(rules_of(here.manifest), plan, plan.members[0], one.train(plan).contribution)
    assert fault == "this run takes no contributions from private data"


def test_a_private_majority_moves_the_model_by_its_share(tmp_path: Path) -> None:
    """Two of three are private: all end with the same bits, and the outer gradient has a quarter of theirs."""
    rounds, aggregation = {"total": 3, "inner_steps": 3, "start_members": 3}, {"kind": "mean", "max_share": 1.0}
    here = world(tmp_path, rounds=rounds, aggregation=aggregation)
    public = here.public("public")
    nodes = [public, here.private("private-1"), here.private("private-2")]
    for record, works in simulate_rounds(here.manifest, {one.node: one for one in nodes}):
        assert len({one.chain.state_root for one in nodes}) == 1
        given = {one.node: one.contribution for one in record.accepted}
        counts = weights(record.plan, given, Aggregation.of(here.manifest.run).caps)
        assert {node: counts[node] for node, work in works.items() if not work.contribution.private} == {
            public.node: 0.75
        }
        assert sum(Fraction(weight) for weight in counts.values()) == 1
        if record.plan.round == 1:  # the momentum was zero: now it is the outer gradient
            others = public.outer.momentum - 0.75 * decoded(public, works[public.node].payload)
            assert 0 < float(torch.linalg.vector_norm(others)) <= 0.25 * CLIP * (1 + 1e-6)


def test_a_directory_that_was_private_stays_private(tmp_path: Path) -> None:
    """The moments of its AdamW remember the text, and would say so without noise."""
    here, directory = world(tmp_path), tmp_path / "node"
    own = here.config.node.model_copy(update={"private": PrivateData(path=tmp_path, epsilon=8.0)})
    assert open_privacy_budget(here.manifest, here.config.node, directory) is None
    assert open_privacy_budget(here.manifest, own, directory) is not None
    with pytest.raises(PsycheError, match="has trained on private data"):
        open_privacy_budget(here.manifest, here.config.node, directory)


def test_a_node_with_private_data_does_not_begin_where_they_are_not_taken(tmp_path: Path) -> None:
    here = world(tmp_path, federated=None)
    own = here.config.node.model_copy(update={"private": PrivateData(path=tmp_path, epsilon=8.0)})
    with pytest.raises(PsycheError, match="does not accept contributions from private data"):
        open_privacy_budget(here.manifest, own, tmp_path / "node")

"""Fragments and overlapped steps: local state, exchanged updates, and bit-equal replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor

from psyche.config import load_config
from psyche.diloco.algorithm import NonFiniteParameter
from psyche.diloco.launch import launch
from psyche.diloco.reference import simulate_rounds
from psyche.diloco.replica import LocalUpdate, Replica
from psyche.diloco.trace import Trace
from psyche.errors import ConfigError
from psyche.exchange.rules import rules_of
from psyche.network.identity import Identity
from psyche.numerics.capped_shares import fp32_quotient
from psyche.protocol.acceptor import plan_fault
from psyche.protocol.assignment import next_position, positions
from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.contributions import contribution_fault
from psyche.protocol.messages import Accepted, Member, Plan, Record
from psyche.protocol.proposals import round_seed
from psyche.tools.costs import costs_of
from psyche.training.optimizer_state import pack_state
from tests.protocol.one_leader import nodes
from tests.tiny import replica, write_config

FP32 = {"codec": {"name": "fp32"}, "aggregation": {"kind": "mean"}}


def swarm(directory: Path, members: int, **changes: object) -> dict[str, Replica]:
    """Replicas of one run by node id, all at its beginning."""
    config = load_config(write_config(directory, members=members, **changes))
    identities = [Identity.load_or_create(directory / f"{number}.key") for number in range(members)]
    manifest = launch(config, identities[0].peer_id).manifest
    return {identity.peer_id: replica(manifest, config.node, identity) for identity in identities}


def alone(directory: Path, **changes: object) -> Replica:
    (one,) = swarm(directory, 1, **changes).values()
    return one


def rounds(
    replicas: dict[str, Replica], late: Callable[[int, str], int]
) -> Iterator[tuple[Record, dict[str, LocalUpdate]]]:
    return simulate_rounds(replicas[min(replicas)].manifest, replicas, late)


def plan_for(one: Replica) -> Plan:
    """The next round of a swarm of this node alone."""
    chain, member = one.chain, Member(one.node, one.run.rounds.inner_steps, 1)
    root, seed = chain.state_root, round_seed(chain.head)
    return Plan(chain.rounds + 1, 1, chain.head, root, seed, chain.position, "gather", 0, (member,))


def record_of(plan: Plan, work: LocalUpdate) -> Record:
    node = plan.members[0].node
    return Record(plan, (Accepted(node, work.contribution),), (), 1, (node,), (1,), (), EMPTY, (), (), (), ())


def trained(one: Replica) -> Tensor:
    """x, the parameters that the engine trains."""
    local = torch.empty_like(one.outer.theta)
    one.engine.read(local)
    return local


# ------------------------------------------------------------------------------------- the algorithm


def test_without_overlap_it_is_plain_diloco_to_the_bit(tmp_path: Path) -> None:
    """Plain formulas, all parameters at once: every round starts from θ, and the outer step is Nesterov's."""
    replicas = swarm(tmp_path, 2, **FP32)
    run = replicas[min(replicas)].run
    lr, mu = run.outer.lr, run.outer.momentum
    theta = {node: one.outer.theta.clone() for node, one in replicas.items()}[min(replicas)]
    momentum = torch.zeros_like(theta)
    weight = fp32_quotient(1, 2)
    for _, works in rounds(replicas, lambda round_number, node: 0):
        gradient = torch.zeros_like(theta)
        for node in sorted(replicas):  # fp32 payloads are Δ itself
            delta = torch.zeros_like(theta)
            one = replicas[node]
            for part, encoded in zip(one.slices_of(1), works[node].payload, strict=True):
                one.codec.decode_add(encoded, 1.0, delta[part])
            gradient += delta * weight
        momentum = momentum * mu + gradient
        theta = theta - (momentum * mu + gradient) * lr
        for one in replicas.values():
            assert torch.equal(one.outer.theta, theta)
            assert torch.equal(one.outer.momentum, momentum)
            assert torch.equal(trained(one), theta), "the next round starts from θ"
            assert one.index == one.outer.index(), "what was not hashed again had changed"
    assert all(work.contribution.overlap_steps == 0 for work in works.values())


@pytest.mark.parametrize("codec", ["int8", "topk2"])
@pytest.mark.parametrize("overlap", [{"overlap_steps": 2}, {"fragments": 2, "overlap_steps": 3}, {"fragments": 4}])
def test_replicas_agree_however_many_steps_each_overlaps(tmp_path: Path, codec: str, overlap: dict[str, int]) -> None:
    changes = {"codec": {"name": codec}, "rounds": {"total": 6, "inner_steps": 4, "start_members": 3}}
    replicas = swarm(tmp_path, 3, overlap=overlap, **changes)
    order, most = sorted(replicas), overlap.get("overlap_steps", 0)
    seen, before = set(), replicas[order[0]].outer.theta.clone()
    for record, works in rounds(replicas, lambda round_number, node: (round_number + order.index(node)) % (most + 1)):
        number = record.plan.round
        assert len({one.chain.state_root for one in replicas.values()}) == 1
        seen.add(replicas[order[0]].chain.state_root)
        for rank, node in enumerate(order):
            one = replicas[node]
            taken = (number - 1 + rank) % (most + 1) if number > 1 else 0
            assert works[node].contribution.overlap_steps == taken
            assert works[node].contribution.inner_steps == 4
            assert one.index == one.outer.index(), "what was not hashed again had changed"
        changed = replicas[order[0]].outer.theta != before
        before = replicas[order[0]].outer.theta.clone()
        for part in replicas[order[0]].slices_of(number):
            assert changed[part].any()
            changed[part] = False
        assert not changed.any(), "a round changes the parameters of its own fragment only"
    assert len(seen) == 6
    assert sum(work.contribution.overlap_steps for work in works.values()) > 0 or not most


def test_overlapped_steps_are_kept_on_top_of_the_outer_update(tmp_path: Path) -> None:
    one = alone(tmp_path, **FP32, overlap={"overlap_steps": 3})
    plan = plan_for(one)
    work = one.train(plan)
    snapshot = trained(one)
    assert [one.overlapped_step(plan) for _ in range(5)] == [True, True, True, False, False]
    ahead = trained(one)
    assert not torch.equal(ahead, snapshot)
    one.apply(record_of(plan, work), one.gradient_of(record_of(plan, work), {one.node: work.payload}))
    assert torch.equal(trained(one), ahead + (one.outer.theta - snapshot))
    assert plan_fault(plan_for(one), one.chain) is None
    assert one.train(plan_for(one)).contribution.overlap_steps == 3


def test_the_engine_holds_the_outer_parameters_exactly_when_no_step_overlapped(tmp_path: Path) -> None:
    """x + (θ' − x) is not θ' in floating point; nothing may be left of x all the same."""
    one = alone(tmp_path, overlap={"fragments": 2, "overlap_steps": 3})
    plan = plan_for(one)
    work = one.train(plan)
    snapshot, before = trained(one), one.outer.theta.clone()
    record = record_of(plan, work)
    one.apply(record, one.gradient_of(record, {one.node: work.payload}))
    local, exchanged = trained(one), torch.zeros(len(before), dtype=torch.bool)
    for part in one.slices_of(1):
        exchanged[part] = True
    assert torch.equal(local[exchanged], one.outer.theta[exchanged])
    assert not torch.equal(local[exchanged], before[exchanged])
    assert torch.equal(local[~exchanged], snapshot[~exchanged]), "the other fragment goes on as if nothing had happened"
    assert torch.equal(one.outer.theta[~exchanged], before[~exchanged])


def test_no_steps_overlap_when_there_is_no_next_round(tmp_path: Path) -> None:
    rounds = {"total": 1, "inner_steps": 4, "start_members": 1}
    one = alone(tmp_path, rounds=rounds, overlap={"overlap_steps": 3})
    plan = plan_for(one)
    assert not one.overlapped_step(plan), "before the round's own steps there is nothing to go on from"
    one.train(plan)
    assert not one.overlapped_step(plan)


def test_a_round_may_consist_of_overlapped_steps_only(tmp_path: Path) -> None:
    one = alone(tmp_path, **FP32, overlap={"overlap_steps": 3})
    plan = plan_for(one)
    record = record_of(plan, work := one.train(plan))
    while one.overlapped_step(plan):
        pass
    one.apply(record, one.gradient_of(record, {one.node: work.payload}))
    work = one.train(plan_for(one))
    assert work.contribution.overlap_steps == work.contribution.inner_steps == 3
    assert work.lr > 0


def test_a_replica_that_adopts_a_state_starts_from_it(tmp_path: Path) -> None:
    one = alone(tmp_path, overlap={"fragments": 2, "overlap_steps": 3})
    genesis, plan = one.outer.clone(), plan_for(one)
    first = one.train(plan)
    one.overlapped_step(plan)
    one.adopt(genesis, None)
    again = one.train(plan)
    assert again.contribution.overlap_steps == 0
    assert again.contribution.data_digest == first.contribution.data_digest


def test_evaluating_the_outer_parameters_leaves_the_engine_unchanged(tmp_path: Path) -> None:
    one = alone(tmp_path, overlap={"fragments": 2, "overlap_steps": 3})
    fresh = one.heldout_loss(0, 1)
    plan = plan_for(one)
    one.train(plan)
    one.overlapped_step(plan)
    before = trained(one)
    assert one.heldout_loss(0, 1) == fresh, "θ has not moved"
    assert torch.equal(trained(one), before)
    with pytest.raises(RuntimeError, match="mid-air"), one.outer_params():
        raise RuntimeError("mid-air")
    assert torch.equal(trained(one), before)


def test_rejected_work_returns_to_the_residual_of_its_own_fragment(tmp_path: Path) -> None:
    one = alone(tmp_path, overlap={"fragments": 2})
    record = record_of(plan := plan_for(one), work := one.train(plan))
    one.apply(record, one.gradient_of(record, {one.node: work.payload}))
    assert one.residual is not None
    second = one.train(plan_for(one))
    kept = one.residual.clone()
    one.restore_update(second)
    given, theta, local = one.residual - kept, one.outer.theta, trained(one)
    for part in one.slices_of(2):
        torch.testing.assert_close(one.residual[part], (theta - local)[part], rtol=1e-5, atol=1e-9)
        assert given[part].any()
        given[part] = 0
    assert not given.any(), "the other fragment lost nothing"


@pytest.mark.parametrize("late", [0, 2])
def test_a_trace_marks_where_the_steps_after_the_overlap_begin(tmp_path: Path, late: int) -> None:
    one = alone(tmp_path, overlap={"overlap_steps": late}, audits={"rate": 0.05}, **FP32)
    for number in range(2):
        plan, expected = plan_for(one), Trace()
        taken = late if number else 0
        start = trained(one) if number else one.outer.theta
        expected.record_point(taken, start.numpy().data, pack_state(one.engine))
        record = record_of(plan, work := one.train(plan))
        if work.contribution.inner_steps > taken:
            expected.record_point(work.contribution.inner_steps, trained(one).numpy().data, pack_state(one.engine))
        assert work.contribution.trace_root == expected.root
        while one.overlapped_step(plan):
            pass
        one.apply(record, one.gradient_of(record, {one.node: work.payload}))


def test_a_non_finite_parameter_in_a_fragment_is_named(tmp_path: Path) -> None:
    one = alone(tmp_path, overlap={"fragments": 2})
    (span,) = (s for s in one.engine.layout.spans if s.name == "model.layers.1.mlp.up_proj.weight")
    broken = one.outer.theta.clone()
    broken[span.start + 5] = float("nan")
    step = one.engine.step
    one.engine.step = lambda batch, lr: (step(batch, lr), one.engine.write(broken))[0]  # type: ignore[method-assign]
    with pytest.raises(NonFiniteParameter, match=r"^model\.layers\.1\.mlp\.up_proj\.weight became NaN"):
        one.train(plan_for(one))


# --------------------------------------------------------------------------------- data, rules, errors


@settings(max_examples=60, deadline=None)
@given(
    most=st.integers(0, 4),
    batch=st.integers(1, 3),
    history=st.lists(
        st.dictionaries(st.sampled_from(nodes(5)), st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=6
    ),
    seed=st.binary(min_size=32, max_size=32),
)
def test_no_sequence_is_used_twice_whichever_steps_overlapped(
    most: int, batch: int, history: list[dict[str, int]], seed: bytes
) -> None:
    """Members come and go; each takes some late steps, as many as it likes up to τ, for the round after."""
    steps, position, used = 4, 0, []
    ahead: dict[str, int] = {}
    for number, late in enumerate(history):
        members = tuple(Member(node, steps, 1) for node in sorted(late))
        plan = Plan(number + 1, 1, seed, seed, seed, position, "gather", 0, members)
        for node, more in late.items():
            span = positions(plan, node, batch, most)
            used += span[ahead.get(node, 0) * batch : (steps + min(more, most)) * batch]
        ahead = {node: min(more, most) for node, more in late.items()}
        assert not used or max(used) < next_position(plan, batch, most)
        position = next_position(plan, batch, most)
    assert len(set(used)) == len(used)


def test_more_overlapped_steps_than_the_run_allows_are_refused(tmp_path: Path) -> None:
    one = alone(tmp_path, overlap={"overlap_steps": 2})
    rules, plan = rules_of(one.manifest), plan_for(one)
    given = one.train(plan).contribution
    member = plan.members[0]
    assert contribution_fault(rules, plan, member, given) is None
    assert contribution_fault(rules, plan, member, replace(given, overlap_steps=2)) is None
    fault = contribution_fault(rules, plan, member, replace(given, overlap_steps=3))
    assert fault == "3 overlap steps claimed, 2 allowed"


@pytest.mark.parametrize("codec", ["fp32", "int8", "topk2e"])
def test_the_payload_bound_holds_for_every_fragment(tmp_path: Path, codec: str) -> None:
    one = alone(tmp_path, codec={"name": codec}, overlap={"fragments": 3})
    rules = rules_of(one.manifest)
    bounds = [sum(one.codec.payload_bytes(p.stop - p.start) for p in one.slices_of(r)) for r in (1, 2, 3)]
    assert rules.payload_bytes == max(bounds)
    assert rules.slices == tuple(len(one.slices_of(r)) for r in (1, 2, 3))
    assert costs_of(one.run).payload_bytes <= max(bounds)


def test_more_fragments_than_the_model_can_be_split_into_are_refused(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, members=1, overlap={"fragments": 5}))
    for refuse in (
        lambda: launch(config, Identity.load_or_create(tmp_path / "key").peer_id),
        lambda: costs_of(config.run),
    ):
        with pytest.raises(
            ConfigError, match=r"^run.overlap.fragments: 5 fragments: this model can be split into at most 4"
        ):
            refuse()


@pytest.mark.parametrize(
    ("overlap", "message"),
    [
        ({"overlap_steps": 4}, r"overlap.overlap_steps \(4\) is above rounds.inner_steps \(3\)"),
        ({"overlap_steps": -1}, "run.overlap.overlap_steps: Input should be greater than or equal to 0"),
        ({"fragments": 0}, "run.overlap.fragments: Input should be greater than or equal to 1"),
        ({"overlap_steps": "2"}, "run.overlap.overlap_steps: Input should be a valid integer"),
        ({"merge": 0.5}, "run.overlap.merge: unknown key"),
    ],
)
def test_an_impossible_overlap_is_refused_with_the_field(
    tmp_path: Path, overlap: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write_config(tmp_path, members=1, overlap=overlap))

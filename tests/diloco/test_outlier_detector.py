"""A node's checks of every payload, and refusal of payloads without a valid base proof."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from psyche.diloco.outlier_detector import OutlierDetector
from psyche.network.identity import IDENTITY, Identity
from psyche.numerics.backends.selection import fastest_backend
from psyche.protocol.audit_messages import EMPTY
from psyche.protocol.messages import Accepted, Plan, Record
from psyche.telemetry.events import Notice, RoundCertified, RunFinished
from tests.processes.swarm import swarm
from tests.protocol.one_leader import contribution
from tests.protocol.test_acceptor import PLAN, changed
from tests.tiny import write_config

CODEC = fastest_backend().codec("int8")
COUNTS = (1 << 14, 1 << 14, 1 << 13)
NODES = tuple(member.node for member in PLAN.members)


def record(plan: Plan, private: frozenset[str] = frozenset()) -> Record:
    accepted = tuple(Accepted(node, contribution(node, plan, private=node in private)) for node in sorted(NODES))
    return Record(plan, accepted, (), 1, NODES, (1,) * len(NODES), (), EMPTY, (), (), (), ())


def honest(seed: int) -> dict[str, list[Tensor]]:
    make = torch.Generator().manual_seed(seed)
    common = [torch.randn(count, generator=make) for count in COUNTS]
    return {node: [one + torch.randn(len(one), generator=make) for one in common] for node in NODES}


def encoded(values: Mapping[str, list[Tensor]]) -> dict[str, list[bytes]]:
    return {
        node: [CODEC.encode(part.clone(), torch.zeros_like(part), None, 0.0) for part in parts]
        for node, parts in values.items()
    }


def look(
    outlier_detector: OutlierDetector, round_number: int, values: Mapping[str, list[Tensor]], **known: frozenset[str]
) -> dict[str, str]:
    return outlier_detector.look(
        record(changed(PLAN, round=round_number), **known), COUNTS, encoded(values), range(len(COUNTS))
    )


def test_resubmitting_an_earlier_update_of_the_same_fragment_is_an_outlier() -> None:
    outlier_detector = OutlierDetector(CODEC, b"secret", fragments=2)
    last, first = NODES[-1], honest(1)
    assert look(outlier_detector, 1, first) == {}
    assert look(outlier_detector, 2, honest(2) | {last: first[last]}) == {last: "direction"}, "another fragment's"
    assert look(outlier_detector, 3, honest(3) | {last: first[last]}) == {last: "stale"}


def test_private_payloads_are_not_checked() -> None:
    last = NODES[-1]
    values = honest(1)
    values[last] = [-9 * part for part in values[last]]
    assert look(OutlierDetector(CODEC, b"secret", 1), 1, values) == {last: "direction"}
    assert look(OutlierDetector(CODEC, b"secret", 1), 1, values, private=frozenset({last})) == {}


def test_only_received_payloads_are_checked() -> None:
    values = encoded(honest(1))
    only = {node: {1: parts[1]} for node, parts in values.items()}
    assert OutlierDetector(CODEC, b"secret", 1).look(record(PLAN), COUNTS, only, [1]) == {}  # type: ignore[arg-type]
    assert OutlierDetector(CODEC, b"secret", 1).look(record(PLAN), COUNTS, {}, [1]) == {}
    assert OutlierDetector(CODEC, b"secret", 1).look(record(PLAN), COUNTS, values, []) == {}


@pytest.mark.slow
def test_a_contribution_without_a_valid_base_proof_is_refused(tmp_path: Path) -> None:
    quick = {"round_min": 3.0, "round_max": 20.0, "exchange_min": 2.0, "exchange_max": 4.0, "silence": 10.0}
    shape = {"total": 3, "inner_steps": 3, "start_members": 4}
    with swarm(tmp_path / "run", write_config(tmp_path, members=4, rounds=shape, deadlines=quick)) as run:
        run.coordinator()
        for number in (1, 2, 3):
            run.node(f"node-{number}")
        run.node("baseless", module="tests.processes.invalid_base_proof")
        run.wait("coordinator", RunFinished)
        assert run.join("node-1") == 0
        liar = Identity.load_or_create(tmp_path / "run" / "baseless" / IDENTITY).peer_id
        rounds = run.events("node-1", RoundCertified)
        assert len(rounds) == 3
        assert all(liar not in one.accepted and len(one.accepted) == 3 for one in rounds)
        assert any("does not have the state" in one.text for one in run.events("node-1", Notice))

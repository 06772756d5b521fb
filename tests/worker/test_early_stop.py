"""When a node returns the rest of its quota, on a clock that the test sets."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from psyche.protocol.messages import RunStatus
from psyche.worker.training_thread import PATIENCE, EarlyStop
from tests.protocol.test_acceptor import PLAN

TRAINING = RunStatus(1, 1, b"", "training", 0, PLAN.base_root, PLAN, 1e6, False, (), (), None, None, None, (), "")
BEGUN = msgspec.structs.replace(TRAINING, phase="committing")
MOST = msgspec.structs.replace(BEGUN, mostly_done=True)


@dataclass
class Node:
    """A node whose steps take as long as the test says."""

    now: float = 0.0
    status: RunStatus = TRAINING
    early_stop: EarlyStop = field(init=False)

    def __post_init__(self) -> None:
        self.early_stop = EarlyStop(lambda: self.status, lambda: self.now)

    def round(
        self, steps: int, seconds: float, status: RunStatus = TRAINING, done: float = 0.0, encode: float = 0.0
    ) -> int:
        """Return the steps taken until it submits; ``status`` is visible from ``done`` seconds on."""
        self.status, began = TRAINING, self.now
        self.early_stop.begin(PLAN, steps)
        taken = 0
        while taken < steps and not (taken and self.early_stop.should_stop()):
            self.now += seconds
            if self.now - began >= done:
                self.status = status
            self.early_stop.record_step()
            taken += 1
        self.now += encode
        self.early_stop.record_encoded()
        return taken


def test_a_node_as_fast_as_the_others_takes_all_its_steps() -> None:
    node = Node()
    assert node.round(100, 1.0, MOST, done=95.0) == 100
    assert node.round(100, 1.0, MOST, done=99.0) == 100


def test_a_node_that_slows_down_submits_a_tenth_of_the_round_after_most_others() -> None:
    node = Node()
    for _ in range(3):
        assert node.round(100, 1.0, MOST, done=100.0) == 100
    assert node.round(100, 4.0, MOST, done=100.0) == 28
    assert 28 * 4.0 > PATIENCE * 100.0 >= 27 * 4.0


def test_a_single_finished_member_stops_no_other() -> None:
    node = Node()
    assert node.round(100, 4.0, BEGUN, done=1.0) == 100


def test_members_that_claim_to_be_done_at_once_stop_no_other() -> None:
    node = Node()
    node.round(100, 1.0)
    assert node.round(100, 1.0, MOST, done=1.0) == 100
    assert node.round(50, 1.0, MOST, done=1.0) == 50, "it knows how long its steps take"


def test_a_node_stops_early_enough_before_the_deadline_to_encode_its_update() -> None:
    node = Node()
    node.round(10, 1.0, encode=5.0)
    deadline = msgspec.structs.replace(BEGUN, allowed=60.0)
    assert node.round(100, 2.0, deadline, done=10.0) == 27
    assert 27 * 2.0 + 2.0 + 5.0 > 60.0 >= 26 * 2.0 + 2.0 + 5.0
    assert node.round(100, 2.0, msgspec.structs.replace(TRAINING, allowed=60.0)) == 100, (
        "the deadline is extended while no member is done"
    )


def test_the_status_of_another_round_stops_no_node() -> None:
    node = Node()
    other = msgspec.structs.replace(MOST, plan=msgspec.structs.replace(PLAN, round=2))
    assert node.round(100, 4.0, other, done=1.0) == 100

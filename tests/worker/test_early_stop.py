"""When a node gives back the rest of its quota, on a clock of the test's."""

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
    remainder: EarlyStop = field(init=False)

    def __post_init__(self) -> None:
        self.remainder = EarlyStop(lambda: self.status, lambda: self.now)

    def round(
        self, steps: int, seconds: float, status: RunStatus = TRAINING, done: float = 0.0, encode: float = 0.0
    ) -> int:
        """Steps taken until it hands in, where ``status`` is shown from ``done`` seconds on."""
        self.status, began = TRAINING, self.now
        self.remainder.begin(PLAN, steps)
        taken = 0
        while taken < steps and not (taken and self.remainder.should_stop()):
            self.now += seconds
            if self.now - began >= done:
                self.status = status
            self.remainder.record_step()
            taken += 1
        self.now += encode
        self.remainder.record_encoded()
        return taken


def test_who_is_as_fast_as_the_others_takes_all_its_steps() -> None:
    node = Node()
    assert node.round(100, 1.0, MOST, done=95.0) == 100
    assert node.round(100, 1.0, MOST, done=99.0) == 100


def test_who_slows_down_hands_in_a_tenth_after_most_of_the_others() -> None:
    node = Node()
    for _ in range(3):
        assert node.round(100, 1.0, MOST, done=100.0) == 100
    assert node.round(100, 4.0, MOST, done=100.0) == 28
    assert 28 * 4.0 > PATIENCE * 100.0 >= 27 * 4.0


def test_one_that_is_done_is_no_reason() -> None:
    node = Node()
    assert node.round(100, 4.0, BEGUN, done=1.0) == 100


def test_others_that_claim_to_be_done_at_once_do_not_cut_its_round_short() -> None:
    node = Node()
    node.round(100, 1.0)
    assert node.round(100, 1.0, MOST, done=1.0) == 100
    assert node.round(50, 1.0, MOST, done=1.0) == 50, "it knows what so many steps take it"


def test_before_the_deadline_there_is_time_to_encode_what_was_done() -> None:
    node = Node()
    node.round(10, 1.0, encode=5.0)
    deadline = msgspec.structs.replace(BEGUN, allowed=60.0)
    assert node.round(100, 2.0, deadline, done=10.0) == 27
    assert 27 * 2.0 + 2.0 + 5.0 > 60.0 >= 26 * 2.0 + 2.0 + 5.0
    assert node.round(100, 2.0, msgspec.structs.replace(TRAINING, allowed=60.0)) == 100, "it is put off: nobody is done"


def test_what_is_said_of_another_round_is_no_reason() -> None:
    node = Node()
    other = msgspec.structs.replace(MOST, plan=msgspec.structs.replace(PLAN, round=2))
    assert node.round(100, 4.0, other, done=1.0) == 100

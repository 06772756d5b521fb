"""A distributed run and the single-process reference of its manifest have bit-equal states after every round."""

from __future__ import annotations

from pathlib import Path

import pytest

from psyche.config import load_config
from psyche.processes.local_run import run_locally
from psyche.telemetry.event_log import LOG_NAME
from tests.ledgers import check_one_chain
from tests.tiny import LARGER, certified_roots, overlap_steps, reference_roots, report, write_config

SLOW = [("fp32", 1), ("int8", 1), ("fp32", 2), ("fp32", 4), ("int8", 4), ("int4", 2)]


def slow(*values: object) -> object:
    """Each is ten to thirty seconds; of what matters most one runs every time, and these with the slow tests."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("codec", "members", "reducers"),
    [("int8", 2, 2), slow("int8", 4, 2), slow("topk2", 3, 1), slow("fp32", 2, 3)],
)
def test_a_sharded_run_matches_the_reference(tmp_path: Path, codec: str, members: int, reducers: int) -> None:
    exchange = {"kind": "sharded", "reducers": reducers}
    config = write_config(tmp_path, members=members, codec={"name": codec}, exchange=exchange, model=LARGER)
    directory = tmp_path / "run"
    run_locally(config, None, directory, fresh=True, report=False)
    roots = certified_roots(directory / "coordinator" / LOG_NAME)
    assert len(roots) == 4
    assert roots == reference_roots(directory, load_config(config))
    for number in range(1, members + 1):
        assert certified_roots(directory / f"node-{number}" / LOG_NAME) == roots


@pytest.mark.parametrize(
    ("codec", "overlap"),
    [
        slow("int8", {"overlap_steps": 2}),
        slow("topk2", {"fragments": 2, "overlap_steps": 3}),
        slow("fp32", {"fragments": 4}),
    ],
)
def test_an_overlapped_run_matches_the_reference_of_the_steps_it_took(
    tmp_path: Path, codec: str, overlap: dict[str, int]
) -> None:
    """How many late steps a node takes is a matter of time; the record says it, and the reference takes as many."""
    rounds = {"total": 8, "inner_steps": 4, "start_members": 3}
    config = write_config(tmp_path, members=3, codec={"name": codec}, overlap=overlap, rounds=rounds)
    directory = tmp_path / "run"
    run_locally(config, None, directory, fresh=True, report=False)
    roots = certified_roots(directory / "coordinator" / LOG_NAME)
    assert len(roots) == 8
    assert roots == reference_roots(directory, load_config(config))
    if overlap.get("overlap_steps"):
        assert sum(overlap_steps(directory).values()) > 0, "nobody trained while the round was on the wire"


@pytest.mark.parametrize(
    ("codec", "members"),
    [("int8", 2), slow("topk2e", 4), *(slow(*one) for one in SLOW)],
)
def test_a_distributed_run_matches_the_reference(tmp_path: Path, codec: str, members: int) -> None:
    config = write_config(tmp_path, members=members, codec={"name": codec})
    directory = tmp_path / "run"
    run_locally(config, None, directory, fresh=True, report=members == 4)

    roots = certified_roots(directory / "coordinator" / LOG_NAME)
    assert len(roots) == 4
    assert len(set(roots)) == 4, "the state must change every round"
    assert roots == reference_roots(directory, load_config(config))
    for number in range(1, members + 1):
        assert certified_roots(directory / f"node-{number}" / LOG_NAME) == roots
    if members == 4:
        found = report(directory)
        assert found["state_roots"] == roots
        assert found["state_roots_agree"] is True
        assert found["peers"] == 4
        assert found["final_loss"] < found["initial_loss"]
        check_one_chain(directory, ["coordinator", *(f"node-{number}" for number in range(1, 5))], roots)

"""A distributed run and the single-process reference of the same manifest hold the same bits after every round."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from psyche.config import load_config
from psyche.roles.local import run_locally
from psyche.telemetry.events import LOG_NAME
from tests.roles.tiny import certified_roots, reference_roots, report, write_config


@pytest.mark.parametrize(
    ("codec", "members"),
    [*product(("fp32", "int8"), (1, 2, 4)), ("int4", 2), ("topk2e", 4)],
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

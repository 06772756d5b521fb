"""The engine bench: every way trains on the same batches; speeds are not asserted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from psyche.bench.engine_speed import WAYS, Plan, measure, seconds_per_step, show
from psyche.errors import PsycheError


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    settings = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    data = {"tokenizer": {"kind": "bpe", "vocab_size": 300}, "sequence_length": 32, "max_documents": 40}
    run = {"name": "tiny", "model": {"settings": settings}, "data": data, "inner": {"batch_size": 2}}
    run["heldout_sequences"] = 4  # type: ignore[assignment]
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps({"run": run, "node": {"cache": str(tmp_path / "cache"), "threads": 1}}))
    return Plan(config=str(path), steps=3, repeats=2)


@pytest.mark.slow
def test_ways_are_compared_within_a_repeat(plan: Plan) -> None:
    run = plan.load().run
    rows = measure(plan, run, ("loop", "engine", "node"))
    assert [(row.way, row.repeat) for row in rows] == [(w, n) for n in range(2) for w in ("loop", "engine", "node")]
    assert all(row.against_loop == 1.0 for row in rows if row.way == "loop")
    for row in rows:
        assert row.tokens_per_second == pytest.approx(run.tokens_per_step / row.step_seconds)
    screen = io.StringIO()
    show(plan, run, rows, Console(file=screen, width=120))
    assert all(WAYS[way] in screen.getvalue() for way in ("loop", "engine", "node"))


@pytest.mark.slow
def test_a_way_that_fails_says_why(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text("run: {}")
    with pytest.raises(PsycheError, match=r"training by loop failed: .*model"):
        seconds_per_step(plan, "loop")

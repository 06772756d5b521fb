"""Plan and rows of the utilisation bench. A whole run is in tests/slow."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from psyche.bench.harness.node_runs import small_config
from psyche.bench.harness.rows import table, to_json
from psyche.bench.utilisation import (
    LAST,
    SKIPPED,
    Plan,
    UtilisationRow,
    exchange_bytes,
    overlap_of,
    planned_runs,
    rows_of,
    with_modes,
)
from psyche.errors import PsycheError
from psyche.telemetry.event_log import EventLog
from tests.bench.stubs import metrics

PLAN = Plan(peers=4, ratio=0.3, rounds=2)


def test_the_rate_makes_the_bytes_take_their_share_of_a_rounds_computing() -> None:
    moved = exchange_bytes(small_config("utilisation").run, 4)
    for trial in planned_runs(PLAN):
        computing = PLAN.inner_steps * PLAN.step_seconds
        assert 8 * moved / trial.rate == pytest.approx(0.3 * computing, rel=1e-3)


def test_where_the_rate_is_given_the_steps_follow_from_it() -> None:
    moved = exchange_bytes(small_config("utilisation").run, 4)
    (trial, *_) = planned_runs(Plan(peers=4, ratio=0.3, rate=10**7))
    computing = trial.config.run.rounds.inner_steps * trial.step_seconds
    assert 8 * moved / 1e7 == pytest.approx(0.3 * computing, rel=0.05)


def test_a_parameter_is_exchanged_equally_often_in_every_mode() -> None:
    for trial in planned_runs(PLAN):
        run = trial.config.run
        assert run.rounds.inner_steps * run.overlap.fragments == PLAN.inner_steps
        assert (run.rounds.total - LAST) * run.rounds.inner_steps == (PLAN.rounds + SKIPPED) * PLAN.inner_steps
        assert run.rounds.start_members == 4


def test_overlap_steps_exceed_the_transfer_and_not_the_round() -> None:
    assert overlap_of("none", 40, 0.3)[0].overlap_steps == 0
    for mode in ("tail", "fragments"):
        setting, steps = overlap_of(mode, 40, 0.3)
        assert 0.3 * steps < setting.overlap_steps <= steps
    assert overlap_of("tail", 40, 5.0)[0].overlap_steps == 40


def test_modes_are_chosen_by_name() -> None:
    assert with_modes(PLAN, ["tail"]).modes == ("tail",)
    assert with_modes(PLAN, []).modes == ("none", "tail", "fragments")
    with pytest.raises(PsycheError, match="none, tail, fragments"):
        with_modes(PLAN, ["head"])


def test_rows_are_sums_over_the_rounds_that_count(tmp_path: Path) -> None:
    trial = planned_runs(PLAN)[0]
    log = _log(tmp_path / "node-1.jsonl", SKIPPED + 2 + LAST)
    (row,) = rows_of(trial, _log(tmp_path / "coordinator.jsonl", 0), [log])
    assert (row.rounds, row.train_seconds, row.round_seconds) == (2, 16.0, 20.0)
    assert row.utilisation == pytest.approx(0.8)
    assert row.exchange_ratio == pytest.approx(1.5 / 8.0)
    assert row.step_seconds == pytest.approx(8.0 / PLAN.inner_steps)
    assert set(to_json([row])[0]) == set(UtilisationRow.__struct_fields__)
    screen = io.StringIO()
    Console(file=screen, width=120).print(table("Utilisation", [row]))
    assert "80.0" in screen.getvalue()


def test_a_node_without_a_counted_round_is_named(tmp_path: Path) -> None:
    with pytest.raises(PsycheError, match="node-1 took part in no round that counts"):
        rows_of(planned_runs(PLAN)[0], _log(tmp_path / "c.jsonl", 0), [_log(tmp_path / "n.jsonl", SKIPPED)])


def _log(path: Path, rounds: int) -> Path:
    """An event log in which a node tells of ``rounds`` rounds."""
    log = EventLog(path, "me")
    for round_number in range(1, rounds + 1):
        log.emit(metrics(round_number, "me", PLAN.inner_steps, 8.0))
    log.close()
    return path

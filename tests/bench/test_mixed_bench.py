"""The mixed bench's plan, rows and comparison of losses; a run of it is among the slow tests."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from psyche.bench.mixed.loss import equal, loss_scale, rows_of, show, trials
from psyche.bench.mixed.plan import SKIPPED, Plan
from psyche.bench.mixed.table import Found, Row, found_in, table, to_json
from psyche.bench.trials import Outcome, run_of
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from tests.bench.measured import metrics
from tests.chains import NAMES, RULES, chain

PLAN = Plan((1.0, 2.0, 4.0), step_seconds=0.1, inner_steps=5, rounds=3)


def test_the_fastest_takes_the_seconds_that_are_asked_for() -> None:
    assert PLAN.steps_take == [0.4, 0.2, 0.1]
    assert list(PLAN.counted) == [SKIPPED + 1, SKIPPED + 2, SKIPPED + 3]
    rounds = PLAN.config.run.rounds
    assert (rounds.total, rounds.inner_steps, rounds.start_members) == (SKIPPED + 3, 5, 3)


def test_rows_are_what_logs_and_ledger_say(tmp_path: Path) -> None:
    """Each round begins at 100 × its number; node n commits n seconds later, and is in steps for half of 10 seconds."""
    home = tmp_path / "coordinator"
    home.mkdir()
    with Ledger.open(home / LEDGER, RULES.run_id) as ledger:
        for one in chain(SKIPPED + 3):
            ledger.append(one.certificate, one.record, one.root)
    now = [0.0]
    coordinator = EventLog(home / "events.jsonl", "boss", clock=lambda: now[0])
    logs = [tmp_path / f"node-{number}.jsonl" for number in (1, 2, 3)]
    for round_number in range(1, SKIPPED + 4):
        now[0] = 100.0 * round_number
        coordinator.emit(events.RoundStarted(round=round_number, members=NAMES, inner_steps=5))
    for number, (path, name) in enumerate(zip(logs, NAMES, strict=False), 1):
        log = EventLog(path, name, clock=lambda: now[0])
        for round_number in range(1, SKIPPED + 4):
            now[0] = 100.0 * round_number + number
            log.emit(events.PhaseChanged(round=round_number, phase="committing"))
            log.emit(metrics(round_number, name, 5 * number, 5.0))
        log.close()
    coordinator.close()
    found = found_in(PLAN, home / "events.jsonl", logs)
    assert [row.ends for row in found.rows] == [1.0, 2.0, 3.0]
    assert [row.waits for row in found.rows] == pytest.approx([0.2, 0.1, 0.0])
    assert [row.idle for row in found.rows] == pytest.approx([0.5, 0.5, 0.5])
    assert [(row.quota, row.first_quota, row.rounds) for row in found.rows] == [(5, 5, 3)] * 3
    assert found.training == 3.0
    assert found.ideal == pytest.approx(5 / 3)
    assert found.over == pytest.approx(3.0 / (5 / 3) - 1)
    assert set(to_json(found.rows)[0]) == set(Row.__struct_fields__)
    screen = io.StringIO()
    Console(file=screen, width=120).print(table(found.rows))
    assert "50.0" in screen.getvalue()
    assert isinstance(found, Found)


def test_unequal_and_equal_nodes_train_on_the_same_tokens_in_the_same_rounds() -> None:
    scale = loss_scale()
    found = list(trials(scale))
    assert len({trial.batches for trial in found}) == 1
    assert {run_of(scale.setting, trial).rounds.total for trial in found} == {scale.rounds}
    assert {trial.due for trial in found} == {(), (6, 12, 24)}
    assert "6-12-24" in found[-1].label


def test_losses_are_compared_with_those_of_equal_nodes_at_the_same_seed() -> None:
    scale = loss_scale()
    wanted = list(trials(scale))
    outcomes = {
        trial: Outcome(3.0 + 0.003 * bool(trial.due) + 0.1 * trial.seed, 1000, 1.0, 1.0, 10, 1.0) for trial in wanted
    }
    rows = rows_of(scale, wanted, outcomes)
    assert rows[0].against_equal_percent == 0.0
    assert rows[-1].due == "6:12:24"
    assert rows[-1].against_equal_percent == pytest.approx(100 * 0.003 / outcomes[equal(scale, 2)].heldout_loss)
    screen = io.StringIO()
    show(scale, rows, Console(file=screen, width=120))
    assert "6:12:24" in screen.getvalue()

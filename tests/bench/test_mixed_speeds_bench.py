"""Plan, rows and loss comparison of nodes with different speeds. A whole run is in tests/slow."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from psyche.bench.convergence.trial import Outcome, run_of
from psyche.bench.convergence.unequal_steps import unequal_section
from psyche.bench.harness.rows import table, to_json
from psyche.bench.mixed_speeds import SKIPPED, MixedRow, Plan, result_of
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.telemetry import events
from psyche.telemetry.event_log import EventLog
from tests.bench.stubs import metrics
from tests.chains import NAMES, RULES, chain

PLAN = Plan((1.0, 2.0, 4.0), step_seconds=0.1, inner_steps=5, rounds=3)


def test_the_fastest_takes_the_seconds_that_are_asked_for() -> None:
    assert PLAN.step_seconds_of_nodes == [0.4, 0.2, 0.1]
    assert list(PLAN.counted) == [SKIPPED + 1, SKIPPED + 2, SKIPPED + 3]
    rounds = PLAN.config.run.rounds
    assert (rounds.total, rounds.inner_steps, rounds.start_members) == (SKIPPED + 3, 5, 3)


def test_rows_follow_from_logs_and_ledger(tmp_path: Path) -> None:
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
    found = result_of(PLAN, home / "events.jsonl", logs)
    assert [row.ends for row in found.rows] == [1.0, 2.0, 3.0]
    assert [row.waits for row in found.rows] == pytest.approx([0.2, 0.1, 0.0])
    assert [row.idle for row in found.rows] == pytest.approx([0.5, 0.5, 0.5])
    assert [(row.quota, row.first_quota, row.rounds) for row in found.rows] == [(5, 5, 3)] * 3
    assert found.training == 3.0
    assert found.ideal == pytest.approx(5 / 3)
    assert found.over == pytest.approx(3.0 / (5 / 3) - 1)
    assert set(to_json(found.rows)[0]) == set(MixedRow.__struct_fields__)
    screen = io.StringIO()
    Console(file=screen, width=120).print(table("Mixed hardware", found.rows))
    assert "50.0" in screen.getvalue()


def test_unequal_and_equal_nodes_train_on_the_same_tokens_in_the_same_rounds() -> None:
    section = unequal_section()
    found = [item.trial for item in section.items()]
    assert len({trial.batches for trial in found}) == 1
    assert {run_of(section.setting, trial).rounds.total for trial in found} == {section.rounds}
    assert {trial.quotas for trial in found} == {(), (6, 12, 24)}
    assert "6-12-24" in found[-1].label


def test_losses_are_compared_with_those_of_equal_nodes_with_the_same_seed() -> None:
    section = unequal_section()
    items = list(section.items())
    outcomes = {
        trial: Outcome(3.0 + 0.003 * bool(trial.quotas) + 0.1 * trial.seed, 1000, 1.0, 1.0, 10, 1.0)
        for trial in (item.trial for item in items)
    }
    rows = section.rows(items, outcomes)
    assert rows[0].against_equal_percent == 0.0
    assert rows[-1].due == "6:12:24"
    loss = outcomes[section.equal_trial(2)].heldout_loss
    assert rows[-1].against_equal_percent == pytest.approx(100 * 0.003 / loss)
    screen = io.StringIO()
    section.show(rows, Console(file=screen, width=120))
    assert "6:12:24" in screen.getvalue()

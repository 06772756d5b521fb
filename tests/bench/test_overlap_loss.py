"""The overlap section of the convergence bench, with real runs of a tiny model."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from psyche.bench.convergence.overlap_loss import Mode, OverlapLoss, OverlapRow, overlap_section
from psyche.bench.convergence.trial import CENTRE, Setting, run_of
from psyche.bench.harness.turns import percent_above
from psyche.cli.bench_commands import app
from psyche.config import Outer
from psyche.errors import PsycheError


@pytest.fixture(scope="module")
def section(setting: Setting) -> OverlapLoss:
    return OverlapLoss(
        setting=setting,
        steps=8,
        outer=Outer(lr=0.7, momentum=0.5),
        seeds=(0, 1),
        waiting=(Mode(4), Mode(4, fragments=2)),
        equal_tokens=(
            Mode(4, overlap_steps=2),
            Mode(4, overlap_steps=2, alpha=0.5),
            Mode(4, overlap_steps=1, fragments=2, outer=Outer(lr=0.5, momentum=0.9)),
        ),
        equal_wall_time=(Mode(4, overlap_steps=2), Mode(6, overlap_steps=2)),
    )


@pytest.fixture(scope="module")
def rows(section: OverlapLoss) -> list[OverlapRow]:
    return section.measure()


def test_every_planned_row_is_measured_once_and_in_order(section: OverlapLoss, rows: list[OverlapRow]) -> None:
    assert [row.name for row in rows] == [item.name for item in section.items()]
    assert len({row.name for row in rows}) == len(rows) == 2 * (2 + 3 + 1 + 2)  # seeds × (ways, and the control)
    assert all(3.0 < row.heldout_loss < 6.0 for row in rows)  # ln 300 = 5.70


def test_what_is_done_with_overlap_steps_makes_a_difference(rows: list[OverlapRow]) -> None:
    losses = {row.heldout_loss for row in rows if row.comparison == "equal tokens" and not row.nudge and not row.seed}
    assert len(losses) == 5


def test_losses_are_compared_with_the_run_that_waits_seed_by_seed(rows: list[OverlapRow]) -> None:
    waiting = {row.seed: row.heldout_loss for row in rows[:2]}
    assert {row.against_waiting_percent for row in rows[:2]} == {0.0}
    for row in rows:
        assert row.against_waiting_percent == percent_above(row.heldout_loss, waiting[row.seed])
    assert [row.seed for row in rows if row.nudge] == [0, 1]  # that they begin elsewhere: test_convergence


def test_equal_tokens_are_equal_and_equal_time_gives_the_steps_that_waiting_costs(rows: list[OverlapRow]) -> None:
    each = 2 * 32  # batch × length
    assert {row.tokens for row in rows if row.comparison == "equal tokens"} == {CENTRE * 8 * each}
    longer = [(row.inner_steps, row.steps_per_node, row.rounds) for row in rows if row.comparison == "equal wall time"]
    assert set(longer) == {(4, 12, 3), (6, 12, 2)}  # two rounds that wait take the time of 2 × (4 + 2) steps
    assert all(row.tokens == CENTRE * row.steps_per_node * each for row in rows)


def test_an_exchange_of_a_fragment_is_as_much_shorter_as_it_is_smaller(section: OverlapLoss) -> None:
    assert Mode(24, overlap_steps=4).share == Mode(24, overlap_steps=2, fragments=2).share == Fraction(1, 6)
    assert Mode(24).share == 0
    whole, fragments = (
        section.steps_in_equal_time(mode) for mode in (Mode(4, overlap_steps=2), Mode(4, overlap_steps=1, fragments=2))
    )
    assert whole == fragments == 12


def test_fragments_send_as_much_in_smaller_pieces(rows: list[OverlapRow]) -> None:
    whole, half = (next(row for row in rows if row.fragments == count) for count in (1, 2))
    assert half.rounds == 2 * whole.rounds
    assert half.bytes_per_token == pytest.approx(whole.bytes_per_token, rel=0.01)  # but for the headers of slices


@pytest.mark.parametrize("full", [False, True])
def test_the_real_section_can_be_run(full: bool, tmp_path: Path) -> None:
    section = overlap_section(tmp_path, full=full)
    planned = list(section.items())
    for item in planned:
        run = run_of(section.setting, item.trial)  # raises if steps, H and fragments do not fit
        assert run.overlap.overlap_steps == item.trial.overlap_steps
    assert len({item.name for item in planned}) == len(planned)
    assert {item.reference for item in planned} <= {item.trial for item in planned}


def test_main_writes_flat_rows_and_prints_both_tables(
    section: OverlapLoss, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = replace(section, seeds=(0,), waiting=section.waiting[:1], equal_tokens=section.equal_tokens[:1])
    path = tmp_path / "new" / "rows.json"
    one.main(path)
    found = json.loads(path.read_text())
    assert [set(row) for row in found] == [set(OverlapRow.__struct_fields__)] * 5
    captured = capsys.readouterr()
    assert "(a) Equal tokens" in captured.out
    assert "(b) Equal wall time" in captured.out
    assert "5/5" in captured.err


def test_a_row_alone_is_compared_with_nothing(section: OverlapLoss) -> None:
    (row,) = section.measure(only="equal-tokens/diloco-fp32/k4/8-steps/lr0.7/mu0.5/H4/overlap2/seed0")
    assert row.against_waiting_percent is None
    with pytest.raises(PsycheError, match="no row has 'nosuch' in its name; names are like equal-tokens/"):
        section.measure(only="nosuch")


def test_the_tables_show_every_way_once(section: OverlapLoss, rows: list[OverlapRow]) -> None:
    console = Console(file=io.StringIO(), width=132)
    section.show(rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line for line in text.splitlines() if line.startswith("│")]
    assert len(lines) == 6 + 2
    assert sum("waits" in line for line in lines) == 3
    assert sum("re-based" in line for line in lines) == 4
    assert sum("mixed, α 0.5" in line for line in lines) == 1
    assert sum("(nudged)" in line for line in lines) == 1


def test_only_one_section_runs_at_a_time() -> None:
    result = CliRunner().invoke(app, ["convergence", "--overlap", "--codecs"])
    assert result.exit_code == 2
    assert "choose one of them" in result.output

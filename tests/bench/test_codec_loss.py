"""The codecs section of the convergence bench, with real runs of a tiny model."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from psyche.bench.convergence.codec_loss import CHOICES, Choice, CodecLoss, CurveRow, codec_section, final_rows
from psyche.bench.convergence.loss_curve import evaluated_rounds
from psyche.bench.convergence.trial import CENTRE, Setting, Trial, run_of, run_trial
from psyche.bench.harness.turns import percent_above
from psyche.cli.bench_commands import app
from psyche.diloco.reference import simulate_rounds
from psyche.errors import PsycheError
from psyche.numerics.codecs.registry import CODECS
from psyche.tools.costs import costs_of

CHOSEN = (
    Choice("fp32", 2, lr=0.7, momentum=0.5),
    Choice("int8", 2, lr=0.7, momentum=0.5),
    Choice("int8", 4, lr=0.7, momentum=0.5),
    Choice("topk2", 2, lr=1.0, momentum=0.3, error_feedback=1.0),
)


@pytest.fixture(scope="module")
def codecs(setting: Setting) -> CodecLoss:
    return CodecLoss(replace(setting, curve_points=3, curve_sequences=20), steps=8, seeds=(0, 1), choices=CHOSEN)


@pytest.fixture(scope="module")
def rows(codecs: CodecLoss) -> list[CurveRow]:
    return codecs.measure()


def test_every_trial_has_a_curve_and_then_its_final_loss(rows: list[CurveRow]) -> None:
    names = list(dict.fromkeys(row.name for row in rows))
    assert len(names) == 2 * (len(CHOSEN) + 1)  # two seeds, and topk2e beside topk2
    for name in names:
        curve = [row for row in rows if row.name == name]
        assert [row.final for row in curve] == [False] * (len(curve) - 1) + [True]
        assert [row.rounds for row in curve] == [
            *evaluated_rounds(8 // curve[0].inner_steps, 3),
            8 // curve[0].inner_steps,
        ]
        assert {row.heldout_sequences for row in curve[:-1]} == {20}
        assert curve[-1].heldout_sequences == 70
        assert curve[-1].tokens == CENTRE * 8 * 2 * 32


def test_a_curve_is_evaluated_without_changing_the_run(codecs: CodecLoss) -> None:
    trial = next(trial for trial in (item.trial for item in codecs.items()) if trial.codec == "topk2")
    watched, alone = (run_trial(replace(codecs.setting, curve_points=points), trial) for points in (3, 0))
    assert watched.heldout_loss == alone.heldout_loss
    assert alone.curve == ()


def test_the_last_point_of_a_curve_is_the_final_loss_on_its_own_sequences(codecs: CodecLoss) -> None:
    trial = next(codecs.items()).trial
    setting = replace(codecs.setting, heldout_sequences=codecs.setting.curve_sequences)
    outcome = run_trial(setting, trial)
    assert outcome.curve[-1].heldout_loss == outcome.heldout_loss


def test_bytes_are_those_of_the_payloads_in_what_was_sent(codecs: CodecLoss, rows: list[CurveRow]) -> None:
    for trial in (item.trial for item in codecs.items()):
        payload = costs_of(run_of(codecs.setting, trial)).payload_bytes
        for row in (row for row in rows if row.name == trial.label):
            assert row.bytes_sent == (CENTRE - 1) * payload * row.rounds
            assert row.bits_per_parameter == pytest.approx(8 * payload / row.parameters)
    final = next(row for row in rows if row.codec == "int8" and row.final)
    assert final.bytes_per_token == pytest.approx(
        costs_of(run_of(codecs.setting, _trial(codecs, "int8"))).bytes_per_token, rel=0.01
    )


def test_entropy_coded_rows_have_the_losses_of_their_trial_and_the_bytes_of_topk2e(
    codecs: CodecLoss, rows: list[CurveRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse = [row for row in rows if row.codec == "topk2" and row.seed == 0]
    coded = [row for row in rows if row.codec == "topk2e" and row.seed == 0]
    assert [row.heldout_loss for row in coded] == [row.heldout_loss for row in sparse]
    assert all(row.bytes_sent < fixed.bytes_sent for row, fixed in zip(coded, sparse, strict=True))
    sent: list[int] = []
    real = simulate_rounds

    def watching(manifest, replicas, overlap_steps, quotas):  # type: ignore[no-untyped-def]
        for record, works in real(manifest, replicas, overlap_steps, quotas):
            sent.append(sum(len(part) for work in works.values() for part in work.payload))
            yield record, works

    monkeypatch.setattr("psyche.bench.convergence.trial.simulate_rounds", watching)
    run_trial(codecs.setting, replace(_trial(codecs, "topk2"), codec="topk2e"))
    # Of four payloads one was coded, and in rounds judged; another codec's manifest deals out the data in other order.
    assert coded[-1].bytes_sent == pytest.approx(sum(sent) * (CENTRE - 1) / CENTRE, rel=0.03)


def test_losses_are_compared_seed_by_seed_and_at_equal_bytes(rows: list[CurveRow]) -> None:
    found = {key: list(group) for key, group in groupby(final_rows(rows), key=lambda row: (row.codec, row.inner_steps))}
    assert list(found) == [("fp32", 2), ("int8", 2), ("int8", 4), ("topk2", 2), ("topk2e", 2)]
    assert [row.against_fp32 for row in found["fp32", 2]] == [0.0, 0.0]
    for ours, theirs in zip(found["int8", 4], found["fp32", 2], strict=True):
        assert ours.against_fp32 == percent_above(ours.heldout_loss, theirs.heldout_loss)
    # int8's first payload has more bytes than all payloads of topk2
    assert [row.baseline for row in found["topk2", 2]] == [None, None]
    losses = [row.heldout_loss for row in rows if row.codec == "int8" and not row.final and row.seed == 0]
    assert found["fp32", 2][0].baseline == min(losses)


def test_the_error_feedback_of_a_trial_is_in_its_name_and_run(codecs: CodecLoss) -> None:
    trial = _trial(codecs, "topk2")
    assert "/mu0.3/beta1/H2/" in trial.label
    assert run_of(codecs.setting, trial).codec.error_feedback == 1.0
    plain = replace(trial, error_feedback=None)
    assert "beta" not in plain.label
    assert run_of(codecs.setting, plain).codec.error_feedback == 0.95


@pytest.mark.parametrize("full", [False, True])
def test_the_real_section_can_be_run(full: bool, tmp_path: Path) -> None:
    section = codec_section(tmp_path, full=full)
    items = list(section.items())
    runs = [run_of(section.setting, item.trial) for item in items]  # raises if steps and H do not fit
    assert len({item.name for item in items}) == len(runs)
    assert CHOICES[0].codec == "fp32"
    assert {run.codec.name for run in runs} <= set(CODECS)


def test_points_are_denser_at_the_start_and_end_with_the_last_round() -> None:
    assert evaluated_rounds(272, 24)[:4] == [1, 2, 3, 4]
    assert evaluated_rounds(272, 24)[-1] == 272
    assert len(evaluated_rounds(272, 24)) <= 24
    assert evaluated_rounds(2, 5) == [1, 2]
    assert evaluated_rounds(10, 0) == []


def test_main_writes_rows_picture_and_table(
    codecs: CodecLoss, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, picture = tmp_path / "new" / "rows.json", tmp_path / "new" / "curves.png"
    codecs.main(rows, only="seed0", plot=picture)
    found = json.loads(rows.read_text())
    assert {frozenset(row) for row in found} == {frozenset(CurveRow.__struct_fields__)}
    assert {row["codec"] for row in found} == {"fp32", "int8", "topk2", "topk2e"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    captured = capsys.readouterr()
    assert "held-out loss at equal tokens" in captured.out
    assert "4/4" in captured.err


def test_a_filter_that_matches_nothing_says_what_names_look_like(codecs: CodecLoss) -> None:
    with pytest.raises(PsycheError, match="no row has 'nosuch' in its name; names are like diloco-fp32/"):
        codecs.measure(only="nosuch")


def test_the_table_shows_every_setting_once(codecs: CodecLoss, rows: list[CurveRow]) -> None:
    console = Console(file=io.StringIO(), width=160)
    codecs.show(rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    first = [line.split()[1] for line in text.splitlines() if line.startswith("│")]
    assert [first.count(codec) for codec in ("fp32", "int8", "topk2", "topk2e")] == [1, 2, 1, 1]


def test_only_the_curves_of_codecs_are_drawn() -> None:
    result = CliRunner().invoke(app, ["convergence", "--plot", "curves.png"])
    assert result.exit_code == 2
    assert "only the curves of --codecs can be drawn" in result.output


def _trial(codecs: CodecLoss, codec: str) -> Trial:
    return next(trial for trial in (item.trial for item in codecs.items()) if trial.codec == codec and trial.seed == 0)

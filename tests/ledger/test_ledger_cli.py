"""``psyche ledger show`` and ``verify``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from psyche.errors import PsycheError
from psyche.ledger.store import NAME, Ledger
from psyche.protocol.messages import Record
from psyche.telemetry.lines import exclusion_sentence
from tests.chains import MANIFEST, NAMES, REASON, RULES, link, manifest
from tests.ledgers import CHAIN, EACH, OTHER, change, fill, psyche_ledger
from tests.protocol.one_leader import with_electorate


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A node's directory with rounds 3 to 6."""
    fill(tmp_path / NAME, CHAIN[2:])
    (tmp_path / "manifest.msgpack").write_bytes(MANIFEST.encode())
    return tmp_path


def test_verify_reports_valid_and_missing_rounds(directory: Path) -> None:
    result = psyche_ledger("verify", directory)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == (
        f"valid: 4 certified rounds up to round 6, {14 * EACH:,} tokens of 4 nodes, 0 reconfigurations; "
        "missing here: rounds 1–2"
    )
    assert result.stdout.splitlines()[1:] == [
        f"credits: 0 final, {14 * EACH:,} pending, 0 forfeited; 0 nodes convicted"
    ]
    complete = fill(directory / "elsewhere" / NAME)
    result = psyche_ledger("verify", complete, "--manifest", directory / "manifest.msgpack")
    assert "6 certified rounds" in result.stdout
    assert "no round is missing" in result.stdout


def test_verify_names_the_round_and_the_reason(directory: Path) -> None:
    change(directory / NAME, "UPDATE members SET tokens = tokens + 1 WHERE round = 5")
    result = psyche_ledger("verify", directory)
    assert isinstance(result.exception, PsycheError)
    assert "round 5: its rows in members do not match its certificate" in str(result.exception)


def test_verify_names_a_missing_or_wrong_manifest(directory: Path) -> None:
    (directory / "manifest.msgpack").write_bytes(manifest("another").encode())
    assert "but the manifest is of" in str(psyche_ledger("verify", directory).exception)
    (directory / "manifest.msgpack").unlink()
    assert "give its path with --manifest" in str(psyche_ledger("verify", directory).exception)
    assert "there is no ledger at" in str(psyche_ledger("show", directory / "nowhere").exception)


def test_verify_fails_with_one_sentence_and_an_exit_code(directory: Path) -> None:
    change(directory / NAME, "UPDATE rounds SET certificate = x'00' WHERE round = 4")
    done = subprocess.run(
        [sys.executable, "-m", "psyche", "ledger", "verify", str(directory)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "is not a valid ledger of this run: round 4: invalid certificate" in done.stderr


def test_show_prints_a_table_and_totals(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = psyche_ledger("show", directory)
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for one in CHAIN[2:]:
        out = f" …{NAMES[-1][-6:]}: {exclusion_sentence(REASON)}" if one.record.excluded else ""
        count, hashes = len(one.record.accepted), f"{one.record.hash.hex()[:8]} {one.root.hex()[:8]}"
        assert f"{one.record.plan.round} {count}/4 {count * EACH:,} {hashes}{out}" in words
    assert f"…{NAMES[-1][-6:]} 2/4 {2 * EACH:,}" in words
    assert "missing here: rounds 1–2" in words
    latest = psyche_ledger("show", directory, "--last", 1).stdout
    assert CHAIN[5].record.hash.hex()[:8] in latest
    assert CHAIN[4].record.hash.hex()[:8] not in latest
    assert f"…{NAMES[-1][-6:]}" in latest, "totals must cover all rounds"


def test_show_marks_reconfigurations_and_superseded_records(tmp_path: Path) -> None:
    def survivors(record: Record) -> Record:
        return with_electorate(record, NAMES[:3], reconfiguration=1)

    path = fill(tmp_path / NAME, CHAIN[:2])
    with Ledger.open(path, RULES.run_id) as ledger:
        ledger.supersede(OTHER[0].certificate, OTHER[0].record, OTHER[0].root)
        again = link(OTHER[0], edit=survivors)
        ledger.append(again.certificate, again.record, again.root)
    words = " ".join(psyche_ledger("show", path).stdout.split())
    assert words.count("reconfiguration") == 1
    assert "certified twice, an earlier record was superseded: round 1, 2" in words


def test_show_prints_json_and_filters_by_node(directory: Path) -> None:
    report = json.loads(psyche_ledger("show", directory, "--json", "--node", NAMES[-1][-6:], "--last", 2).stdout)
    assert [(one["round"], len(one["members"])) for one in report["rounds"]] == [(5, 1), (6, 1)]
    assert report["rounds"][0]["members"][0] == {
        "node": NAMES[-1],
        "votes": CHAIN[4].record.plan.members[-1].votes,
        "tokens": None,
        "inner_steps": None,
        "payload_bytes": None,
        "private": False,
        "reason": REASON,
        "dissenter": False,
    }
    assert report["rounds"][1]["members"][0]["tokens"] == EACH
    assert list(report["totals"]) == [NAMES[-1]]
    assert (report["missing"], report["held"], report["run_id"]) == ([[1, 2]], 4, RULES.run_id.hex())
    assert "no member" in str(psyche_ledger("show", directory, "--node", "nobody").exception)
    assert "4 members" in str(psyche_ledger("show", directory, "--node", "").exception)


def test_show_names_a_certificate_it_cannot_read(directory: Path) -> None:
    change(directory / NAME, "UPDATE rounds SET certificate = x'00' WHERE round = 4")
    assert "the certificate of round 4" in str(psyche_ledger("show", directory).exception)


def test_importing_the_commands_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'sqlite3', 'rich.table'}"
    code = f"import sys, psyche.cli.ledger_commands; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

"""What every node and coordinator of a run keeps of it, and that anyone can check it."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from psyche.cli.ledger import app
from psyche.errors import PsycheError
from psyche.protocol.acceptor import Chain
from psyche.protocol.ledger import BadLedger
from psyche.protocol.messages import Record
from psyche.roles.ledger import LedgerWriter, backfill, verify_ledger, writing
from psyche.roles.local import run_locally
from psyche.state.ledger import NAME, Ledger, LedgerError
from psyche.telemetry.events import Resynchronised, RoundCertified, RoundStarted
from tests.chains import MANIFEST, NAMES, REASON, RULES, Link, certify, chain, link, manifest
from tests.roles.swarm import swarm
from tests.roles.tiny import certified_roots, write_config

CHAIN = chain(6)
OTHER = chain(6, left_out=lambda round: 2)
EACH = RULES.inner_steps * RULES.tokens_per_step


def fill(path: Path, links: list[Link] = CHAIN) -> Path:
    with Ledger.open(path, RULES.run_id) as ledger:
        for one in links:
            ledger.append(one.certificate, one.record, one.root)
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("ledger") / NAME)


@contextmanager
def copied(sound: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copy(sound, Path(folder) / NAME))


def change(path: Path, statement: str, *values: object) -> int:
    """Rows that a forger's statement changed."""
    with sqlite3.connect(path) as forger:
        changed = forger.execute(statement, values).rowcount
    forger.close()
    return changed


def fault(path: Path) -> BadLedger:
    with pytest.raises(BadLedger) as caught:
        verify_ledger(path, MANIFEST)
    return caught.value


def test_a_sound_ledger(sound: Path) -> None:
    found = verify_ledger(sound, MANIFEST)
    assert (found.rounds, found.last, found.missing, found.reconfigurations) == (6, 6, (), 0)
    assert found.tokens == dict.fromkeys(NAMES[:-1], 6 * EACH) | {NAMES[-1]: 3 * EACH}


# ------------------------------------------------------------------------------------- tampering

COLUMNS = ["record_hash", "previous", "base_root", "reconfiguration", "certificate"]
COUNTS = ["votes", "due_steps", "tokens", "inner_steps", "payload_bytes", "minority"]
VALUES = st.one_of(
    st.integers(2, 2**40), st.binary(min_size=1, max_size=40), st.text(min_size=1, max_size=9), st.none()
)


@given(st.integers(1, 6), st.sampled_from(COLUMNS), VALUES)
@settings(deadline=None, max_examples=40)
def test_a_changed_round_is_named(sound: Path, round: int, column: str, value: object) -> None:
    with copied(sound) as path:
        try:
            change(path, f"UPDATE rounds SET {column} = ? WHERE round = ?", value, round)
        except sqlite3.IntegrityError:
            return  # SQLite itself would not have it
        if column == "certificate" and not isinstance(value, bytes):
            with pytest.raises(LedgerError, match=f"the row of round {round} holds no certificate"):
                verify_ledger(path, MANIFEST)
        else:
            assert fault(path).round == round


@given(st.integers(1, 6), st.sampled_from(NAMES), st.sampled_from([*COUNTS, "reason", "node"]), VALUES)
@settings(deadline=None, max_examples=60)
def test_a_changed_member_is_named_with_its_round(
    sound: Path, round: int, node: str, column: str, value: object
) -> None:
    with copied(sound) as path:
        where = "WHERE round = ? AND node = ?"
        with sqlite3.connect(path) as reader:
            (before,) = reader.execute(f"SELECT {column} FROM members {where}", (round, node)).fetchone()
        reader.close()
        try:
            change(path, f"UPDATE members SET {column} = ? {where}", value, round, node)
        except sqlite3.IntegrityError:
            return
        if value != before:
            assert fault(path).round == round


@given(st.integers(1, 6), st.sampled_from(NAMES))
@settings(deadline=None, max_examples=10)
def test_a_member_that_is_gone_is_named_with_its_round(sound: Path, round: int, node: str) -> None:
    with copied(sound) as path:
        assert change(path, "DELETE FROM members WHERE round = ? AND node = ?", round, node) == 1
        assert fault(path).round == round


@given(st.integers(1, 5), st.binary(min_size=32, max_size=32))
@settings(deadline=None, max_examples=10)
def test_a_changed_state_root_is_contradicted_by_the_next_round(sound: Path, round: int, root: bytes) -> None:
    with copied(sound) as path:
        change(path, "UPDATE rounds SET state_root = ? WHERE round = ?", root, round)
        assert fault(path).round == round + 1


@given(st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None, max_examples=15)
def test_swapped_rounds_are_named(sound: Path, one: int, other: int) -> None:
    if one == other:
        return
    with copied(sound) as path:
        for table in ("rounds", "members"):
            for old, new in ((one, 99), (other, one), (99, other)):
                change(path, f"UPDATE {table} SET round = ? WHERE round = ?", new, old)
        assert fault(path).round == min(one, other)


@given(st.integers(1, 6))
@settings(deadline=None, max_examples=6)
def test_another_record_in_the_place_of_one_breaks_the_chain(sound: Path, round: int) -> None:
    """Every column of the row is that of a record that was certified, too, by the same members."""
    with copied(sound) as path:
        for table in ("rounds", "members"):
            change(path, f"DELETE FROM {table} WHERE round = ?", round)
        with tempfile.TemporaryDirectory() as folder:
            foreign = fill(Path(folder) / NAME, [OTHER[round - 1]])
            with sqlite3.connect(path) as forger:
                forger.execute("ATTACH ? AS foreign_ledger", (str(foreign),))
                for table in ("rounds", "members"):
                    forger.execute(f"INSERT INTO {table} SELECT * FROM foreign_ledger.{table}")
            forger.close()
        assert fault(path).round == max(round, 2), "the first is only contradicted by the second"


@given(st.sets(st.integers(1, 6), min_size=1, max_size=5))
@settings(deadline=None, max_examples=15)
def test_missing_rounds_are_named(sound: Path, gone: set[int]) -> None:
    with copied(sound) as path:
        for round in gone:
            change(path, "DELETE FROM rounds WHERE round = ?", round)
        assert "members are listed for it" in fault(path).reason
        for round in gone:
            change(path, "DELETE FROM members WHERE round = ?", round)
        found = verify_ledger(path, MANIFEST)
        last = max(set(range(1, 7)) - gone)
        assert [round for gap in found.missing for round in gap] == sorted(one for one in gone if one < last)
        assert found.rounds == 6 - len(gone)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.9999])
def test_a_truncated_file_is_no_ledger(sound: Path, share: float) -> None:
    with copied(sound) as path:
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(LedgerError, match=str(path)):
            verify_ledger(path, MANIFEST)


def test_a_changed_vote_is_named(sound: Path) -> None:
    with copied(sound) as path:
        (certificate,) = [one.certificate for one in CHAIN if one.record.plan.round == 4]
        forged = certificate[:-3] + bytes([certificate[-3] ^ 1]) + certificate[-2:]
        change(path, "UPDATE rounds SET certificate = ? WHERE round = 4", forged)
        assert fault(path).round == 4
        assert "cannot be believed" in fault(path).reason
        change(path, "UPDATE rounds SET certificate = ? WHERE round = 4", certify(CHAIN[3].record, voters=2))
        assert "2 votes are not more than two thirds of 4" in fault(path).reason


def test_a_run_that_went_back_is_told_by_its_ledger(sound: Path) -> None:
    with copied(sound) as path:
        with Ledger.open(path, RULES.run_id) as ledger:
            other = chain(5, left_out=lambda round: round % 2 if round < 5 else 2)[4]
            ledger.supersede(other.certificate, other.record, other.root)
        found = fault(path)
        assert (found.round, "certified twice" in found.reason) == (5, True)
        foreign = chain(6, flavour=b"other")[5]
        with Ledger.open(path, RULES.run_id) as ledger:
            change(path, "DELETE FROM superseded")
            ledger.supersede(foreign.certificate, foreign.record, foreign.root)
        found = fault(path)
        assert (found.round, "certified twice" in found.reason) == (5, True), "round 6 is built on another round 5"
        change(path, "UPDATE superseded SET certificate = ?", b"made up")
        assert "proves nothing" in fault(path).reason


# ---------------------------------------------------------------------------------- the commands


def psyche(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A node's, with rounds 3 to 6."""
    fill(tmp_path / NAME, CHAIN[2:])
    (tmp_path / "manifest.msgpack").write_bytes(MANIFEST.encode())
    return tmp_path


def test_verify_says_what_is_sound_and_what_is_missing(directory: Path, sound: Path) -> None:
    result = psyche("verify", directory)
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        f"sound: 4 certified rounds up to round 6, {14 * EACH:,} tokens of 4 nodes, 0 reconfigurations; "
        "missing here: rounds 1–2\n"
    )
    result = psyche("verify", sound, "--manifest", directory / "manifest.msgpack")
    assert "6 certified rounds" in result.stdout
    assert "none is missing" in result.stdout


def test_verify_names_the_round_and_the_reason(directory: Path) -> None:
    change(directory / NAME, "UPDATE members SET tokens = tokens + 1 WHERE round = 5")
    result = psyche("verify", directory)
    assert isinstance(result.exception, PsycheError)
    assert "round 5: its members are not listed as its certificate says" in str(result.exception)


def test_verify_says_what_it_needs(directory: Path) -> None:
    (directory / "manifest.msgpack").write_bytes(manifest("another").encode())
    assert "and the manifest that of" in str(psyche("verify", directory).exception)
    (directory / "manifest.msgpack").unlink()
    assert "name it with --manifest" in str(psyche("verify", directory).exception)
    assert "there is no ledger at" in str(psyche("show", directory / "nowhere").exception)


def test_verify_ends_with_one_sentence_and_a_code(directory: Path) -> None:
    change(directory / NAME, "UPDATE rounds SET certificate = x'00' WHERE round = 4")
    done = subprocess.run(
        [sys.executable, "-m", "psyche", "ledger", "verify", str(directory)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "is not the history of the run: round 4: its certificate proves nothing" in done.stderr


def test_show_is_a_table_and_totals(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = psyche("show", directory)
    assert result.exit_code == 0, result.output
    words = " ".join(result.stdout.split())
    for one in CHAIN[2:]:
        out = f" …{NAMES[-1][-6:]}: {REASON}" if one.record.excluded else ""
        count, hashes = len(one.record.accepted), f"{one.record.hash.hex()[:8]} {one.root.hex()[:8]}"
        assert f"{one.record.plan.round} {count}/4 {count * EACH:,} {hashes}{out}" in words
    assert f"…{NAMES[-1][-6:]} 2/4 {2 * EACH:,}" in words
    assert "missing here: rounds 1–2" in words
    latest = psyche("show", directory, "--last", 1).stdout
    assert CHAIN[5].record.hash.hex()[:8] in latest
    assert CHAIN[4].record.hash.hex()[:8] not in latest
    assert f"…{NAMES[-1][-6:]}" in latest, "totals are of all rounds"


def test_show_marks_reconfigurations_and_what_was_superseded(tmp_path: Path) -> None:
    def survivors(record: Record) -> Record:
        return msgspec.structs.replace(record, electorate=NAMES[:3], reconfiguration=record.plan.round == 2)

    path = fill(tmp_path / NAME, CHAIN[:2])
    with Ledger.open(path, RULES.run_id) as ledger:
        ledger.supersede(OTHER[0].certificate, OTHER[0].record, OTHER[0].root)
        again = link(OTHER[0], mend=survivors)
        ledger.append(again.certificate, again.record, again.root)
    words = " ".join(psyche("show", path).stdout.split())
    assert words.count("reconfiguration") == 1
    assert "certified before with another record, and superseded: 1, 2" in words


def test_show_as_json_and_of_one_node(directory: Path) -> None:
    story = json.loads(psyche("show", directory, "--json", "--node", NAMES[-1][-6:], "--last", 2).stdout)
    assert [(one["round"], len(one["members"])) for one in story["rounds"]] == [(5, 1), (6, 1)]
    assert story["rounds"][0]["members"][0] == {
        "node": NAMES[-1],
        "votes": 1,
        "tokens": None,
        "inner_steps": None,
        "payload_bytes": None,
        "reason": REASON,
        "minority": False,
    }
    assert story["rounds"][1]["members"][0]["tokens"] == EACH
    assert list(story["totals"]) == [NAMES[-1]]
    assert (story["missing"], story["held"], story["run_id"]) == ([[1, 2]], 4, RULES.run_id.hex())
    assert "no member" in str(psyche("show", directory, "--node", "nobody").exception)
    assert "4 members" in str(psyche("show", directory, "--node", "").exception)


def test_show_says_which_certificate_it_cannot_read(directory: Path) -> None:
    change(directory / NAME, "UPDATE rounds SET certificate = x'00' WHERE round = 4")
    assert "the certificate of round 4" in str(psyche("show", directory).exception)


def test_importing_the_commands_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'sqlite3', 'rich.table'}"
    code = f"import sys, psyche.cli.ledger; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


# ---------------------------------------------------------------------------------------- at work


def test_the_writer_writes_what_was_entered_before_it_is_closed(tmp_path: Path) -> None:
    warnings: list[str] = []

    async def work() -> None:
        async with writing(Ledger.open(tmp_path / NAME, RULES.run_id), warnings.append) as writer:
            for one in (*CHAIN[:3], CHAIN[1]):
                writer.enter(one.certificate, one.record, one.root)
                writer.check()

    asyncio.run(work())
    with Ledger.read(tmp_path / NAME) as ledger:
        assert list(ledger.entries()) == [one.entry for one in CHAIN[:3]]
    assert warnings == []


def test_the_writer_follows_a_run_that_went_back_and_says_so(tmp_path: Path) -> None:
    """All of a run's nodes were killed, say, and started again from checkpoints older than their ledgers."""
    warnings: list[str] = []
    writer = LedgerWriter(Ledger.open(fill(tmp_path / NAME), RULES.run_id), warnings.append)
    again = chain(6, left_out=lambda round: round % 2 if round < 5 else 2)
    for one in again[4:]:
        writer.enter(one.certificate, one.record, one.root)
    writer.close()
    writer.check()
    with Ledger.read(tmp_path / NAME) as ledger:
        assert list(ledger.entries()) == [*(one.entry for one in CHAIN[:4]), *(one.entry for one in again[4:])]
        assert ledger.superseded() == [one.entry for one in CHAIN[4:]]
    (warning,) = warnings
    assert "round 5 was certified twice" in warning
    assert "2 rounds of the ledger are superseded" in warning


def test_what_cannot_be_written_is_raised_where_it_is_asked_for(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / NAME, RULES.run_id)
    ledger._connection.execute("PRAGMA query_only = ON")

    async def work() -> None:
        async with writing(ledger, print) as writer:
            writer.enter(CHAIN[0].certificate, CHAIN[0].record, None)

    with pytest.raises(LedgerError, match="cannot use the ledger"):
        asyncio.run(work())


@pytest.mark.parametrize("there", [0, 2, 6])
def test_a_checkpoint_fills_a_ledger_that_is_younger(tmp_path: Path, there: int) -> None:
    """Of an earlier version: with the whole chain, here up to round 5. And one of this: with the last certificate."""
    fill(tmp_path / NAME, CHAIN[:there])
    warnings: list[str] = []
    at = Chain(5, CHAIN[4].record.hash, CHAIN[4].root, 0)
    certificates = [one.certificate for one in CHAIN[:5]]
    with Ledger.open(tmp_path / NAME, RULES.run_id) as ledger:
        backfill(ledger, MANIFEST, at, [*certificates[4:], b"made up"], warnings.append)
        assert ledger.rounds() == sorted({*range(1, there + 1), 5})
        backfill(ledger, MANIFEST, at, certificates, warnings.append)
        assert list(ledger.entries()) == [one.entry for one in CHAIN[: max(5, there)]]
    assert len(warnings) == 1
    assert "proves nothing" in warnings[0]


# --------------------------------------------------------------------------------- of a real run


def test_all_of_a_run_keep_the_same_chain(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=3)
    run = tmp_path / "run"
    run_locally(config, None, run, fresh=True, report=False)
    roots = certified_roots(run / "coordinator" / "events.jsonl")
    files = [run / name / NAME for name in ("coordinator", "node-1", "node-2", "node-3")]
    chains = []
    for file in files:
        result = psyche("verify", file.parent)
        assert result.exit_code == 0, result.exception
        assert result.stdout.startswith("sound: 4 certified rounds up to round 4")
        with Ledger.read(file) as ledger:
            chains.append([ledger.hash_of(round) for round in ledger.rounds()])
            assert [one.state_root.hex() for one in ledger.entries() if one.state_root] == roots
    assert len(chains[0]) == 4
    assert all(one == chains[0] for one in chains)


ROUNDS = {"inner_steps": 40, "min_members": 1, "total": 500, "start_members": 3}
QUICK = {"round_min": 3.0, "round_max": 20.0, "exchange_min": 3.0, "exchange_max": 10.0, "silence": 5.0}


@pytest.mark.slow
def test_a_killed_node_comes_back_from_an_older_checkpoint_to_the_same_chain(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=3, rounds=ROUNDS, deadlines=QUICK)
    names = ["node-1", "node-2", "node-3"]
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in names:
            run.node(name)
        run.wait("node-3", RoundCertified, lambda event: event.round == 3)  # its checkpoint is of round 2
        run.kill("node-3")
        cut = run.events("coordinator", RoundCertified)[-1].round
        run.wait("coordinator", RoundCertified, lambda event: event.round > cut + 1)
        run.node("node-3")
        back = run.wait("node-3", Resynchronised)
        run.wait("node-3", RoundCertified, lambda event: event.round > back.round)
        for name in [*names, "coordinator"]:
            assert run.kill(name, signal.SIGINT) == 130, run.output(name)
        for name in [*names, "coordinator"]:
            result = psyche("verify", run.directory / name)
            assert result.exit_code == 0, result.exception
        hashes = {name: _hashes(run.directory / name / NAME) for name in [*names, "coordinator"]}
        for name in names:
            shared = hashes[name].keys() & hashes["coordinator"].keys()
            assert len(shared) >= 4
            assert all(hashes[name][round] == hashes["coordinator"][round] for round in shared)


def _hashes(path: Path) -> dict[int, bytes | None]:
    with Ledger.read(path) as ledger:
        return {round: ledger.hash_of(round) for round in ledger.rounds()}


@pytest.mark.slow
def test_a_run_that_was_killed_altogether_goes_back_and_its_ledgers_say_so(tmp_path: Path) -> None:
    """Nobody holds the state after round 3 any more: all go on from their checkpoints of round 2."""
    config = write_config(tmp_path, members=2, rounds=ROUNDS | {"start_members": 2}, deadlines=QUICK)
    names = ["node-1", "node-2", "coordinator"]
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in names[:2]:
            run.node(name)
        run.wait("coordinator", RoundCertified, lambda event: event.round == 3)
        for name in names:
            run.kill(name)
        (run.directory / "coordinator" / "invite").unlink()
        run.coordinator()
        for name in names[:2]:
            run.node(name)
        run.wait("coordinator", RoundStarted, lambda event: event.round > 4)
        for name in names:
            assert run.kill(name, signal.SIGINT) == 130, run.output(name)
        for name in names:
            with Ledger.read(run.directory / name / NAME) as ledger:
                assert ledger.missing() == ()
                assert [entry.round for entry in ledger.superseded()] == [3]
                hashes = [ledger.hash_of(round) for round in range(1, 5)]
            assert hashes == list(_hashes(run.directory / names[0] / NAME).values())[:4]
            assert "round 3: certified twice" in str(psyche("verify", run.directory / name).exception)

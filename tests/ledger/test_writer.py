"""The ledger writer, and the ledgers of real runs."""

from __future__ import annotations

import asyncio
import shutil
import signal
from pathlib import Path

import pytest

from psyche.coordinator.cosigner import SIGNED_STATE
from psyche.exchange.payload_journal import DIRECTORY as JOURNAL
from psyche.ledger.store import NAME, Ledger, LedgerError
from psyche.ledger.writer import LedgerWriter, backfill, writing
from psyche.protocol.acceptor import Chain
from psyche.telemetry.events import RoundCertified, RoundStarted
from psyche.worker.voter import BALLOT
from tests.chains import MANIFEST, RULES, chain
from tests.ledgers import CHAIN, fill, psyche_ledger
from tests.processes.swarm import swarm
from tests.tiny import write_config


def test_closing_the_writer_flushes_entered_records(tmp_path: Path) -> None:
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


def test_missing_rounds_do_not_hide_present_ones(tmp_path: Path) -> None:
    """A node that joined late, or was away, has a gap."""
    one, two, *_, five, six = (entry.certificate for entry in CHAIN[:6])

    async def work() -> None:
        async with writing(Ledger.open(tmp_path / NAME, RULES.run_id), print) as writer:
            for entry in (CHAIN[0], CHAIN[1], CHAIN[4], CHAIN[5]):
                writer.enter(entry.certificate, entry.record, entry.root)
            assert await writer.held(range(1, 7), 1 << 20) == [one, two, five, six]
            assert await writer.held(range(3, 6), 1 << 20) == [five]
            assert await writer.held(range(3, 5), 1 << 20) == []
            assert await writer.held(range(1, 7), 1) == [six], "the latest rounds are returned first"
            assert await writer.certificates(1, 1 << 20) == [one, two]

    asyncio.run(work())


def test_the_writer_follows_a_run_that_rolled_back_and_warns(tmp_path: Path) -> None:
    """For instance, all nodes were killed and restarted from checkpoints older than their ledgers."""
    warnings: list[str] = []
    writer = LedgerWriter(Ledger.open(fill(tmp_path / NAME), RULES.run_id), warnings.append)
    again = chain(6, left_out=lambda round_number: round_number % 2 if round_number < 5 else 2)
    for one in again[4:]:
        writer.enter(one.certificate, one.record, one.root)
    writer.close()
    writer.check()
    with Ledger.read(tmp_path / NAME) as ledger:
        assert list(ledger.entries()) == [*(one.entry for one in CHAIN[:4]), *(one.entry for one in again[4:])]
        assert ledger.superseded() == [one.entry for one in CHAIN[4:]]
    (warning,) = warnings
    assert "round 5 was certified twice" in warning
    assert "2 rounds of this ledger are superseded" in warning


def test_a_write_error_is_raised_to_the_caller(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / NAME, RULES.run_id)
    ledger._connection.execute("PRAGMA query_only = ON")

    async def work() -> None:
        async with writing(ledger, print) as writer:
            writer.enter(CHAIN[0].certificate, CHAIN[0].record, None)

    with pytest.raises(LedgerError, match="cannot use the ledger"):
        asyncio.run(work())


@pytest.mark.parametrize("there", [0, 2, 6])
def test_a_checkpoint_backfills_an_older_ledger(tmp_path: Path, there: int) -> None:
    """Checkpoints of an earlier version hold the whole chain; those of this version hold the last certificate."""
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
    assert "invalid certificate" in warnings[0]


# ---------------------------------------------------------------------------------- real runs


ROUNDS = {"inner_steps": 40, "min_members": 1, "total": 500, "start_members": 3}
QUICK = {"round_min": 3.0, "round_max": 20.0, "exchange_min": 3.0, "exchange_max": 10.0, "silence": 5.0}


@pytest.mark.slow
def test_a_node_restarted_from_an_older_checkpoint_rejoins_the_same_chain(tmp_path: Path) -> None:
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
        back = run.events("node-3", RoundCertified)[-1].round
        run.wait("node-3", RoundCertified, lambda event: event.round > back)
        for name in [*names, "coordinator"]:
            assert run.kill(name, signal.SIGINT) == 130, run.output(name)
        for name in [*names, "coordinator"]:
            result = psyche_ledger("verify", run.directory / name)
            assert result.exit_code == 0, result.exception
        hashes = {name: _hashes(run.directory / name / NAME) for name in [*names, "coordinator"]}
        for name in names:
            shared = hashes[name].keys() & hashes["coordinator"].keys()
            assert len(shared) >= 4
            assert all(hashes[name][round_number] == hashes["coordinator"][round_number] for round_number in shared)


def _hashes(path: Path) -> dict[int, bytes | None]:
    with Ledger.read(path) as ledger:
        return {round_number: ledger.hash_of(round_number) for round_number in ledger.rounds()}


@pytest.mark.slow
def test_ledgers_prove_that_a_run_certified_a_round_twice(tmp_path: Path) -> None:
    """All processes lose round 3 and their signing records, as if their disks were restored from older copies."""
    config = write_config(tmp_path, members=2, rounds=ROUNDS | {"start_members": 2}, deadlines=QUICK)
    names = ["node-1", "node-2", "coordinator"]
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in names[:2]:
            run.node(name)
        run.wait("coordinator", RoundCertified, lambda event: event.round == 3)
        run.cut_power()
        for name in names:
            shutil.rmtree(run.directory / name / JOURNAL, ignore_errors=True)
            for record in (BALLOT, SIGNED_STATE):
                (run.directory / name / record).unlink(missing_ok=True)
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
                hashes = [ledger.hash_of(round_number) for round_number in range(1, 5)]
            assert hashes == list(_hashes(run.directory / names[0] / NAME).values())[:4]
            assert "round 3: certified twice" in str(psyche_ledger("verify", run.directory / name).exception)

"""The check that anyone can make of a ledger file, and the credits that follow from it.

Nearly all of its time goes into signatures, and every stretch of rounds can be checked on its own once the entry before
it is known. So long ledgers are cut into stretches, and all cores check them; credits are then added up in order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import msgspec

from psyche.config import Manifest
from psyche.config.manifest import chain_rules
from psyche.ledger.schema import audit_rows, member_rows, round_row
from psyche.ledger.store import Ledger, LedgerError
from psyche.network.identity import open_envelope
from psyche.protocol.chain import BadLedger, Verified, prove, verify_chain
from psyche.protocol.credits import Change, CreditAccounts, RoundWork, round_work
from psyche.protocol.wire import Message

STRETCH = 64
"""Rounds checked as one unit of work: half a second on one core and 6 MB of memory with a hundred nodes."""
ALONE = 4 * STRETCH
"""Ledgers up to this many rounds are checked in this process: starting another takes half a second."""
MAX_WORKERS = 16
"""Each takes 60 MB of memory."""

Progress = Callable[[int, int], None]
"""Called with the number of rounds checked so far and in all."""


class Checked(Message, frozen=True):
    """What a valid stretch contributes to the summary."""

    round_work: tuple[RoundWork, ...]
    missing: tuple[tuple[int, int], ...]
    """First round of each gap, and the round after its last."""
    reconfigurations: int


@dataclass(frozen=True)
class Stretch:
    """``count`` rounds of the ledger from ``first`` on; ``before`` is the ledger's round before them, or None."""

    first: int
    count: int
    before: int | None


@dataclass
class Summary:
    """What a valid ledger contains."""

    credits: CreditAccounts
    """All credits, computed from the chain alone."""
    settled: list[Change] = field(default_factory=list)
    """Settled changes that the caller wanted, in order."""
    rounds: int = 0
    last: int = 0
    missing: list[range] = field(default_factory=list)
    """Gaps: rounds before the last one that are not in the ledger."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Accepted tokens by node, over all rounds in the ledger."""
    reconfigurations: int = 0


def verify_ledger(
    path: Path,
    manifest: Manifest,
    *,
    progress: Progress = lambda done, total: None,
    wanted: Callable[[Change], bool] = lambda change: False,
    workers: int | None = None,
) -> Summary:
    """Verify a ledger file against the run's manifest alone.

    Settled changes that are ``wanted`` are collected. ``workers`` is the number of processes, by default one a core.
    Raises :class:`LedgerError` if the file is unreadable, damaged or of another run, and :class:`BadLedger`, which
    names the first bad round, if its content is not what the run's members certified.
    """
    with Ledger.read(path) as ledger:
        if ledger.run_id != manifest.run_id:
            raise LedgerError(
                f"{path} is the ledger of run {ledger.run_id.hex()[:16]}…, but the manifest is of run "
                f"{manifest.run_id.hex()[:16]}…: give the right one with --manifest"
            )
        rounds = ledger.rounds()
        summary = Summary(CreditAccounts(chain_rules(manifest)))
        with _checking(ledger, manifest, _stretches(rounds), workers) as found:
            ledger.check_pages()  # the worker processes run meanwhile
            for checked in found:
                _add(summary, checked, wanted)
                progress(summary.rounds, len(rounds))
        for stray in ledger.strays():
            raise BadLedger(stray, "it has members or audits but no certificate")
        _verify_superseded(ledger, manifest)
    return summary


def _stretches(rounds: Sequence[int]) -> list[Stretch]:
    starts = range(0, len(rounds), STRETCH)
    return [Stretch(rounds[at], len(rounds[at : at + STRETCH]), rounds[at - 1] if at else None) for at in starts]


def _add(summary: Summary, checked: Checked, wanted: Callable[[Change], bool]) -> None:
    for done in checked.round_work:
        summary.settled += filter(wanted, summary.credits.enter(done))
        summary.tokens.update({one.node: one.tokens for one in done.work})
        summary.rounds, summary.last = summary.rounds + 1, done.round
    summary.missing += [range(start, stop) for start, stop in checked.missing]
    summary.reconfigurations += checked.reconfigurations


# --------------------------------------------------------------------------------- a stretch of rounds


def check_stretch(ledger: Ledger, manifest: Manifest, stretch: Stretch) -> Checked:
    """Verify every signature, vote, hash link and row of a stretch. Raises :class:`BadLedger`."""
    rules = chain_rules(manifest)
    before = None if stretch.before is None else ledger.entry(stretch.before)
    done: list[RoundWork] = []
    missing: list[tuple[int, int]] = []
    reconfigurations = 0
    for verified in verify_chain(
        islice(ledger.entries(stretch.first), stretch.count),
        rules=rules,
        coordinators=manifest.resolved.coordinators,
        open_envelope=open_envelope,
        after=before,
    ):
        _compare(ledger, verified)
        done.append(round_work(verified.record, rules.probation))
        missing += [(verified.missing.start, verified.missing.stop)] if verified.missing else []
        reconfigurations += verified.record.is_reconfiguration
    if len(done) < stretch.count or (before is None) != (stretch.before is None):
        raise LedgerError(
            f"{ledger.path} was changed while it was being verified, because the run went back: run the command again"
        )
    return Checked(tuple(done), tuple(missing), reconfigurations)


def _compare(ledger: Ledger, verified: Verified) -> None:
    """Compare the columns and tables for SQL with the certificate they derive from."""
    record = verified.record
    round_number = record.plan.round
    if ledger.row(round_number) != round_row(record):
        raise BadLedger(round_number, "its row does not match its certificate")
    if ledger.member_rows(round_number) != member_rows(record):
        raise BadLedger(round_number, "its rows in members do not match its certificate")
    if ledger.audit_rows(round_number) != audit_rows(record):
        raise BadLedger(round_number, "its rows in audits do not match its certificate")


def _verify_superseded(ledger: Ledger, manifest: Manifest) -> None:
    """A superseded record that differs from the round's record proves that the run certified a round twice."""
    for entry in ledger.superseded():
        record = prove(
            entry,
            run_id=manifest.run_id,
            coordinators=manifest.resolved.coordinators,
            open_envelope=open_envelope,
        )
        after = ledger.row(entry.round + 1)
        there = ledger.hash_of(entry.round) or (None if after is None else after[2])
        if there is not None and there != record.hash:
            raise BadLedger(
                entry.round, f"certified twice, as {there.hex()[:12]} and, superseded, as {record.hash.hex()[:12]}"
            )


# ------------------------------------------------------------------------------------- the processes


@contextmanager
def _checking(
    ledger: Ledger, manifest: Manifest, stretches: Sequence[Stretch], workers: int | None
) -> Iterator[Iterator[Checked]]:
    """Yield the results of all stretches in order, from worker processes if the ledger is long enough."""
    if workers is None:
        workers = 1 if len(stretches) * STRETCH <= ALONE else os.cpu_count() or 1
    workers = min(workers, len(stretches), MAX_WORKERS)
    if workers <= 1:
        yield (check_stretch(ledger, manifest, one) for one in stretches)
        return
    # spawn: a forked child would inherit the locks of this process's threads
    context = multiprocessing.get_context("spawn")
    start = (ledger.path, manifest.encode())
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=start)
    try:
        yield _results([executor.submit(_check, one) for one in stretches], ledger.path)
    finally:
        executor.shutdown(cancel_futures=True)


def _results(futures: Sequence[Future[bytes]], path: Path) -> Iterator[Checked]:
    for future in futures:
        try:
            yield msgspec.msgpack.decode(future.result(), type=Checked)
        except BrokenProcessPool:
            raise LedgerError(
                f"a process that verified {path} was killed, probably for lack of memory: free memory and try again"
            ) from None


_work: tuple[Ledger, Manifest]
"""Ledger and manifest of a worker process."""


def _begin(path: Path, manifest: bytes) -> None:
    """Initialise a worker process: open the file, and exit with the parent, which alone handles Ctrl-C."""
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    _work = Ledger.read(path), Manifest.decode(manifest)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check(stretch: Stretch) -> bytes:
    return msgspec.msgpack.encode(check_stretch(*_work, stretch))

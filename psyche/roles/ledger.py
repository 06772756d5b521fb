"""The ledger at work: a thread that writes it beside the event loop, and the check that anyone can make of a file."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from psyche.config import Manifest
from psyche.network.identity import open_envelope
from psyche.protocol.acceptor import Chain
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.ledger import BadLedger, Verified, prove, verify_chain
from psyche.protocol.messages import Certificate, Record
from psyche.protocol.wire import decode
from psyche.roles.chain_rules import chain_rules
from psyche.roles.proofs import record_in
from psyche.state.ledger import Forked, Ledger, LedgerError
from psyche.state.ledger_schema import member_rows, round_row


@contextlib.asynccontextmanager
async def writing(ledger: Ledger, warn: Callable[[str], None]) -> AsyncIterator[LedgerWriter]:
    """A writer of ``ledger``. When the block is left all is on disk, or the :class:`LedgerError` is raised."""
    writer = LedgerWriter(ledger, warn)
    try:
        yield writer
    finally:
        await asyncio.to_thread(writer.close)
    writer.check()


class LedgerWriter:
    """Writes a ledger on a thread of its own: a flush of the disk never holds up a round.

    What was entered last may be lost with the process; that is harmless, for a node that starts again goes on from a
    checkpoint, and is shown the certificate of the round it then finds the run in.
    """

    def __init__(self, ledger: Ledger, warn: Callable[[str], None]) -> None:
        self._ledger, self._warn = ledger, warn
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._failure: Exception | None = None

    def enter(self, certificate: bytes, record: Record, state_root: bytes | None) -> None:
        """Append a certified round, soon. Where the run went back on rounds that are in, it is followed, and said."""
        self._thread.submit(self._enter, certificate, record, state_root)

    async def certificates(self, first: int, most: int) -> list[bytes]:
        """Of the rounds from ``first`` on, one after the other without a gap, as many as ``most`` bytes hold."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._certificates, first, most)

    def _certificates(self, first: int, most: int) -> list[bytes]:
        found: list[bytes] = []
        for entry in self._ledger.entries(first):
            most -= len(entry.certificate)
            if entry.round != first + len(found) or (found and most < 0):
                break
            found.append(entry.certificate)
        return found

    def check(self) -> None:
        """Raise what a round could not be written for (:class:`LedgerError`: the disk is full, say), if anything."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait for what is under way, and close the file."""
        self._thread.shutdown()
        self._ledger.close()

    def _enter(self, certificate: bytes, record: Record, state_root: bytes | None) -> None:
        try:
            try:
                self._ledger.append(certificate, record, state_root)
            except Forked as fork:
                moved = self._ledger.supersede(certificate, record, state_root)
                self._warn(f"{fork}; the run goes on from the latter, {moved} rounds of the ledger are superseded")
        except Exception as error:  # a bug, too, is the event loop's to see: check()
            self._failure = error


def backfill(
    ledger: Ledger, manifest: Manifest, chain: Chain, certificates: Iterable[bytes], warn: Callable[[str], None]
) -> None:
    """Enter what a checkpoint at ``chain`` proves and the ledger lacks.

    Checkpoints of earlier versions held the whole chain, and a ledger may be younger than its node. Raises
    :class:`LedgerError`.
    """
    there = set(ledger.rounds())
    for encoded in certificates:
        try:
            certificate = decode(Certificate, encoded)
            record = record_in(manifest, certificate)
        except (MalformedMessage, BadCertificate) as error:
            warn(f"a certificate in the checkpoint proves nothing, and is not entered in the ledger: {error}")
            continue
        if record.plan.round not in there:
            try:
                ledger.append(encoded, record, chain.state_root if record.hash == chain.head else None)
            except Forked as fork:
                warn(f"{fork}; the checkpoint's is not entered")


# ------------------------------------------------------------------------------------ the check


@dataclass(frozen=True)
class Summary:
    """What a sound ledger holds."""

    rounds: int
    last: int
    missing: tuple[range, ...]
    """Rounds before the last one that are not there."""
    tokens: dict[str, int]
    """Of each node, over all its accepted contributions that are there."""
    reconfigurations: int


def verify_ledger(path: Path, manifest: Manifest) -> Summary:
    """Check a ledger file against nothing but the run's manifest.

    Raises :class:`LedgerError` where the file cannot be read, is damaged, or is another run's, and :class:`BadLedger`,
    which names the round, where what it says is not what the run's members have certified.
    """
    with Ledger.read(path) as ledger:
        if ledger.run_id != manifest.run_id:
            raise LedgerError(
                f"{path} is the ledger of run {ledger.run_id.hex()[:16]}…, and the manifest that of "
                f"{manifest.run_id.hex()[:16]}…: give the right one with --manifest"
            )
        ledger.check_pages()
        summary = _verify_chain(ledger, manifest)
        for stray in ledger.strays():
            raise BadLedger(stray, "members are listed for it, and it is not there")
        _verify_superseded(ledger, manifest)
    return summary


def _verify_chain(ledger: Ledger, manifest: Manifest) -> Summary:
    tokens: Counter[str] = Counter()
    missing: list[range] = []
    rounds = last = reconfigurations = 0
    for verified in verify_chain(
        ledger.entries(),
        rules=chain_rules(manifest),
        coordinators=manifest.resolved.coordinators,
        open_envelope=open_envelope,
    ):
        _compare(ledger, verified)
        tokens.update(verified.tokens)
        missing += [verified.missing] if verified.missing else []
        rounds, last = rounds + 1, verified.record.plan.round
        reconfigurations += verified.record.reconfiguration
    return Summary(rounds, last, tuple(missing), dict(tokens), reconfigurations)


def _compare(ledger: Ledger, verified: Verified) -> None:
    """What the file says for those who ask it in SQL is what the certificate says."""
    record = verified.record
    if ledger.row(record.plan.round) != round_row(record):
        raise BadLedger(record.plan.round, "its row does not say what its certificate says")
    if ledger.member_rows(record.plan.round) != member_rows(record):
        raise BadLedger(record.plan.round, "its members are not listed as its certificate says")


def _verify_superseded(ledger: Ledger, manifest: Manifest) -> None:
    """A second certified record of a round is a fault of the run, proven by this file."""
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

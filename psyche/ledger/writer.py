"""The ledger at work: a thread that writes it beside the event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from psyche.config import Manifest
from psyche.ledger.certificate_check import certified_record
from psyche.ledger.store import Forked, Ledger
from psyche.protocol.acceptor import Chain
from psyche.protocol.certificates import BadCertificate
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.messages import Certificate, Record
from psyche.protocol.wire import decode


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

    async def held(self, rounds: range, most: int) -> list[bytes]:
        """Certificates of those of ``rounds`` that are here, ascending: a node that joined late, or was away, lacks
        some. At most ``most`` bytes, or the last one; the latest rounds come first where they are more."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._held, rounds, most)

    def _certificates(self, first: int, most: int) -> list[bytes]:
        found: list[bytes] = []
        for entry in self._ledger.entries(first):
            most -= len(entry.certificate)
            if entry.round != first + len(found) or (found and most < 0):
                break
            found.append(entry.certificate)
        return found

    def _held(self, rounds: range, most: int) -> list[bytes]:
        found: list[bytes] = []
        for round_number in reversed(rounds):
            entry = self._ledger.entry(round_number)
            if entry is not None:
                most -= len(entry.certificate)
                if found and most < 0:
                    break
                found.append(entry.certificate)
        return found[::-1]

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
            record = certified_record(manifest, certificate)
        except (MalformedMessage, BadCertificate) as error:
            warn(f"a certificate in the checkpoint proves nothing, and is not entered in the ledger: {error}")
            continue
        if record.plan.round not in there:
            try:
                ledger.append(encoded, record, chain.state_root if record.hash == chain.head else None)
            except Forked as fork:
                warn(f"{fork}; the checkpoint's is not entered")

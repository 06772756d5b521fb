"""Write the ledger from an asyncio process, on a thread of its own."""

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
from psyche.protocol.messages import Certificate, Record
from psyche.protocol.wire import MalformedMessage, decode


@contextlib.asynccontextmanager
async def writing(ledger: Ledger, warn: Callable[[str], None]) -> AsyncIterator[LedgerWriter]:
    """Open a writer of ``ledger``. When the block ends, all entries are on disk or :class:`LedgerError` is raised."""
    writer = LedgerWriter(ledger, warn)
    try:
        yield writer
    finally:
        await asyncio.to_thread(writer.close)
    writer.check()


class LedgerWriter:
    """Writes a ledger on a thread, so that a disk flush never delays a round.

    A crash may lose the last entries. That is harmless: a node restarts from a checkpoint and receives the certificate
    of the round that the run is in.
    """

    def __init__(self, ledger: Ledger, warn: Callable[[str], None]) -> None:
        self._ledger, self._warn = ledger, warn
        self._thread = ThreadPoolExecutor(1, "ledger")
        self._failure: Exception | None = None

    def enter(self, certificate: bytes, record: Record, state_root: bytes | None) -> None:
        """Queue a certified round. If the run went back, the contradicting rounds are superseded, with a warning."""
        self._thread.submit(self._enter, certificate, record, state_root)

    def fill(self, certificate: bytes, record: Record) -> None:
        """Queue a certified round that a peer provided. It never replaces what this node has entered itself."""
        self._thread.submit(self._fill, certificate, record)

    async def certificates(self, first: int, most: int) -> list[bytes]:
        """Return certificates of consecutive rounds from ``first`` on, up to ``most`` bytes but at least one."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._certificates, first, most)

    async def held(self, rounds: range, most: int) -> list[bytes]:
        """Return certificates of those ``rounds`` that are in the ledger, ascending.

        At most ``most`` bytes, but at least one; the latest rounds take precedence.
        """
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._held, rounds, most)

    async def extent(self) -> tuple[tuple[range, ...], int]:
        """Return the gaps of the ledger, and its last round (0 if it is empty)."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._extent)

    def _extent(self) -> tuple[tuple[range, ...], int]:
        return self._ledger.missing(), max(self._ledger.rounds(), default=0)

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
        """Raise the error that an entry failed with, if any (:class:`LedgerError`, for example on a full disk)."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Finish all queued writes and close the file."""
        self._thread.shutdown()
        self._ledger.close()

    def _fill(self, certificate: bytes, record: Record) -> None:
        try:
            self._ledger.append(certificate, record, None)
        except Forked as fork:
            self._warn(f"a round fetched from a peer is not entered: {fork}")
        except Exception as error:  # see _enter
            self._failure = error

    def _enter(self, certificate: bytes, record: Record, state_root: bytes | None) -> None:
        try:
            try:
                self._ledger.append(certificate, record, state_root)
            except Forked as fork:
                moved = self._ledger.supersede(certificate, record, state_root)
                self._warn(f"{fork}; the run continues from the latter; {moved} rounds of this ledger are superseded")
        except Exception as error:  # of any type, so that check() raises bugs too
            self._failure = error


def backfill(
    ledger: Ledger, manifest: Manifest, chain: Chain, certificates: Iterable[bytes], warn: Callable[[str], None]
) -> None:
    """Enter the rounds that a checkpoint's ``certificates`` prove and the ledger lacks. Raises :class:`LedgerError`.

    The checkpoint is at ``chain``.
    """
    there = set(ledger.rounds())
    for encoded in certificates:
        try:
            certificate = decode(Certificate, encoded)
            record = certified_record(manifest, certificate)
        except (MalformedMessage, BadCertificate) as error:
            warn(f"invalid certificate in the checkpoint, not entered in the ledger: {error}")
            continue
        if record.plan.round not in there:
            try:
                ledger.append(encoded, record, chain.state_root if record.hash == chain.head else None)
            except Forked as fork:
                warn(f"{fork}; the record of the checkpoint is not entered")

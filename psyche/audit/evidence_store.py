"""What an auditor keeps of work that it did not pass, so that anybody can do it again from files and the ledger alone.

``<directory>/<round>-<accused>/`` holds what the audit was handed: the audit bundle, and its blobs by their roots, as
``bundle.py`` has them. With them lies what proves θ, which no record names: the chunk hashes of the outer state before
the round,
whose root is in the round's plan.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from typing_extensions import Buffer

from psyche.diloco.audit_bundle import NAME as KIT
from psyche.diloco.audit_bundle import AuditBundle, Base, Unserved, read_blob
from psyche.protocol.envelope import MalformedMessage
from psyche.protocol.wire import B, decode

EVIDENCE = "evidence"
"""Its place in a node's directory."""
CASES = 4
"""Of the newest rounds, that are kept: each is about 20 bytes a parameter, and cheats decide how many there are."""
BASE = "base"
_BEGUN = ".begun"


class Evidence:
    """What one node has of the newest cases that it did not pass. Who reads writes nothing."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def keep(
        self, accused: str, round_number: int, bundle: AuditBundle, blobs: Mapping[bytes, Buffer], base: Base
    ) -> None:
        """Write a case, blobs by their roots, and forget the oldest. Raises ``OSError``, and then is as it was."""
        begun, place = self._directory / _BEGUN, self._place(accused, round_number)
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        try:
            for root, blob in blobs.items():
                (begun / root.hex()).write_bytes(blob)
            (begun / BASE).write_bytes(base.encode())
            (begun / KIT).write_bytes(bundle.encode())
            shutil.rmtree(place, ignore_errors=True)
            begun.rename(place)
        except OSError:
            shutil.rmtree(begun, ignore_errors=True)
            raise
        for node, old in self.cases()[:-CASES]:
            shutil.rmtree(self._place(node, old), ignore_errors=True)

    def cases(self) -> list[tuple[str, int]]:
        """Accused and round of all that is here, the oldest round first."""
        found = (path.name.split("-") for path in self._directory.glob("*-*"))
        return sorted(((node, int(round_number)) for round_number, node in found), key=lambda case: (case[1], case[0]))

    def bundle(self, accused: str, round_number: int) -> AuditBundle:
        """Raises :class:`Unserved` where it is not here, or damaged."""
        return self._decoded(AuditBundle, self._place(accused, round_number) / KIT)

    def base(self, accused: str, round_number: int) -> Base:
        """Raises :class:`Unserved` where it is not here, or damaged."""
        return self._decoded(Base, self._place(accused, round_number) / BASE)

    def read(self, accused: str, round_number: int, root: bytes, limit: int) -> bytes:
        """A blob, of at most ``limit`` bytes. Raises :class:`Unserved`."""
        return read_blob(self._place(accused, round_number), root, limit)

    def _decoded(self, kind: type[B], path: Path) -> B:
        try:
            return decode(kind, path.read_bytes())
        except (OSError, MalformedMessage) as error:
            raise Unserved(f"{path.name}: {error}") from None

    def _place(self, accused: str, round_number: int) -> Path:
        return self._directory / f"{round_number:08d}-{accused}"

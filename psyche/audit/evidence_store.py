"""Evidence of failed audits: what the auditor was served. With the ledger, anyone can repeat the audit from it.

``<directory>/<round>-<audited node>/`` holds the audit bundle and its blobs by their roots, in the format of
``diloco/audit_bundle.py``, and the :class:`ThetaProof` of the state before the round.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from typing_extensions import Buffer

from psyche.diloco.audit_bundle import BUNDLE, AuditBundle, BlobUnavailable, ThetaProof, read_blob
from psyche.protocol.wire import B, MalformedMessage, decode

EVIDENCE_DIRECTORY = "evidence"
"""Directory in a node's directory."""
MAX_CASES = 4
"""Cases that are kept, the newest rounds first: each takes about 20 bytes a parameter, and cheats decide how many
there are."""
THETA_PROOF = "theta-proof"
"""File name of the :class:`ThetaProof` in a case's directory."""
_WRITING = ".writing"


class EvidenceStore:
    """One node's evidence on disk. Reading never writes or deletes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def save(
        self, accused: str, round_number: int, bundle: AuditBundle, blobs: Mapping[bytes, Buffer], proof: ThetaProof
    ) -> None:
        """Write a case, ``blobs`` by root, and delete the oldest ones. Raises ``OSError`` and changes nothing."""
        staging, place = self._directory / _WRITING, self._place(accused, round_number)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        try:
            for root, blob in blobs.items():
                (staging / root.hex()).write_bytes(blob)
            (staging / THETA_PROOF).write_bytes(proof.encode())
            (staging / BUNDLE).write_bytes(bundle.encode())
            shutil.rmtree(place, ignore_errors=True)
            staging.rename(place)
        except OSError:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        for node, old in self.cases()[:-MAX_CASES]:
            shutil.rmtree(self._place(node, old), ignore_errors=True)

    def cases(self) -> list[tuple[str, int]]:
        """Return (audited node, round) of all cases, the oldest round first."""
        found = (path.name.split("-") for path in self._directory.glob("*-*"))
        return sorted(((node, int(round_number)) for round_number, node in found), key=lambda case: (case[1], case[0]))

    def bundle(self, accused: str, round_number: int) -> AuditBundle:
        """Return the case's audit bundle. Raises :class:`BlobUnavailable` if it is missing or damaged."""
        return self._decode(AuditBundle, self._place(accused, round_number) / BUNDLE)

    def theta_proof(self, accused: str, round_number: int) -> ThetaProof:
        """Return the case's proof of θ. Raises :class:`BlobUnavailable` if it is missing or damaged."""
        return self._decode(ThetaProof, self._place(accused, round_number) / THETA_PROOF)

    def read(self, accused: str, round_number: int, root: bytes, limit: int) -> bytes:
        """Return a verified blob of at most ``limit`` bytes. Raises :class:`BlobUnavailable`."""
        return read_blob(self._place(accused, round_number), root, limit)

    def _decode(self, kind: type[B], path: Path) -> B:
        try:
            return decode(kind, path.read_bytes())
        except (OSError, MalformedMessage) as error:
            raise BlobUnavailable(f"{path.name}: {error}") from None

    def _place(self, accused: str, round_number: int) -> Path:
        return self._directory / f"{round_number:08d}-{accused}"

"""Verify certificates and proposals against a run's manifest."""

from __future__ import annotations

from psyche.config import Manifest
from psyche.network.identity import open_envelope
from psyche.protocol.certificates import check_certificate, check_proposal
from psyche.protocol.messages import Certificate, Proposal, Record
from psyche.protocol.wire import decode_envelope


def certified_record(manifest: Manifest, certificate: Certificate) -> Record:
    """Verify ``certificate`` and return the record that it makes final. Raises ``BadCertificate``."""
    return check_certificate(
        certificate,
        run_id=manifest.run_id,
        coordinators=manifest.resolved.coordinators,
        open_envelope=open_envelope,
    )


def verified_proposal(manifest: Manifest, signed: bytes, round_number: int | None = None) -> Proposal:
    """Verify an encoded, signed proposal and return it; it must be for ``round_number`` if that is given.

    Raises ``BadCertificate`` or ``MalformedMessage``.
    """
    return check_proposal(
        decode_envelope(signed),
        run_id=manifest.run_id,
        coordinators=manifest.resolved.coordinators,
        open_envelope=open_envelope,
        round_number=round_number,
    )

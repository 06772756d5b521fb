"""Proof that a record is final: the proposal a coordinator signed, and the votes of a quorum for it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from psyche.protocol import envelope as envelopes
from psyche.protocol.envelope import Envelope, MalformedMessage
from psyche.protocol.messages import Certificate, Proposal, Record, Vote, decode
from psyche.protocol.proposals import carries_quorum


class Open(Protocol):
    """Checks an envelope's purpose, run, round and signature; raises on the first that is wrong."""

    def __call__(self, envelope: Envelope, *, domain: str, run_id: bytes, round: int | None = None) -> None: ...


class BadCertificate(ValueError):
    """Why a certificate proves nothing."""


def check_certificate(
    certificate: Certificate, *, run_id: bytes, coordinators: Collection[str], open_envelope: Open
) -> Record:
    """The record that ``certificate`` makes final. Raises :class:`BadCertificate`."""
    try:
        return _check(certificate, run_id, coordinators, open_envelope)
    except MalformedMessage as error:
        raise BadCertificate(str(error)) from None


def _check(certificate: Certificate, run_id: bytes, coordinators: Collection[str], open_envelope: Open) -> Record:
    signed = envelopes.decode(certificate.proposal)
    proposal = decode(Proposal, signed.body)
    record, plan = proposal.record, proposal.record.plan
    if signed.author not in coordinators:
        raise BadCertificate(f"proposed by {signed.author}, who is no coordinator of this run")
    _open(open_envelope, signed, "proposal", run_id, plan.round)
    members = {member.node for member in plan.members}
    if not set(record.electorate) <= members or (set(record.electorate) != members) != record.reconfiguration:
        raise BadCertificate("the electorate is not that of the round")
    wanted, voters = (proposal.term, record.hash), set()
    for item in certificate.votes:
        envelope = envelopes.decode(item)
        _open(open_envelope, envelope, "vote", run_id, plan.round)
        vote = decode(Vote, envelope.body)
        if (vote.term, vote.record) != wanted:
            raise BadCertificate(f"the vote of {envelope.author} is for something else")
        voters.add(envelope.author)
    if not carries_quorum(plan, voters, record.electorate):
        counted = len(voters & set(record.electorate))
        raise BadCertificate(f"{counted} votes are not more than two thirds of {len(record.electorate)}")
    return record


def _open(open_envelope: Open, envelope: Envelope, domain: str, run_id: bytes, round: int) -> None:
    try:
        open_envelope(envelope, domain=domain, run_id=run_id, round=round)
    except Exception as error:  # whatever the reason, it proves nothing
        raise BadCertificate(f"the {domain} of {envelope.author} cannot be believed: {error}") from None

"""Certificates, which prove that a record is final: the coordinator's signed proposal, a quorum's votes, and seals.

Seals keep reconfigurations safe, because the new voters need not overlap with the old ones. Of n coordinators more than
half sign a reconfiguration and ``seals_needed(n)`` seal a certificate, so one coordinator at least is asked for both;
and none gives both, unless the reconfiguration came first and the certificate is of its electorate. With one or two
coordinators a single one can certify; a reconfiguration takes one, or both.

:class:`SignedState` is what a coordinator has signed. It is on disk before anyone sees a signature. It is the only
thing that a coordinator must not forget; it learns everything else from the members.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from psyche.protocol.messages import Attestation, Certificate, Hello, Proposal, Reconfiguration, Record, Seal, Vote
from psyche.protocol.standing import has_quorum, total
from psyche.protocol.wire import Body, Envelope, MalformedMessage, decode, decode_envelope


class Open(Protocol):
    """Checks an envelope's purpose, run, round and signature; raises on the first that is wrong."""

    def __call__(self, envelope: Envelope, *, domain: str, run_id: bytes, round_number: int | None = None) -> None: ...


class BadCertificate(ValueError):
    """A certificate is invalid; the text says why."""


def signatures_needed(coordinators: int) -> int:
    """Return how many coordinators must sign a reconfiguration: more than half."""
    return coordinators // 2 + 1


def seals_needed(coordinators: int) -> int:
    """Return how many must seal a certificate, so that they overlap with those who sign any reconfiguration."""
    return coordinators - signatures_needed(coordinators) + 1


def check_certificate(
    certificate: Certificate, *, run_id: bytes, coordinators: Sequence[str], open_envelope: Open
) -> Record:
    """Verify a certificate and return its record. Raises :class:`BadCertificate`.

    The caller compares the electorate with the record before, if it holds that.
    """
    return certified(certificate, run_id=run_id, coordinators=coordinators, open_envelope=open_envelope).record


def certified(certificate: Certificate, *, run_id: bytes, coordinators: Sequence[str], open_envelope: Open) -> Proposal:
    """Verify a certificate and return its proposal, with the term. Raises :class:`BadCertificate`."""
    try:
        signed = decode_envelope(certificate.proposal)
        proposal = check_proposal(signed, run_id=run_id, coordinators=coordinators, open_envelope=open_envelope)
        _check_votes(certificate.votes, proposal, run_id, open_envelope)
        _check_seals(certificate.seals, proposal.record, run_id, coordinators, open_envelope)
    except MalformedMessage as error:
        raise BadCertificate(str(error)) from None
    return proposal


def check_proposal(
    signed: Envelope,
    *,
    run_id: bytes,
    coordinators: Sequence[str],
    open_envelope: Open,
    round_number: int | None = None,
) -> Proposal:
    """Verify a proposal: signed by the coordinator of its term, under a reconfiguration in force.

    Raises :class:`BadCertificate` or ``MalformedMessage``.
    """
    if signed.author not in coordinators:
        raise BadCertificate(f"proposed by {signed.author}, which is not a coordinator of this run")
    proposal = decode(Proposal, signed.body)
    record, plan = proposal.record, proposal.record.plan
    if coordinators[proposal.term % len(coordinators)] != signed.author:
        raise BadCertificate(f"term {proposal.term} does not belong to {signed.author}")
    _open(open_envelope, signed, Proposal.DOMAIN, run_id, plan.round if round_number is None else round_number)
    _check_statements(record, run_id, open_envelope)
    if not record.electorate or len(record.electorate) != len(record.voting_weights):
        raise BadCertificate("the record has no electorate, or not one weight for each of its nodes")
    if list(record.electorate) != sorted(set(record.electorate)):
        raise BadCertificate("the electorate is not in ascending order")
    if record.reconfiguration:
        reconfiguration = Reconfiguration(plan.previous, record.reconfiguration, record.electorate)
        count = len(
            _signers(proposal.reconfiguration, reconfiguration, plan.round, run_id, coordinators, open_envelope)
        )
        if count < signatures_needed(len(coordinators)):
            raise BadCertificate(
                f"{count} of {len(coordinators)} coordinators signed the reconfiguration; more than half must"
            )
    return proposal


def _check_statements(record: Record, run_id: bytes, open_envelope: Open) -> None:
    """Verify the auditors' statements in a record."""
    for item in record.audit_state.statements:
        envelope = decode_envelope(item)
        _open(open_envelope, envelope, envelope.domain, run_id, envelope.round)


def _check_votes(votes: Iterable[bytes], proposal: Proposal, run_id: bytes, open_envelope: Open) -> None:
    record, voters = proposal.record, set()
    vote = Vote(proposal.term, record.hash).encode()
    for item in votes:
        envelope = decode_envelope(item)
        _open(open_envelope, envelope, Vote.DOMAIN, run_id, record.plan.round)
        if envelope.body != vote:
            decode(Vote, envelope.body)  # raises if it is malformed
            raise BadCertificate(f"the vote of {envelope.author} is for something else")
        voters.add(envelope.author)
    if not has_quorum(voters, record.weights):
        share = total(record.weights, voters) / total(record.weights)
        raise BadCertificate(f"{len(voters)} votes have {share:.1%} of the weight; more than two thirds must vote")


def _check_seals(
    seals: Iterable[bytes], record: Record, run_id: bytes, coordinators: Sequence[str], open_envelope: Open
) -> None:
    seal = Seal(record.plan.previous, record.reconfiguration, record.hash)
    count = len(_signers(seals, seal, record.plan.round, run_id, coordinators, open_envelope))
    needed = seals_needed(len(coordinators))
    if count < needed:
        raise BadCertificate(f"{count} of {len(coordinators)} coordinators sealed it; {needed} needed")


def _signers(
    items: Iterable[bytes],
    body: Body,
    round_number: int,
    run_id: bytes,
    coordinators: Collection[str],
    open_envelope: Open,
) -> set[str]:
    """Return the coordinators whose signature of exactly ``body`` is among ``items``."""
    signers = set()
    for item in items:
        envelope = decode_envelope(item)
        _open(open_envelope, envelope, body.DOMAIN, run_id, round_number)
        if envelope.author not in coordinators:
            raise BadCertificate(f"a {body.DOMAIN} signed by {envelope.author}, which is not a coordinator of this run")
        if envelope.body != body.encode():
            raise BadCertificate(f"{envelope.author} signed another {body.DOMAIN}")
        signers.add(envelope.author)
    return signers


def _open(open_envelope: Open, envelope: Envelope, domain: str, run_id: bytes, round_number: int) -> None:
    try:
        open_envelope(envelope, domain=domain, run_id=run_id, round_number=round_number)
    except Exception as error:  # for whatever reason, the envelope is invalid
        raise BadCertificate(f"the {domain} of {envelope.author} is invalid: {error}") from None


def attests_state(
    items: Iterable[bytes],
    *,
    round_number: int,
    state_root: bytes,
    weights: Mapping[str, int],
    run_id: bytes,
    open_envelope: Open,
) -> bool:
    """Return whether nodes with more than half of ``weights`` sign that ``state_root`` is the state after a round.

    ``items`` are signed :class:`Attestation` or :class:`Hello` messages. Those that are malformed, of another round or
    state, or of nodes without weight, count nothing.
    """
    holders: set[str] = set()
    for item in items:
        try:
            envelope = decode_envelope(item)
            if envelope.author not in weights or envelope.author in holders:
                continue
            kind: type[Attestation | Hello] = Attestation if envelope.domain == Attestation.DOMAIN else Hello
            _open(open_envelope, envelope, kind.DOMAIN, run_id, round_number)
            if decode(kind, envelope.body).state_root == state_root:
                holders.add(envelope.author)
        except (MalformedMessage, BadCertificate):
            continue
    return 2 * total(weights, holders) > total(weights)


KEPT_ROUNDS = 64
"""Rounds for which a coordinator remembers what it signed. It signs nothing for older ones."""


@dataclass(frozen=True)
class SignedInRound:
    """What a coordinator signed for one round."""

    reconfiguration: int = 0
    """The highest number of a reconfiguration that it signed."""
    electorate: tuple[str, ...] = ()
    """The electorate of that reconfiguration."""
    sealed: bytes = b""
    """Hash of the record that it sealed."""


@dataclass(frozen=True)
class SignedState:
    """What a coordinator has signed, by hash of the record before the round, and the last term in which it led."""

    term: int = 0
    rounds: Mapping[bytes, tuple[int, SignedInRound]] = field(default_factory=dict)
    """Number of the round, and what was signed for it."""


class ConflictingSignature(ValueError):
    """A signature is refused because it would conflict with an earlier one."""

    def __init__(self, reason: str, *, reconfiguration: int = 0, sealed: bytes = b"") -> None:
        super().__init__(reason)
        self.reconfiguration = reconfiguration
        """Number of the conflicting reconfiguration; a later number would not conflict. 0: there is none."""
        self.sealed = sealed
        """Hash of the conflicting record."""


def lead(signed_state: SignedState, place: int, coordinators: int, above: int) -> SignedState:
    """Return the signed state with a new term to lead in: above ``above`` and all terms used before."""
    term = max(signed_state.term, above) + 1
    return replace(signed_state, term=term + (place - term) % coordinators)


def sign_reconfiguration(
    signed_state: SignedState, round_number: int, previous: bytes, number: int, electorate: tuple[str, ...]
) -> SignedState:
    """Return the signed state after signing reconfiguration ``number``. Raises :class:`ConflictingSignature`."""
    signed = _signed(signed_state, round_number, previous)
    if signed.sealed:
        raise ConflictingSignature(
            f"a record of round {round_number} was sealed: its electorate cannot change", sealed=signed.sealed
        )
    if (number, electorate) == (signed.reconfiguration, signed.electorate):
        return signed_state
    if number <= signed.reconfiguration:
        raise ConflictingSignature(
            f"reconfiguration {signed.reconfiguration} of round {round_number} was signed before",
            reconfiguration=signed.reconfiguration,
        )
    return _with(signed_state, round_number, previous, replace(signed, reconfiguration=number, electorate=electorate))


def seal(
    signed_state: SignedState, round_number: int, previous: bytes, reconfiguration: int, record: bytes
) -> SignedState:
    """Return the signed state after sealing ``record``. Raises :class:`ConflictingSignature`."""
    signed = _signed(signed_state, round_number, previous)
    if signed.sealed not in (b"", record):
        raise ConflictingSignature(f"another record of round {round_number} was sealed before", sealed=signed.sealed)
    if reconfiguration < signed.reconfiguration:
        raise ConflictingSignature(
            f"reconfiguration {signed.reconfiguration} of round {round_number} was signed, after {reconfiguration}",
            reconfiguration=signed.reconfiguration,
        )
    return _with(signed_state, round_number, previous, replace(signed, sealed=record))


def _signed(signed_state: SignedState, round_number: int, previous: bytes) -> SignedInRound:
    if previous in signed_state.rounds:
        return signed_state.rounds[previous][1]
    newest = max((number for number, _ in signed_state.rounds.values()), default=0)
    if round_number <= newest - KEPT_ROUNDS:
        raise ConflictingSignature(f"round {round_number} is too long ago")
    if any(number == round_number for number, _ in signed_state.rounds.values()):
        raise ConflictingSignature(f"something else was signed before round {round_number}")
    return SignedInRound()


def _with(signed_state: SignedState, round_number: int, previous: bytes, signed: SignedInRound) -> SignedState:
    rounds = {key: value for key, value in signed_state.rounds.items() if value[0] > round_number - KEPT_ROUNDS}
    return replace(signed_state, rounds=rounds | {previous: (round_number, signed)})

"""What a coordinator may sign of a round: a roster, or the seal of a record, and never both against each other. Pure.

What is returned here is on the coordinator's disk before anybody sees the signature. It is the only thing a coordinator
must not forget; everything else it reads from the members.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

KEPT_ROUNDS = 64
"""Of which a coordinator remembers what it signed. Nobody asks about older ones, and who does is refused."""


@dataclass(frozen=True)
class Signed:
    """What was signed of one round."""

    reconfiguration: int = 0
    """The highest number of a roster."""
    electorate: tuple[str, ...] = ()
    """That it named."""
    sealed: bytes = b""
    """Hash of the record that was sealed."""


@dataclass(frozen=True)
class SignedState:
    """What a coordinator has signed, by hash of the record before the round; and the last term it began to lead in."""

    term: int = 0
    rounds: Mapping[bytes, tuple[int, Signed]] = field(default_factory=dict)
    """Number of the round, and what was signed of it."""


class ConflictingSignature(ValueError):
    """Why a signature is refused: it would stand against an earlier one."""

    def __init__(self, reason: str, *, reconfiguration: int = 0, sealed: bytes = b"") -> None:
        super().__init__(reason)
        self.reconfiguration = reconfiguration
        """Number of a roster that stands in the way; a later one would not. 0: there is none."""
        self.sealed = sealed
        """Hash of a record that does."""


def lead(signed_state: SignedState, place: int, coordinators: int, above: int) -> SignedState:
    """The oath with a term to lead in: the first of this coordinator's own above ``above`` and all it had before."""
    term = max(signed_state.term, above) + 1
    return replace(signed_state, term=term + (place - term) % coordinators)


def sign_reconfiguration(
    signed_state: SignedState, round_number: int, previous: bytes, number: int, electorate: tuple[str, ...]
) -> SignedState:
    """After signing roster ``number`` of ``round``. Raises :class:`ConflictingSignature`."""
    signed = _signed(signed_state, round_number, previous)
    if signed.sealed:
        raise ConflictingSignature(
            f"a record of round {round_number} was sealed: its electorate cannot change", sealed=signed.sealed
        )
    if (number, electorate) == (signed.reconfiguration, signed.electorate):
        return signed_state
    if number <= signed.reconfiguration:
        raise ConflictingSignature(
            f"roster {signed.reconfiguration} of round {round_number} was signed before",
            reconfiguration=signed.reconfiguration,
        )
    return _with(signed_state, round_number, previous, replace(signed, reconfiguration=number, electorate=electorate))


def seal(
    signed_state: SignedState, round_number: int, previous: bytes, reconfiguration: int, record: bytes
) -> SignedState:
    """After sealing ``record`` of ``round``. Raises :class:`ConflictingSignature`."""
    signed = _signed(signed_state, round_number, previous)
    if signed.sealed not in (b"", record):
        raise ConflictingSignature(f"another record of round {round_number} was sealed before", sealed=signed.sealed)
    if reconfiguration < signed.reconfiguration:
        raise ConflictingSignature(
            f"roster {signed.reconfiguration} of round {round_number} was signed, after {reconfiguration}",
            reconfiguration=signed.reconfiguration,
        )
    return _with(signed_state, round_number, previous, replace(signed, sealed=record))


def _signed(signed_state: SignedState, round_number: int, previous: bytes) -> Signed:
    if previous in signed_state.rounds:
        return signed_state.rounds[previous][1]
    newest = max((number for number, _ in signed_state.rounds.values()), default=0)
    if round_number <= newest - KEPT_ROUNDS:
        raise ConflictingSignature(f"round {round_number} is too long ago")
    if any(number == round_number for number, _ in signed_state.rounds.values()):
        raise ConflictingSignature(f"something else was signed before round {round_number}")
    return Signed()


def _with(signed_state: SignedState, round_number: int, previous: bytes, signed: Signed) -> SignedState:
    rounds = {key: value for key, value in signed_state.rounds.items() if value[0] > round_number - KEPT_ROUNDS}
    return replace(signed_state, rounds=rounds | {previous: (round_number, signed)})

"""The interface of a coordinator's two calls, ``watch`` and ``submit``: limits, and the codes of its refusals."""

from __future__ import annotations

from enum import StrEnum

WATCH_SECONDS = 4.0
"""How long a coordinator holds a ``watch`` call open while nothing changes; well under any ``silence`` bound."""
MAX_SUBMISSION = 1 << 20
"""Bytes of the largest ``submit`` request."""
MAX_STATUS = 8 << 20
"""Bytes of the largest :class:`~psyche.protocol.messages.RunStatus`."""


class RefusalCode(StrEnum):
    """Why a coordinator refuses a call. Programs compare the code; the sentence beside it is for people."""

    NOT_LEADING = "not-leading"
    """Another coordinator leads, or none does yet."""
    UNKNOWN_PEER = "unknown-peer"
    """The coordinator does not know the caller, or has forgotten it after a restart or a silence: send ``Hello``."""
    MALFORMED = "malformed"
    """The message does not decode, its signature is wrong, or what it proves is not proven."""
    BANNED = "banned"
    """The sender was convicted of cheating in this run."""
    NOT_A_MEMBER = "not-a-member"
    """The sender is neither in the plan nor in the electorate that the message is about."""
    WRONG_ROUND = "wrong-round"
    """The message is about a round that is not open."""
    WRONG_TERM = "wrong-term"
    """The message is about a term that is over or has not begun."""
    TOO_EARLY = "too-early"
    """The round has not reached the stage that the message belongs to."""
    TOO_LATE = "too-late"
    """The deadline of the stage that the message belongs to has passed."""
    CONFLICT = "conflict"
    """The sender said something else before."""
    INVALID = "invalid"
    """The content breaks a rule of the run."""
    NO_OPEN_AUDIT = "no-open-audit"
    """The statement is about an audit that is not open to its sender."""
    BEHIND = "behind"
    """The sender has applied rounds that the coordinator does not know of yet."""

    @property
    def is_routine(self) -> bool:
        """Whether honest nodes cause this in ordinary operation, by two messages that cross on their way."""
        return self in (RefusalCode.NO_OPEN_AUDIT, RefusalCode.WRONG_TERM, RefusalCode.NOT_LEADING)

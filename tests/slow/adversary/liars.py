"""Auditors that lie about the work of others."""

from __future__ import annotations

from collections.abc import Callable

from psyche.audit.simulated_audits import VerdictPolicy
from psyche.protocol.audit_messages import Audit, Finding

FAILED, PASSED, UNSURE = (Finding("measured", error, 0, 0) for error in (900_000, 0, 30_000))


def slander(hostile: frozenset[str]) -> VerdictPolicy:
    """They fail whoever is not one of them."""

    def judge(node: str, case: Audit, look: Callable[[], Finding]) -> Finding:
        if node not in hostile:
            return look()
        return PASSED if case.accused in hostile else FAILED

    return judge


def vouch(hostile: frozenset[str]) -> VerdictPolicy:
    """They pass each other, and say the truth of everybody else."""

    def judge(node: str, case: Audit, look: Callable[[], Finding]) -> Finding:
        return PASSED if node in hostile and case.accused in hostile else look()

    return judge


def wave_through(hostile: frozenset[str]) -> VerdictPolicy:
    """They pass everybody, and save themselves the work."""

    def judge(node: str, case: Audit, look: Callable[[], Finding]) -> Finding:
        return PASSED if node in hostile else look()

    return judge


def shrug(hostile: frozenset[str]) -> VerdictPolicy:
    """They say of everybody that it is hard to say."""

    def judge(node: str, case: Audit, look: Callable[[], Finding]) -> Finding:
        return UNSURE if node in hostile else look()

    return judge

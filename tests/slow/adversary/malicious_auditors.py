"""Policies of auditors that submit false verdicts."""

from __future__ import annotations

from collections.abc import Callable

from psyche.audit.simulated_audits import VerdictPolicy
from psyche.protocol.audit_messages import Audit, Finding

FAILED, PASSED, UNSURE = (Finding("measured", error, 0, 0) for error in (900_000, 0, 30_000))


def fail_honest(hostile: frozenset[str]) -> VerdictPolicy:
    """Fail every node that is not malicious."""

    def verdict(node: str, case: Audit, replay: Callable[[], Finding]) -> Finding:
        if node not in hostile:
            return replay()
        return PASSED if case.accused in hostile else FAILED

    return verdict


def collude(hostile: frozenset[str]) -> VerdictPolicy:
    """Pass malicious nodes; replay all others honestly."""

    def verdict(node: str, case: Audit, replay: Callable[[], Finding]) -> Finding:
        return PASSED if node in hostile and case.accused in hostile else replay()

    return verdict


def pass_all(hostile: frozenset[str]) -> VerdictPolicy:
    """Pass every node without replaying."""

    def verdict(node: str, case: Audit, replay: Callable[[], Finding]) -> Finding:
        return PASSED if node in hostile else replay()

    return verdict


def always_unsure(hostile: frozenset[str]) -> VerdictPolicy:
    """Report an undecided error for every node without replaying."""

    def verdict(node: str, case: Audit, replay: Callable[[], Finding]) -> Finding:
        return UNSURE if node in hostile else replay()

    return verdict

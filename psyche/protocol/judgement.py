"""What a contribution's auditors found, taken together (DESIGN §8: one verdict never convicts). Pure.

One auditor is enough to pass a contribution. What one does not pass goes to a jury: all who can do it again, fifteen at
most, of whom two thirds are believed. Three that are drawn may conspire (of 16 nodes of which 4 do, once in 114 times),
and an honest node would be gone. A jury is dear, and comes once for each cheat or liar, who is gone afterwards.

Replays differ by noise, so that a finding passes, or fails, or says nothing (between the thresholds). The gap between
those is calibrated to be wider than the noise: of two honest auditors never one passes what the other fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from psyche.protocol.state import AuditRules
from psyche.protocol.verdicts import JURY, Audit, Finding, Outcome

MORE = 3
"""Auditors who ask for what its author did not hand over to the first, before that counts; and who fail a contribution
before its author is convicted against anybody's word."""
LEAST = 2
"""Of them where nobody contradicts, and no more can be asked: one verdict never convicts."""
LEAST_JURY = 5
"""Voices of a jury from which on those in the minority are taken for liars, and not only outvoted: two that conspire
are then no two thirds."""

Grade = Literal["pass", "fail", "unsure", "unserved"]


@dataclass(frozen=True)
class Ended:
    """How an audit ended."""

    outcome: Outcome
    right: frozenset[str] = frozenset()
    """Auditors who are paid."""
    lied: frozenset[str] = frozenset()


Judgement = int | Ended
"""How many auditors are wanted from now on, or the end."""


def grade(finding: Finding, rules: AuditRules) -> Grade:
    """What one finding says of the contribution."""
    if finding.outcome == "unserved":
        return "unserved"
    if finding.outcome == "false" or finding.error >= rules.fail_error:
        return "fail"
    return "pass" if finding.error <= rules.pass_error else "unsure"


def decide(audit: Audit, rules: AuditRules, *, again: bool, expired: bool) -> Judgement:
    """What follows from what is on record of ``audit``.

    ``again``: the seed of this round wants a second auditor for what the first has passed. ``expired``: nobody is
    waited for any more.
    """
    grades = {one.auditor: grade(one.finding, rules) for one in audit.opinions if one.finding is not None}
    wanted = min(audit.looks, len(audit.candidates))
    if len(grades) < wanted and not expired:
        return audit.looks
    all_heard = expired or len(grades) >= len(audit.candidates)
    passing, failing, unserved = (_of(grades, one) for one in ("pass", "fail", "unserved"))
    if failing:
        return _tried(audit, passing, failing, all_heard)
    if unserved:
        if audit.looks < MORE and not all_heard:
            return MORE
        gone = len(unserved) > len(passing) and len(unserved) >= LEAST
        return Ended("unserved", unserved) if gone else Ended("passed" if passing else "inconclusive", passing)
    if again and audit.looks == 1 and passing and not all_heard:
        return 2
    if not grades:
        return Ended("dropped")
    return Ended("passed", passing) if passing else Ended("inconclusive", frozenset(grades))


def _tried(audit: Audit, passing: frozenset[str], failing: frozenset[str], all_heard: bool) -> Judgement:
    """At least one fails it."""
    many, few = sorted((passing, failing), key=len, reverse=True)
    if not all_heard and (audit.looks < JURY or 3 * len(many) < 2 * len(audit.candidates)):
        return JURY
    voices = len(passing) + len(failing)
    if 3 * len(many) < 2 * voices:
        return Ended("inconclusive")
    lied = few if voices >= LEAST_JURY else frozenset()
    if many is passing:
        return Ended("passed", passing, lied)
    return Ended("convicted", failing, lied) if len(failing) >= (MORE if passing else LEAST) else Ended("inconclusive")


def _of(grades: dict[str, Grade], wanted: Grade) -> frozenset[str]:
    return frozenset(node for node, found in grades.items() if found == wanted)

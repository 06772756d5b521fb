"""What a contribution's auditors found, taken together: one verdict never convicts. Pure.

One auditor is enough to pass a contribution. What one does not pass goes to a jury: all who can do it again, fifteen at
most, of whom two thirds are believed. Three that are drawn may conspire (of 16 nodes of which 4 do, once in 114 times),
and an honest node would be gone. A jury is dear, and comes once for each cheat or liar, who is gone afterwards.

Replays differ by noise, so that a finding passes, or fails, or says nothing (between the thresholds). The gap between
those is calibrated to be wider than the noise: of two honest auditors never one passes what the other fails.

That an auditor looked at all its sketch says (``audit/probes.py``): where a second one is asked and the two show
different ways, a jury shows which of them is made up. Noise is what keeps honest auditors of other hardware from being
taken for liars then, whatever the audited node did to enlarge it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import median_low
from typing import Literal

from psyche.protocol.audit_messages import JURY, Audit, Finding, Outcome
from psyche.protocol.round_state import AuditRules

MORE = 3
"""Auditors who ask for what its author did not hand over to the first, before that counts; and who fail a contribution
before its author is convicted against anybody's word."""
LEAST = 2
"""Of them where nobody contradicts, and no more can be asked: one verdict never convicts."""
LEAST_JURY = 5
"""Voices of a jury from which on those in the minority are taken for liars, and not only outvoted: two that conspire
are then no two thirds."""
APART = 2
"""Sketches whose distance is more than the smaller one's norm divided by this are not of the same way."""
QUIET = 100_000
"""Millionths: noise up to which a sketch convicts. A fifth of what it would take for honest auditors to be apart."""

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


def decide(audit: Audit, rules: AuditRules, *, fresh: bool, again: bool, late: bool, expired: bool) -> Judgement:
    """What follows from what is on record of ``audit``.

    ``fresh``: a verdict was shown in this very record. ``again``: this round's seed wants a second auditor for what the
    first has not failed; it is asked in the record after, so that nobody knows that when it shows its verdict.
    ``late``: who is asked had time enough, and a jury that is clear goes on without the others. ``expired``: nobody is
    waited for any more.
    """
    shown = {one.auditor: one.finding for one in audit.opinions if one.finding is not None}
    grades = {node: grade(one, rules) for node, one in shown.items()}
    clear = late and audit.looks == JURY and _clear(audit, grades)
    if len(shown) < min(audit.looks, len(audit.able)) and not clear and not expired:
        return audit.looks
    all_heard = expired or len(shown) >= len(audit.able)
    measured = {node: one for node, one in shown.items() if one.outcome == "measured"}
    if _doubtful(measured) and audit.looks < JURY and not all_heard:
        return JURY
    found = _weighed(audit, grades, fresh=fresh, again=again, all_heard=all_heard)
    return found if isinstance(found, int) else _without(found, _astray(audit, measured), len(measured))


def _weighed(audit: Audit, grades: dict[str, Grade], *, fresh: bool, again: bool, all_heard: bool) -> Judgement:
    """What follows from what auditors say of the contribution."""
    passing, failing, unserved = (_of(grades, one) for one in ("pass", "fail", "unserved"))
    if failing:
        return _tried(audit, passing, failing, unserved, all_heard)
    if unserved:
        if audit.looks < MORE and not all_heard:
            return MORE
        gone = audit.weight(unserved) > audit.weight(passing) and len(unserved) >= LEAST
        return Ended("unserved", unserved) if gone else Ended("passed" if passing else "inconclusive", passing)
    if audit.looks == 1 and grades and not all_heard and (fresh or again):
        return 1 if fresh else 2
    if not grades:
        return Ended("dropped")
    return Ended("passed", passing) if passing else Ended("inconclusive", frozenset(grades))


def _tried(
    audit: Audit, passing: frozenset[str], failing: frozenset[str], unserved: frozenset[str], all_heard: bool
) -> Judgement:
    """At least one auditor fails the contribution: a jury decides, by voting weight.

    Withholding the work from a jury counts as failing it: a node that serves it to one auditor can serve it to all.
    """
    against = failing | unserved
    many, few = (passing, against) if audit.weight(passing) > audit.weight(against) else (against, passing)
    if not all_heard and (audit.looks < JURY or not _two_thirds(audit, many, audit.able)):
        return JURY
    voices = passing | against
    if not _two_thirds(audit, many, voices) or 2 * audit.weight(voices) < audit.weight(audit.able):
        return Ended("inconclusive")
    contradicted = many is passing or _two_thirds(audit, failing, passing | failing)
    lied = few - unserved if contradicted and len(voices) >= LEAST_JURY else frozenset()
    if many is passing:
        return Ended("passed", passing, lied)
    least = MORE if passing else LEAST
    if audit.declined:  # those who are left over when many cannot look are not a jury
        least = max(least, (len(audit.candidates) + 1) // 2)
    return Ended("convicted", against, lied) if len(against) >= least else Ended("inconclusive")


def _clear(audit: Audit, grades: dict[str, Grade]) -> bool:
    """Whether no other voice can change anything."""
    failing = _of(grades, "fail")
    against = failing | _of(grades, "unserved") if failing else failing
    return any(_two_thirds(audit, some, audit.able) for some in (_of(grades, "pass"), against))


def _two_thirds(audit: Audit, some: Collection[str], of: Collection[str]) -> bool:
    return 3 * audit.weight(some) >= 2 * audit.weight(of)


def _of(grades: dict[str, Grade], wanted: Grade) -> frozenset[str]:
    return frozenset(node for node, found in grades.items() if found == wanted)


# ----------------------------------------------------------------------------- who did not look


def unlike(one: Finding, other: Finding) -> bool:
    """Whether two auditors show different ways. In integers, so that all nodes agree."""
    a, b = one.sketch, other.sketch
    if len(a) != len(b):
        return True
    apart = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return APART**2 * apart > min(sum(x * x for x in a), sum(y * y for y in b))


def _doubtful(measured: Mapping[str, Finding]) -> bool:
    """Whether somebody did not look."""
    return any(unlike(one, other) for one, other in combinations(measured.values(), 2))


def _astray(audit: Audit, measured: Mapping[str, Finding]) -> frozenset[str]:
    """Who shows another way than two thirds do; nobody where no two thirds show one, or training is noisy."""
    near = ([node for node, one in measured.items() if not unlike(one, middle)] for middle in measured.values())
    most = max(near, key=audit.weight, default=[])
    if not most or not _two_thirds(audit, most, measured) or median_low(measured[node].noise for node in most) > QUIET:
        return frozenset()
    return frozenset(measured) - frozenset(most)


def _without(found: Ended, astray: frozenset[str], voices: int) -> Ended:
    lied = found.lied | astray if voices >= LEAST_JURY else found.lied
    return replace(found, right=found.right - astray, lied=lied)

"""What follows from the findings of a contribution's auditors. One verdict never convicts. Pure.

One auditor is enough to pass a contribution. If it does not pass, a jury of up to fifteen replays it, drawn by voting
weight, of which two thirds of the weight decide. Three drawn auditors may conspire (of 16 nodes of which 4 do, once in
114 times), and an honest node would be banned. A jury is expensive, and is called once for each cheat or liar.

Replays differ by numerical noise, so a finding passes, fails, or is undecided (between the thresholds). The gap is
calibrated to be wider than the noise: no two honest auditors pass and fail the same contribution.

The sketch in a finding shows that its auditor did replay (``audit/probes.py``). Where two auditors' sketches differ, a
jury shows which one is made up. The noise bound keeps honest auditors on other hardware from being taken for liars,
whatever the audited node did to enlarge the noise.
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
"""Auditors that must find the work unserved before that counts; and that must fail it to convict a node if another
auditor passes it."""
LEAST = 2
"""The same where no auditor contradicts and no more can be asked: one verdict never convicts."""
LEAST_JURY = 5
"""Jurors from which on a minority is convicted of lying, not only outvoted: two conspirators are then less than two
thirds."""
APART = 2
"""Two sketches differ if their distance is more than the smaller one's norm divided by this."""
QUIET = 100_000
"""Millionths: noise up to which a sketch convicts. A fifth of the noise at which honest auditors' sketches differ."""

Grade = Literal["pass", "fail", "unsure", "unserved"]


@dataclass(frozen=True)
class Ended:
    """The end of an audit."""

    outcome: Outcome
    right: frozenset[str] = frozenset()
    """Auditors who are paid."""
    lied: frozenset[str] = frozenset()


Judgement = int | Ended
"""The number of auditors needed from now on, or the end."""


def grade(finding: Finding, rules: AuditRules) -> Grade:
    """Grade one finding by the thresholds."""
    if finding.outcome == "unserved":
        return "unserved"
    if finding.outcome == "false" or finding.error >= rules.fail_error:
        return "fail"
    return "pass" if finding.error <= rules.pass_error else "unsure"


def decide(audit: Audit, rules: AuditRules, *, fresh: bool, again: bool, late: bool, expired: bool) -> Judgement:
    """Decide what follows from the opinions on record.

    ``fresh``: a verdict was revealed in this very record. ``again``: this round's seed asks for a second auditor where
    the first has not failed the work; it is asked in the record after, so that the first cannot know it in advance.
    ``late``: the auditors had enough time, so a jury whose majority is clear does not wait for the others. ``expired``:
    the window is over, and nobody is waited for.
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
    """Decide from the grades that the auditors give."""
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
    """Return whether the jurors that are missing cannot change the result."""
    failing = _of(grades, "fail")
    against = failing | _of(grades, "unserved") if failing else failing
    return any(_two_thirds(audit, some, audit.able) for some in (_of(grades, "pass"), against))


def _two_thirds(audit: Audit, some: Collection[str], of: Collection[str]) -> bool:
    return 3 * audit.weight(some) >= 2 * audit.weight(of)


def _of(grades: dict[str, Grade], wanted: Grade) -> frozenset[str]:
    return frozenset(node for node, found in grades.items() if found == wanted)


# ------------------------------------------------------------------- auditors that did not replay


def unlike(one: Finding, other: Finding) -> bool:
    """Return whether two auditors' sketches differ. In integers, so that all nodes agree."""
    a, b = one.sketch, other.sketch
    if len(a) != len(b):
        return True
    apart = sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    return APART**2 * apart > min(sum(x * x for x in a), sum(y * y for y in b))


def _doubtful(measured: Mapping[str, Finding]) -> bool:
    """Return whether some auditor did not replay the work."""
    return any(unlike(one, other) for one, other in combinations(measured.values(), 2))


def _astray(audit: Audit, measured: Mapping[str, Finding]) -> frozenset[str]:
    """Return the auditors whose sketch differs from that of two thirds; none if there is no majority, or much noise."""
    near = ([node for node, one in measured.items() if not unlike(one, middle)] for middle in measured.values())
    most = max(near, key=audit.weight, default=[])
    if not most or not _two_thirds(audit, most, measured) or median_low(measured[node].noise for node in most) > QUIET:
        return frozenset()
    return frozenset(measured) - frozenset(most)


def _without(found: Ended, astray: frozenset[str], voices: int) -> Ended:
    lied = found.lied | astray if voices >= LEAST_JURY else found.lied
    return replace(found, right=found.right - astray, lied=lied)

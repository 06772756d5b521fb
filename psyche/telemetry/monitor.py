"""Combine members' metrics into one summary per round.

Metrics are self-reported. Three rules bound what a member that lies can change:

1. A report with an impossible value (negative, not finite where it counts, more tokens or bytes than the run
   allows) is refused as a whole, with a reason.
2. Sums (tokens, bytes) are bounded by those limits; everything else is a median where possible.
3. Losses are means, weighted by tokens. With three reports or more, a loss is clamped to within a factor
   ``LOSS_SPREAD`` of the median and a held-out weight to twice the median weight, so one member moves the mean
   by a bounded amount and an honest outlier still counts.

These numbers are for people: acceptance, credits and weights do not depend on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean, median
from typing import Any

import msgspec

from psyche.config import Run
from psyche.telemetry.events import (
    AuditEnded,
    Diverged,
    Event,
    MemberMetrics,
    PeerJoined,
    PeerLeft,
    Rejected,
    RoundCertified,
    RoundStarted,
    RoundSummary,
)
from psyche.telemetry.metrics import MEASUREMENTS, Limits, fault

LOSS_SPREAD = 4.0


class Totals(msgspec.Struct, frozen=True):
    """A run's totals before a round."""

    tokens: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    rejections: int = 0
    divergences: int = 0
    audits: int = 0
    convictions: int = 0

    @classmethod
    def after(cls, summary: RoundSummary) -> Totals:
        """Take the totals from the summary of the last round."""
        return cls(
            tokens=summary.tokens_total,
            bytes_up=summary.bytes_up_total,
            bytes_down=summary.bytes_down_total,
            rejections=summary.rejections_total,
            divergences=summary.divergences_total,
            audits=summary.audits_total,
            convictions=summary.convictions_total,
        )


def summarise(
    round_number: int,
    metrics: Sequence[MemberMetrics],
    *,
    parameters: int,
    limits: Limits,
    certified: RoundCertified | None = None,
    totals: Totals | None = None,
) -> RoundSummary:
    """Summarise one round. Pure. Reports of other rounds and impossible ones are ignored; all may be missing.

    ``train_loss`` is weighted by tokens; ``heldout_loss`` is the sum of sums over the sum of tokens, as members
    each judge a part of the held-out set. ``tokens_per_second`` is the swarm's: all tokens over the round's
    duration on the coordinator's clock (``certified.seconds``), or the members' median without it. ``lr``, norms,
    payload size and exchange time are medians; ``compute_utilisation`` is the plain mean of members' shares.
    """
    before = totals or Totals()
    reports = [report for report in metrics if report.round == round_number and not fault(report, limits)]
    seconds = certified.seconds if certified and certified.seconds > 0 else _median(reports, "round_seconds")
    sums = {m.field: sum(getattr(r, m.field) for r in reports) for m in MEASUREMENTS if m.combine == "sum"}
    medians: dict[str, Any] = {m.field: _median(reports, m.field) for m in MEASUREMENTS if m.combine == "median"}
    tokens, bytes_up = sums["tokens"], sums["bytes_up"]
    exchanges = [min(value, seconds or value) for value in _values(reports, "exchange_seconds")]
    tokens_total, bytes_up_total = before.tokens + tokens, before.bytes_up + bytes_up
    return RoundSummary(
        round=round_number,
        state_root=certified.state_root if certified else "",
        members=len(certified.accepted) if certified else len(reports),
        excluded=len(certified.excluded) if certified else 0,
        reports=len(reports),
        refused=len(metrics) - len(reports),
        seconds=seconds,
        train_loss=_train_loss(reports),
        heldout_loss=_heldout_loss(reports),
        tokens_total=tokens_total,
        tokens_per_second=tokens / seconds if seconds else None,
        bytes_up_total=bytes_up_total,
        bytes_down_total=before.bytes_down + sums["bytes_down"],
        payload_ratio=_payload_ratio(reports, parameters),
        bytes_per_token=bytes_up_total / tokens_total if tokens_total else None,
        exchange_seconds=median(exchanges) if exchanges else None,
        exchange_seconds_max=max(exchanges, default=None),
        compute_utilisation=_utilisation(reports),
        rejections_total=before.rejections,
        divergences_total=before.divergences,
        audits_total=before.audits,
        convictions_total=before.convictions,
        **sums,
        **medians,
    )


class Monitor:
    """Collects metrics from the event stream and emits one :class:`RoundSummary` a certified round.

    A round is summarised when every accepted member has reported or left, at the latest when the next round is
    certified, without the members that have not reported by then. The end of the run closes no round: members report
    the last round after it is over, and then leave. A listener: ``log.subscribe(monitor)``.
    """

    def __init__(self, run: Run, parameters: int, emit: Callable[[Event], None]) -> None:
        self._run = run
        self._parameters = parameters
        self._emit = emit
        self._totals = Totals()
        self._closed = 0
        self._newest = 0
        self._reports: dict[int, dict[str, MemberMetrics]] = {}
        self._certified: dict[int, RoundCertified] = {}
        self._gone: set[str] = set()

    def resume(self, events: Iterable[Event]) -> None:
        """Continue the totals of an earlier log of the same run, such as before a restart. Emits nothing."""
        for event in events:
            if isinstance(event, RoundSummary) and event.round > self._closed:
                self._totals, self._closed = Totals.after(event), event.round

    def __call__(self, event: Event) -> None:
        match event:
            case RoundStarted(round=number):
                self._newest = max(self._newest, number)
                # Identities are free: peers that left are remembered only while a round waits for them.
                self._gone &= {peer for certified in self._certified.values() for peer in certified.accepted}
            case PeerJoined(peer=peer):
                self._gone.discard(peer)
            case PeerLeft(peer=peer):
                self._gone.add(peer)
                for waiting in sorted(self._certified):
                    self._close_if_complete(waiting)
            case MemberMetrics(round=number, peer=peer):
                # Reports of rounds that are over or far in the future are not kept: memory is bounded.
                if self._closed < number <= self._newest + 1:
                    self._reports.setdefault(number, {})[peer] = event
                    self._close_if_complete(number)
            case RoundCertified(round=number) if number > self._closed:
                self._newest = max(self._newest, number)
                self._close_all()  # earlier rounds wait no longer
                self._certified[number] = event
                self._close_if_complete(number)
            case Rejected():
                self._totals = msgspec.structs.replace(self._totals, rejections=self._totals.rejections + 1)
            case Diverged():
                self._totals = msgspec.structs.replace(self._totals, divergences=self._totals.divergences + 1)
            case AuditEnded():
                convicted = len(event.lied) + (event.outcome == "convicted")
                before = self._totals
                self._totals = msgspec.structs.replace(
                    before, audits=before.audits + 1, convictions=before.convictions + convicted
                )
            case _:
                pass

    def _close_if_complete(self, number: int) -> None:
        certified = self._certified.get(number)
        if certified and self._reports.get(number, {}).keys() | self._gone >= set(certified.accepted):
            self._close(number)

    def _close_all(self) -> None:
        for number in sorted(self._certified):
            self._close(number)

    def _close(self, number: int) -> None:
        certified = self._certified.pop(number)
        reported = self._reports.pop(number, {})
        reports = [reported[peer] for peer in certified.accepted if peer in reported]
        limits = Limits.of(self._run, self._parameters, len(certified.accepted) + len(certified.excluded))
        summary = summarise(
            number, reports, parameters=self._parameters, limits=limits, certified=certified, totals=self._totals
        )
        self._totals, self._closed = Totals.after(summary), number
        self._reports = {later: reports for later, reports in self._reports.items() if later > number}
        self._emit(summary)
        for report in reports:
            if reason := fault(report, limits):
                self._emit(Rejected(report.peer, reason, "metrics"))


def _values(reports: Iterable[MemberMetrics], field: str) -> list[float]:
    return [value for report in reports if (value := getattr(report, field)) is not None]


def _median(reports: Iterable[MemberMetrics], field: str) -> float | None:
    values = _values(reports, field)
    return median(values) if values else None


def _train_loss(reports: Iterable[MemberMetrics]) -> float | None:
    return _weighted_mean([(r.train_loss, r.tokens) for r in reports if r.train_loss is not None and r.tokens > 0])


def _heldout_loss(reports: Iterable[MemberMetrics]) -> float | None:
    parts = [
        (r.heldout_loss_sum / r.heldout_tokens, r.heldout_tokens)
        for r in reports
        if r.heldout_loss_sum is not None and r.heldout_tokens > 0
    ]
    if len(parts) >= 3:  # shares are nearly equal, so this changes no honest one
        most = 2 * median(weight for _, weight in parts)
        parts = [(loss, min(weight, int(most))) for loss, weight in parts]
    return _weighted_mean(parts)


def _weighted_mean(parts: Sequence[tuple[float, int]]) -> float | None:
    """Mean of (loss, weight) pairs with positive weights; losses are clamped by rule 3 above."""
    if not parts:
        return None
    if len(parts) >= 3:
        middle = median(loss for loss, _ in parts)
        parts = [(min(max(loss, middle / LOSS_SPREAD), middle * LOSS_SPREAD), weight) for loss, weight in parts]
    return math.fsum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts)


def _payload_ratio(reports: Iterable[MemberMetrics], parameters: int) -> float | None:
    sizes = [report.payload_bytes for report in reports if report.payload_bytes > 0]
    return 4 * parameters / median(sizes) if sizes else None


def _utilisation(reports: Iterable[MemberMetrics]) -> float | None:
    shares = [
        min(r.train_seconds / r.round_seconds, 1.0) for r in reports if r.train_seconds is not None and r.round_seconds
    ]
    return fmean(shares) if shares else None

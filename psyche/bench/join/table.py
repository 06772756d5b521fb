"""The join bench's rows, and the table made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any, TypeVar

import msgspec
from rich.table import Table

from psyche.bench.codec.table import percent
from psyche.bench.join.plan import BEFORE, Trial
from psyche.bench.join.run import Joined
from psyche.errors import PsycheError
from psyche.telemetry.events import Downloading, Event, PhaseChanged, Resynchronised, RoundCertified, RunStarted
from psyche.telemetry.formatting import number, size

E = TypeVar("E", bound=Event)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One newcomer; a flat dict of JSON has these fields. Moments are seconds after its process was started."""

    at: float
    """When in a round it came: the share of the inner steps that were over."""
    peers: int
    """Donors there were."""
    params: int
    codec: str
    rate_mbit: float
    """Of each link."""
    round_steps: int
    step_seconds: float
    import_seconds: float
    """What importing alone takes, in a process of its own."""
    imported: float
    """It has imported what its command line needs, and begins."""
    connected: float
    """It is in the network and has the run manifest."""
    asked: float
    """It begins to fetch the state."""
    fetched: float
    """It has the state, and stands at it."""
    first_step: float
    """Its first inner step begins."""
    member: float
    """Its first inner step of a round of which it is a member begins."""
    text_bytes: int
    """Of the text to train on, fetched before the state."""
    state_bytes: int
    transfer_seconds: float
    """Of the state that it took up: from the first request to the last byte."""
    line_share: float
    """The bits of the state over those that the line could carry meanwhile."""
    donors: int
    """That gave something of the state."""
    least_share: float
    """What the donor that gave least gave, over an equal share."""
    moved: int
    """Rounds that the run went on while the state was on its way, whose outer steps were taken on what had come."""
    ideal_seconds: float
    """import_seconds, and the state at the line's rate."""
    ratio: float
    """first_step / ideal_seconds."""
    round_before: float
    """Seconds that a round took the donors without a newcomer: mean over donors and rounds."""
    round_during: float
    """The same, of the rounds during which it joined."""
    slowed: float
    """round_during / round_before - 1."""
    fetching_share: float
    """The share of the rounds during which it joined that passed while it fetched the state."""


def row_of(trial: Trial, joined: Joined, donors: Sequence[Sequence[Event]]) -> Row:
    """A newcomer's events as moments. Raises :class:`PsycheError` where it never got the state."""
    plan, told, began = trial.plan, joined.told, joined.started
    states = _of(told, Resynchronised)
    phases = _of(told, PhaseChanged)
    if not states:
        raise PsycheError("the newcomer took no state from anybody: there were too few rounds to catch up with")
    state = states[-1]
    member = _moment(event for event in phases if event.phase == "training")
    first = min(member, _moment((event for event in phases if event.phase == "warming"), member))
    asked = _moment(event for event in phases if event.phase == "joining" and event.round)
    seconds = state.seconds or 0.0
    ideal = joined.import_seconds + trial.line_seconds
    before, during, span = _rounds(donors, began, first)
    gave = [count for _, count in state.gave]
    return Row(
        at=joined.at,
        peers=plan.peers,
        params=trial.parameters,
        codec=plan.codec,
        rate_mbit=plan.rate / 1e6,
        round_steps=plan.inner_steps,
        step_seconds=plan.step_seconds,
        import_seconds=joined.import_seconds,
        imported=phases[0].time - began,
        connected=_of(told, RunStarted)[0].time - began,
        asked=asked - began,
        fetched=state.time - began,
        first_step=first - began,
        member=member - began,
        text_bytes=max((event.total for event in _of(told, Downloading)), default=0),
        state_bytes=trial.state_bytes,
        transfer_seconds=seconds,
        line_share=trial.line_seconds / seconds,
        donors=len(gave),
        moved=state.moved,
        least_share=min(gave) * len(gave) / sum(gave),
        ideal_seconds=ideal,
        ratio=(first - began) / ideal,
        round_before=before,
        round_during=during,
        slowed=during / before - 1,
        fetching_share=(state.time - asked) / span,
    )


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [msgspec.to_builtins(row) for row in rows]


def table(rows: Sequence[Row]) -> Table:
    """One column a newcomer."""
    shown = Table(title="Joining", title_justify="left", title_style="bold", header_style="dim")
    shown.add_column("a newcomer that comes")
    for row in rows:
        shown.add_column(f"at step {int(row.at * row.round_steps)} of {row.round_steps}", justify="right")

    def line(name: str, value: Callable[[Row], str], *, last: bool = False) -> None:
        shown.add_row(name, *map(value, rows), end_section=last)

    def seconds(name: str, field: str, *, last: bool = False) -> None:
        line(f"{name}, s", lambda row: number(getattr(row, field), ".2f"), last=last)

    seconds("has imported its commands", "imported")
    seconds("is connected, has the manifest", "connected")
    seconds("asks for the state", "asked")
    seconds("has the state", "fetched")
    seconds("takes its first inner step", "first_step")
    seconds("takes its first of a round", "member", last=True)
    seconds("importing alone", "import_seconds")
    seconds("importing alone, and the line", "ideal_seconds")
    line("first inner step, times that", lambda row: number(row.ratio, ".2f"), last=True)
    line("text fetched before", lambda row: size(row.text_bytes))
    seconds("the state on its way", "transfer_seconds")
    line("line used for it", lambda row: f"{percent(row.line_share)} %")
    line("rounds that the run went on meanwhile", lambda row: str(row.moved))
    line("donors", lambda row: f"{row.donors} (the least: {percent(row.least_share)} % of a share)", last=True)
    seconds("donors' round before", "round_before")
    seconds("donors' round meanwhile", "round_during")
    line("slowed by", lambda row: f"{100 * row.slowed:+.1f} %")
    line("part of it that states were fetched in", lambda row: f"{percent(row.fetching_share)} %")
    return shown


def _rounds(donors: Sequence[Sequence[Event]], began: float, ended: float) -> tuple[float, float, float]:
    """Mean seconds of a donor's rounds before and during ``[began, ended]``, and the latter's sum of one donor."""
    before: list[float] = []
    during: list[float] = []
    for told in donors:
        ends = [event.time for event in _of(told, RoundCertified)]
        spans = [(start, end) for start, end in pairwise(ends) if start < ended]
        before += [end - start for start, end in spans if end < began][-BEFORE:]
        during += [end - start for start, end in spans if end >= began]
    return mean(before), mean(during), sum(during) / len(donors)


def _moment(found: Iterable[Event], default: float | None = None) -> float:
    """When the first of them was."""
    times = [event.time for event in found]
    if not times and default is None:
        raise PsycheError("the newcomer took no inner step")
    return times[0] if times or default is None else default


def _of(told: Iterable[Event], kind: type[E]) -> list[E]:
    return [event for event in told if isinstance(event, kind)]

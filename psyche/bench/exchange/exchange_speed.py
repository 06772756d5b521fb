"""Measure one exchange of all peers' parameters, from the start command until the last peer has the result.

All systems average the same vectors over the same links. Each peer's processes run all the time; in each repeat each
system has its turn, in changing order, so that other load on the machine affects all of them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

from rich.console import Console

from psyche.bench.exchange.averaging_systems import RIVALS, System, own_systems
from psyche.bench.exchange.peer_group import MeasuredExchange, PeerGroup, PeerResult, measured_exchange
from psyche.bench.exchange.peer_process import PeerSpec
from psyche.bench.harness.resource_usage import available_memory
from psyche.bench.harness.rows import Column, Result, Row, percent, run_bench, table, times
from psyche.bench.harness.shaped_links import Link, Place, congestion_control, on_loopback, shaped
from psyche.bench.harness.turns import busy_note, say, take_turns
from psyche.errors import PsycheError
from psyche.telemetry.formatting import amount, number, plural, size


@dataclass(frozen=True)
class Plan:
    """What to measure. Rates are bit/s."""

    peers: int
    parameters: int
    codecs: Sequence[str] = ("int8",)
    exchanges: Sequence[str] = ("gather",)
    reducers: int = 2
    rate: int | None = None
    """Rate of each link. ``None``: not limited."""
    up: int | None = None
    """Upload rate of each link, if it differs."""
    slow: int | None = None
    """Rate of the last peer's link, if it differs."""
    repeats: int = 3
    rivals: bool = True

    @property
    def links(self) -> list[Link]:
        """The link of each peer."""
        every = Link(self.rate if self.up is None else self.up, self.rate)
        if self.slow is None:
            return [every] * self.peers
        return [every] * (self.peers - 1) + [Link(min(self.slow, every.up or self.slow), self.slow)]

    @property
    def shaped(self) -> bool:
        return any(link != Link() for link in self.links)

    @property
    def served(self) -> range:
        """The peers that are waited for: all but the slow one."""
        return range(self.peers if self.slow is None else self.peers - 1)


def _seconds(value: float) -> str:
    return number(value, ".3f" if value < 10 else ".1f")


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f}"


class ExchangeRow(Row, frozen=True):
    """One system, the median over its exchanges. ``None``: unknown, or not applicable."""

    system: Annotated[str, Column("system", left=True)]
    """``psyche``, ``hivemind`` or ``gloo``."""
    exchange: Annotated[str, Column("exchange", left=True)]
    codec: Annotated[str, Column("codec", left=True)]
    peers: int
    params: int
    rate_mbit: float | None
    """Rate of each link. ``None``: not shaped."""
    up_mbit: float | None
    """Upload rate of each link, if it differs."""
    slow_mbit: float | None
    """Rate of the slow peer's link, if there is one."""
    repeats: int
    seconds: float
    """From the start command until the last peer is done, not counting the slow peer."""
    slow_seconds: float | None
    """Until the slow peer is done, too. ``None``: there is no slow peer."""
    ideal_seconds: Annotated[float | None, Column("ideal", _seconds)]
    """The bytes that must cross the busiest link, over its rate."""
    share_of_line: Annotated[float | None, Column("% of\nline", percent)]
    """ideal_seconds / seconds."""
    encode_seconds: Annotated[float | None, Column("encode", _seconds)]
    """psyche, slowest peer: until its commitment is ready."""
    wire_seconds: Annotated[float | None, Column("wire", _seconds)]
    """psyche, slowest peer: from there until all payloads are fetched, checked, voted on and certified."""
    apply_seconds: Annotated[float | None, Column("apply", _seconds)]
    """psyche, slowest peer: from there until the outer step is taken and the new state is hashed."""
    payload_bytes: int
    """Encoded size of one peer's vector."""
    bytes_up: Annotated[int | None, Column("MB up", _megabytes)]
    """TCP payload bytes that a peer sends, median over peers."""
    bytes_up_max: int | None
    bytes_down: Annotated[int | None, Column("MB\ndown", _megabytes)]
    """TCP payload bytes that a peer receives, median over peers."""
    bytes_down_max: int | None
    cpu_seconds: Annotated[float, Column("CPU\nseconds", ".2f")]
    """CPU time of a peer's processes, maximum over peers."""
    peak_rss_mb: Annotated[float, Column("peak\nMB", ".0f")]
    """Peak memory of a peer's processes, shared pages counted once; maximum over peers. 1e6 bytes."""
    rss_growth_mb: Annotated[float, Column("growth\nMB", ".0f")]
    """Peak memory less the memory before the exchange, which holds the vectors."""
    averaged: int
    """Peers whose vectors are in the result, minimum over exchanges."""
    relative_error: Annotated[float, Column("relative\nerror", ".1e")]
    """‖result − mean‖ / ‖mean‖ over those peers."""
    matchmaking_seconds: float
    """Time to find a group before the exchange, for systems that do so. Not part of ``seconds``."""

    @property
    def duration(self) -> Annotated[str, Column("seconds", after="codec")]:
        slow = "" if self.slow_mbit is None else f" ({number(self.slow_seconds, '.1f')})"
        return _seconds(self.seconds) + slow

    @property
    def in_the_mean(self) -> Annotated[str, Column("in the\nmean", after="averaged")]:
        return f"{self.averaged} of {self.peers}"


def main(json: Path | None, plan: Plan) -> None:
    """Run ``psyche bench exchange``. Raises ``PsycheError``."""
    run_bench(
        json,
        lambda: measure(plan),
        lambda found: found.rows,
        lambda found, console: show(plan, found, console),
        columns=150,
    )


def measure(plan: Plan) -> Result[ExchangeRow]:
    """Measure all of ``plan``. Raises :class:`PsycheError`; a rival that fails is left out with a note."""
    if plan.peers < 2:
        raise PsycheError("an exchange needs two peers or more: raise --peers")
    systems = own_systems(plan.codecs, plan.exchanges, plan.reducers) + (list(RIVALS) if plan.rivals else [])
    _require_memory(plan, systems)
    result: Result[ExchangeRow] = Result(notes=busy_note())
    groups: dict[System, PeerGroup] = {}

    def exchange(system: System, repeat: int) -> MeasuredExchange:
        measured = measured_exchange(groups[system])
        turn = f"{repeat + 1}/{plan.repeats}" if repeat >= 0 else "warm"
        say(f"{turn}  {system!s:32} {measured.seconds(plan.served):8.3f} s")
        return measured

    def failed(system: System, error: PsycheError) -> None:
        if system.name == "psyche":
            raise error
        result.notes.append(f"{system} is left out: {error}")
        groups.pop(system).close()

    with _places(plan) as (places, lead), tempfile.TemporaryDirectory(prefix="psyche-bench-") as folder:
        try:
            for system in systems:
                groups[system] = PeerGroup(
                    _spec(plan, system, folder), places, lead if system.has_coordinator else None
                )
            # Repeat -1 does not count: connections are made and memory is touched for the first time.
            found = take_turns(systems, range(-1, plan.repeats), exchange, failed)
        finally:
            for group in groups.values():
                group.close()
    result.rows = [row_of(plan, system, exchanges) for system, exchanges in found.items()]
    return result


def _spec(plan: Plan, system: System, folder: str) -> PeerSpec:
    return PeerSpec(
        system=system.name,
        number=0,
        peers=plan.peers,
        parameters=plan.parameters,
        address="",
        device="",
        folder=str(Path(folder) / str(system).replace(" ", "-").replace("/", "")),
        threads=max(1, (os.cpu_count() or 1) // plan.peers),
        codec=system.codec,
        exchange=system.exchange,
        reducers=system.reducers,
    )


@contextmanager
def _places(plan: Plan) -> Iterator[tuple[list[Place], Place]]:
    """Yield a place for each peer, and one without limits for a coordinator."""
    if not plan.shaped:
        *places, lead = on_loopback(plan.peers + 1)
        yield places, lead
        return
    with shaped([*plan.links, Link()]) as (*places, lead):
        yield places, lead


def _require_memory(plan: Plan, systems: Sequence[System]) -> None:
    """Refuse a plan that would make the kernel kill processes."""
    needed, free = sum(system.memory(plan.parameters) for system in systems) * plan.peers, available_memory()
    if needed > free:
        raise PsycheError(
            f"this needs about {size(needed)} of memory and {size(free)} are free, because all systems run at once: "
            "name fewer codecs and exchanges, or lower --peers or --params"
        )


def row_of(plan: Plan, system: System, exchanges: Sequence[MeasuredExchange]) -> ExchangeRow:
    """Summarise a system's exchanges by medians."""
    seconds = median(one.seconds(plan.served) for one in exchanges)
    payload = max(peer.done.payload_bytes for one in exchanges for peer in one.peers)
    ideal = system.ideal_seconds(plan.parameters, payload, plan.links, plan.served)

    def typical(
        over_peers: Callable[[Iterable[float]], float], value: Callable[[PeerResult], float | None]
    ) -> float | None:
        """Median over exchanges of the median or maximum over peers."""
        every = [[value(peer) for peer in one.peers] for one in exchanges]
        known = [[found for found in some if found is not None] for some in every]
        return median(over_peers(some) for some in known) if all(known) else None

    def phase(name: str) -> float | None:
        return typical(max, lambda peer: peer.done.phases.get(name))

    return ExchangeRow(
        system=system.name,
        exchange=system.exchange,
        codec=system.codec,
        peers=plan.peers,
        params=plan.parameters,
        rate_mbit=_mbit(plan.rate),
        up_mbit=_mbit(plan.up),
        slow_mbit=_mbit(plan.slow),
        repeats=len(exchanges),
        seconds=seconds,
        slow_seconds=None if plan.slow is None else median(one.seconds(range(plan.peers)) for one in exchanges),
        ideal_seconds=ideal,
        share_of_line=None if ideal is None else ideal / seconds,
        encode_seconds=phase("encode"),
        wire_seconds=phase("wire"),
        apply_seconds=phase("apply"),
        payload_bytes=payload,
        bytes_up=_whole(typical(median, lambda peer: peer.bytes_up)),
        bytes_up_max=_whole(typical(max, lambda peer: peer.bytes_up)),
        bytes_down=_whole(typical(median, lambda peer: peer.bytes_down)),
        bytes_down_max=_whole(typical(max, lambda peer: peer.bytes_down)),
        cpu_seconds=typical(max, lambda peer: peer.cpu_seconds) or 0.0,
        peak_rss_mb=(typical(max, lambda peer: peer.peak) or 0.0) / 1e6,
        rss_growth_mb=(typical(max, lambda peer: peer.growth) or 0.0) / 1e6,
        averaged=min(peer.verified.averaged for one in exchanges for peer in one.peers),
        relative_error=max(peer.verified.relative_error for one in exchanges for peer in one.peers),
        matchmaking_seconds=median(one.matchmaking_seconds for one in exchanges),
    )


def _mbit(bits: int | None) -> float | None:
    return None if bits is None else bits / 1e6


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def against_rivals(rows: Sequence[ExchangeRow]) -> list[str]:
    """``psyche gather int8: as fast as 3.1× hivemind fp32, 0.9× gloo fp32``; empty without rivals."""
    rivals = [row for row in rows if row.system != "psyche"]
    lines = []
    for row in rows:
        if row.system == "psyche" and rivals:
            compared = ", ".join(f"{times(one.seconds / row.seconds)} {one.system} {one.codec}" for one in rivals)
            lines.append(f"psyche {row.exchange} {row.codec}: as fast as {compared}")
    return lines


def show(plan: Plan, result: Result[ExchangeRow], console: Console) -> None:
    """Print the table, how to read it, and how psyche compares with the rivals."""
    console.print(_preface(plan), highlight=False, markup=False)
    console.print(table("Exchanges", result.rows))
    for line in [*against_rivals(result.rows), *result.notes]:
        console.print(line, highlight=False, markup=False)


def _preface(plan: Plan) -> str:
    links = "on the loopback interface, not shaped"
    if plan.shaped:
        rates = ["no limit" if plan.rate is None else f"{plan.rate / 1e6:g} Mbit/s each"]
        rates += [] if plan.up is None else [f"{plan.up / 1e6:g} Mbit/s up"]
        rates += [] if plan.slow is None else [f"one at {plan.slow / 1e6:g} Mbit/s"]
        links = f"on links of {', '.join(rates)} (TCP {congestion_control()})"
    return f"""\
{plan.peers} peers, {amount(plan.parameters)} parameters, {links}; {plural(os.cpu_count() or 1, "core")} for all of \
them. Medians of {plural(plan.repeats, "exchange")}.
seconds     from the start command until the last peer has the result; psyche: has taken the outer step,
            in a whole round with commitments, votes and certificate. hivemind's group was found before.
ideal       the bytes that must cross the busiest link, over its rate; % of line: ideal / seconds
MB up/down  TCP payload of a peer, median over peers
CPU, MB     of a peer's processes, libp2p daemons included; growth: peak less the memory before the exchange
error       ‖result − mean‖ / ‖mean‖ over the peers in the mean. psyche's error feedback sends the loss later
gloo sends plain TCP between known hosts; psyche and hivemind encrypt and identify peers by their keys.
"""

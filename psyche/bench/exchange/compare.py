"""One exchange of everybody's parameters, from the word to begin until the last peer holds the result.

All systems average the same vectors over the same links, each peer in processes of its own that are there all the
time; in each repetition each system has its turn, in an order that changes, so that what else the machine does
hits all of them.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from psyche.bench.exchange import links as links_module
from psyche.bench.exchange.crew import Crew, crew
from psyche.bench.exchange.links import Link, Place, on_loopback, shaped
from psyche.bench.exchange.measure import Exchanged, measured
from psyche.bench.exchange.reap import ended_politely
from psyche.bench.exchange.summary import summary
from psyche.bench.exchange.systems import RIVALS, System, own_systems
from psyche.bench.exchange.table import Row, against_rivals, table, to_json
from psyche.bench.exchange.talk import Spec
from psyche.bench.output import require_folder, write_rows
from psyche.bench.section import wide_console
from psyche.errors import PsycheError
from psyche.telemetry.formatting import amount, plural, size


@dataclass(frozen=True)
class Plan:
    """What to measure. Rates are bits a second."""

    peers: int
    parameters: int
    codecs: Sequence[str] = ("int8",)
    exchanges: Sequence[str] = ("gather",)
    reducers: int = 2
    rate: int | None = None
    """Of each link; None: as fast as the machine."""
    up: int | None = None
    """Of each link's way up, where that differs."""
    slow: int | None = None
    """Of the last peer's link, where that differs."""
    repeats: int = 3
    rivals: bool = True

    @property
    def links(self) -> list[Link]:
        """Of each peer."""
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


@dataclass
class Result:
    """What was measured, and what to know of it."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def main(json: Path | None, plan: Plan) -> None:
    """``psyche bench exchange``: a table to stdout, progress to stderr, rows to ``json``. Raises ``PsycheError``."""
    require_folder(json)
    with ended_politely():
        result = measure(plan)
    if json is not None:
        write_rows(json, to_json(result.rows))
    show(plan, result, wide_console(150))


def measure(plan: Plan) -> Result:
    """Measure all of ``plan``. Raises :class:`PsycheError`; a rival that fails is left out with a word."""
    if plan.peers < 2:
        raise PsycheError("an exchange needs two peers or more: raise --peers")
    systems = own_systems(plan.codecs, plan.exchanges, plan.reducers) + (list(RIVALS) if plan.rivals else [])
    _require_memory(plan, systems)
    result = Result(notes=_busy())
    seen: dict[System, list[Exchanged]] = {system: [] for system in systems}
    with (
        _places(plan) as (places, lead),
        tempfile.TemporaryDirectory(prefix="psyche-bench-") as folder,
        ExitStack() as stack,
    ):
        crews = {system: _crew(stack, plan, system, places, lead, Path(folder)) for system in systems}
        for repeat in range(-1, plan.repeats):  # the first is not counted: connections are made, pages touched
            for system in _in_turn(systems, repeat):
                if system not in crews:
                    continue
                try:
                    exchanged = measured(crews[system])
                except PsycheError as error:
                    if system.name == "psyche":
                        raise
                    result.notes.append(f"{system} is left out: {error}")
                    crews.pop(system).close()
                    continue
                if repeat >= 0:
                    seen[system].append(exchanged)
                turn = f"{repeat + 1}/{plan.repeats}" if repeat >= 0 else "warm"
                _say(f"{turn}  {system!s:32} {exchanged.seconds(plan.served):8.3f} s")
    result.rows = [summary(plan, system, seen[system]) for system in systems if system in crews]
    return result


def show(plan: Plan, result: Result, console: Console) -> None:
    """Print the table, what to know to read it, and how psyche compares with the rivals."""
    console.print(_preface(plan), highlight=False, markup=False)
    console.print()
    console.print(table(result.rows))
    for line in [*against_rivals(result.rows), *result.notes]:
        console.print(line, highlight=False, markup=False)


def _crew(stack: ExitStack, plan: Plan, system: System, places: Sequence[Place], lead: Place, folder: Path) -> Crew:
    spec = Spec(
        system=system.name,
        number=0,
        peers=plan.peers,
        parameters=plan.parameters,
        address="",
        device="",
        folder=str(folder / str(system).replace(" ", "-").replace("/", "")),
        threads=max(1, (os.cpu_count() or 1) // plan.peers),
        codec=system.codec,
        exchange=system.exchange,
        reducers=system.reducers,
    )
    return stack.enter_context(crew(spec, places, lead, led=system.led))


@contextmanager
def _places(plan: Plan) -> Iterator[tuple[list[Place], Place]]:
    """A place for each peer, and one without limits for who leads."""
    if not plan.shaped:
        *places, lead = on_loopback(plan.peers + 1)
        yield places, lead
        return
    with shaped([*plan.links, Link()]) as (*places, lead):
        yield places, lead


def _in_turn(systems: Sequence[System], repeat: int) -> list[System]:
    """Every system once; each begins a repetition equally often."""
    first = repeat % len(systems)
    return [*systems[first:], *systems[:first]]


def _preface(plan: Plan) -> str:
    links = "on the loopback interface, not shaped"
    if plan.shaped:
        rates = [f"{_mbit(plan.rate)} each"]
        rates += [f"{_mbit(plan.up)} up"] * (plan.up is not None) + [f"one at {_mbit(plan.slow)}"] * (
            plan.slow is not None
        )
        links = f"on links of {', '.join(rates)} (TCP {links_module.congestion_control()})"
    return "\n".join(
        [
            f"{plan.peers} peers, {amount(plan.parameters)} parameters, {links}; "
            f"{plural(os.cpu_count() or 1, 'core')} for all of them. Medians of {plural(plan.repeats, 'exchange')}.",
            "seconds     from the word to begin until the last peer has the result; psyche: took the outer step,",
            "            by way of a whole round: commitments, votes, certificate. hivemind's group was found before.",
            "ideal       the bytes that must cross the busiest link, over its rate; % of line: ideal / seconds",
            "MB up/down  TCP payload of a peer, median over peers",
            "CPU, MB     of a peer's processes, libp2p daemons and all; growth: peak less what was there before",
            "error       ‖result − mean‖ / ‖mean‖ over those in the mean. psyche's codecs send later what they lose",
            "gloo sends plain TCP between known hosts; psyche and hivemind encrypt and know their peers by their keys.",
        ]
    )


def _mbit(bits: int | None) -> str:
    return "no limit" if bits is None else f"{bits / 1e6:g} Mbit/s"


def _require_memory(plan: Plan, systems: Sequence[System]) -> None:
    """Refuse what the machine would end by killing some process of somebody's."""
    needed = sum(system.memory(plan.parameters) for system in systems) * plan.peers
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError):  # what the kernel would give up for us counts, too
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        free = int(match[1]) * 1024 if match else free
    if needed > free:
        raise PsycheError(
            f"this needs about {size(needed)} of memory and {size(free)} are free: all systems are there at once; name "
            "fewer codecs and exchanges, or lower --peers or --params"
        )


def _busy() -> list[str]:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 2:
        return []
    return [f"the machine was busy when this began (load average {load:.1f} on {cores} cores): seconds say little"]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

"""Terminal views: a contributor's own node, and a run as a whole.

A view listens to events. :func:`live` redraws it in place on a terminal and prints lines elsewhere::

    view = ContributorView(me=peer_id)
    with live(view) as listener:
        log.subscribe(listener)
        ...
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from psyche.telemetry.event_log import Listener
from psyche.telemetry.events import Downloading, Event, StepDone
from psyche.telemetry.formatting import amount, clean, number, peer_name, plural, rate, root_name, size, sparkline
from psyche.telemetry.lines import (
    PHASES,
    contributor_line,
    exclusion_sentence,
    message,
    message_for,
    round_of,
    swarm_line,
)
from psyche.telemetry.view_state import Member, ViewState

REFRESH = 4
"""Frames per second on a terminal."""
PROGRESS_EVERY = 30.0
"""Seconds between lines about steps or downloads where output is not a terminal."""
ROWS = 16
"""Members shown in the table of a run."""

Rows = list[tuple[str, RenderableType]]
"""Label and content of each line of a view."""


class View(Protocol):
    """The interface that :func:`live` needs."""

    state: ViewState

    def render(self) -> RenderableType:
        """Draw the current state."""

    def line(self, event: Event) -> str:
        """Describe the event just applied in one line of a log; empty if it needs none."""


class ContributorView:
    """The view of ``psyche join``: what this node does and what it has contributed. ``me`` is its PeerID."""

    def __init__(self, me: str) -> None:
        self.state = ViewState(me=me)

    def line(self, event: Event) -> str:
        """See :class:`View`."""
        return contributor_line(self.state, event)

    def render(self) -> RenderableType:
        """See :class:`View`."""
        state = self.state
        rows: Rows = [("now", _now(state))]
        if state.step is not None:
            step = state.step
            learning = f"loss {number(step.loss)}, learning rate {step.lr:.1e}, {rate(step.tokens_per_second)}"
            rows.append(("training", learning))
        excluded = f", {state.rounds_excluded:,} not accepted" if state.rounds_excluded else ""
        accepted = f"{plural(state.rounds_accepted, 'contribution')} accepted{excluded}"
        rows.append(("this node", f"{accepted}, {amount(state.tokens_accepted)} tokens"))
        if state.left_out is not None:
            which, reason = state.left_out
            rows.append(("last excluded", f"round {which}: {exclusion_sentence(reason, own=True)}"))
        traffic = f"{size(state.bytes_up)} sent, {size(state.bytes_down)} received"
        rows.append(("network", f"{plural(len(state.members), 'member')}, {traffic}"))
        if state.certified is not None:
            root = f"state root {root_name(state.certified.state_root)} after round {state.certified.round}"
            rows.append(("model", f"{root}, certified by the members"))
        if state.heldout:
            rows.append(("held-out loss", f"{number(state.heldout[-1])}  {sparkline(state.heldout)}"))
        return _panel(state, Group(_grid(rows), *_messages(state)))


class SwarmView:
    """The view of ``psyche demo`` and ``psyche run``: members, loss, traffic, and whether all hold the same model."""

    def __init__(self) -> None:
        self.state = ViewState()

    def line(self, event: Event) -> str:
        """See :class:`View`."""
        return swarm_line(self.state, event)

    def render(self) -> RenderableType:
        """See :class:`View`."""
        state = self.state
        rows: Rows = []
        if state.run is not None:
            model = f"{amount(state.run.parameters)} parameters, codec {clean(state.run.codec, 40)}"
            rows.append(("model", f"{model}, {plural(state.inner_steps, 'inner step')} per round"))
            if state.run.invite and state.summary is None:
                rows.append(("join with", f"psyche join {clean(state.run.invite, 4096)}"))
        if state.heldout:
            rows.append(("held-out loss", f"{number(state.heldout[-1])}  {sparkline(state.heldout)}"))
        if state.summary is not None:
            done = state.summary
            busy = f"members train {number(done.compute_utilisation, '.0%')} of the time"
            total = f"{amount(done.tokens_total)} tokens so far"
            rows.append(("speed", f"{rate(done.tokens_per_second)}, {total}, {busy}"))
            ratio = f"payloads {number(done.payload_ratio, '.1f')}× smaller than fp32"
            per_token = f"{number(done.bytes_per_token, '.1f')} bytes sent per token"
            rows.append(("traffic", f"{size(done.bytes_up_total)} sent, {ratio}, {per_token}"))
        rows.append(("state root", _agreement(state)))
        return _panel(state, Group(_grid(rows), _members(state), *_messages(state)))


@contextmanager
def live(view: View, console: Console | None = None) -> Iterator[Listener]:
    """Show ``view`` while the block runs; yields the listener that feeds the view.

    On a terminal the view is redrawn in place. Elsewhere it is plain lines without control codes; lines about progress
    come at most every ``PROGRESS_EVERY`` seconds of the events' own time.
    """
    screen = console or Console()
    if not screen.is_terminal:
        yield _printer(view, screen)
        return

    def listener(event: Event) -> None:
        view.state = view.state.apply(event)  # one assignment: the drawing thread sees the old or the new state

    with Live(get_renderable=view.render, console=screen, refresh_per_second=REFRESH):
        yield listener


def _printer(view: View, screen: Console) -> Callable[[Event], None]:
    shown: dict[type[Event], float] = {}

    def listener(event: Event) -> None:
        view.state = view.state.apply(event)
        if isinstance(event, StepDone | Downloading):
            if event.time - shown.get(type(event), float("-inf")) < PROGRESS_EVERY:
                return
            shown[type(event)] = event.time
        line = view.line(event)
        if line:
            # Written to the file directly: rich would wrap lines, and may colour them if the environment says so.
            print(line, file=screen.file, flush=True)

    return listener


def _panel(state: ViewState, body: RenderableType) -> Panel:
    name = clean(state.run.name) if state.run else "psyche"
    title = ", ".join(filter(None, (name, round_of(state, state.round))))
    return Panel(body, title=Text(title), title_align="left", border_style="cyan")


def _grid(rows: Rows) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(ratio=1, overflow="fold")
    for label, value in rows:
        # rich would parse a bare string as markup, and part of it comes from peers.
        grid.add_row(label, Text(value) if isinstance(value, str) else value)
    return grid


def _now(state: ViewState) -> RenderableType:
    if state.finished is not None:
        return Text(message(state.finished))
    if state.download is not None:
        what = f"fetching {clean(state.download.what)}: {size(state.download.received)} of {size(state.download.total)}"
        return _progress(what, state.download.received, state.download.total)
    doing = PHASES.get(state.phase, state.phase)
    if state.phase == "training" and state.inner_steps:
        done = state.step.step if state.step else 0
        return _progress(f"{doing}, step {done} of {state.inner_steps}", done, state.inner_steps)
    return Text(doing)


def _progress(text: str, done: int, total: int) -> RenderableType:
    row = Table.grid(padding=(0, 2))
    row.add_row(Text(text), ProgressBar(total=total, completed=done, width=24))
    return row


def _agreement(state: ViewState) -> Text:
    same, attested = state.agreeing()
    if state.certified is None:
        return Text("no round is certified yet")
    root = f"{root_name(state.certified.state_root)} after round {state.certified.round}"
    if not attested:
        return Text(f"{root}, certified by the members")
    if same == attested:
        ever = f"; {plural(state.diverged, 'divergence')} repaired" if state.diverged else ""
        return Text(f"✓ {root}, the same on {plural(attested, 'member')}{ever}", style="green")
    return Text(f"✗ {root}, but only {same} of {attested} members hold it", style="red")


def _members(state: ViewState) -> RenderableType:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("member", "device", "status", "accepted", "tok/s", "loss", "sent", "received", "root"):
        right = title in ("accepted", "tok/s", "loss", "sent", "received")
        table.add_column(title, justify="right" if right else "left", no_wrap=title != "status")
    shown = sorted(state.peers.items(), key=lambda item: (item[1].gone, item[0]))
    for name, peer in shown[:ROWS]:
        table.add_row(*_member_row(state, name, peer), style="dim" if peer.gone else "")
    if len(shown) > ROWS:
        table.add_row(Text(f"and {len(shown) - ROWS} more"))
    return table


def _member_row(state: ViewState, name: str, peer: Member) -> list[Text]:
    numbers = ("", "", "", "")
    if (metrics := peer.metrics) is not None:
        speed = number(metrics.tokens_per_second, ".0f")
        numbers = (speed, number(metrics.train_loss), size(metrics.bytes_up), size(metrics.bytes_down))
    same = ""
    if state.certified is not None and peer.root_round == state.certified.round:
        same = "✓" if peer.root == state.certified.state_root else "✗"
    status = f"excluded: {exclusion_sentence(peer.excluded)}" if peer.status == "excluded" else peer.status
    cells = (peer_name(name), clean(peer.device, 20), clean(status, 60), str(peer.accepted), *numbers, same)
    return [Text(cell) for cell in cells]


def _messages(state: ViewState) -> list[Text]:
    texts = ((event.time, message_for(state, event)) for event in state.messages)
    return [Text(f"{datetime.fromtimestamp(at):%H:%M:%S} {text}", style="dim") for at, text in texts if text]

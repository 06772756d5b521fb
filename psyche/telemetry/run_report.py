"""The report of a run, made from the coordinator's event log: ``report.json``, a plot, a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

from rich.panel import Panel
from rich.table import Table

from psyche.errors import PsycheError
from psyche.telemetry.events import (
    Attested,
    Event,
    GenesisJudged,
    RoundCertified,
    RoundStarted,
    RoundSummary,
    RunFinished,
    RunStarted,
)
from psyche.telemetry.formatting import amount, clean, number, plural, root_name, size

Attestations = Mapping[int, Mapping[str, str]]
"""round -> PeerID -> the state_root (hex) which that member attested after that round."""


def attestations(events: Iterable[Event]) -> dict[int, dict[str, str]]:
    """Everything attested in a log: round -> peer -> state root."""
    found: dict[int, dict[str, str]] = {}
    for event in events:
        if isinstance(event, Attested):
            found.setdefault(event.round, {})[event.peer] = event.state_root
    return found


def ddp_bytes(members: int, parameters: int, steps: int) -> int:
    """Return bytes that each of ``members`` sends in ``steps`` data-parallel steps of a model of ``parameters``.

    A ring all-reduce of N members sends 2·(N−1)/N times the vector (reduce-scatter, then all-gather), here
    the fp32 gradient, 4 bytes a parameter, at every inner step. Nothing for a single member.
    """
    return 2 * (members - 1) * 4 * parameters * steps // members if members > 0 else 0


def build_report(events: Iterable[Event], attested: Attestations | None = None) -> dict[str, Any]:
    """Return the numbers of a run, ready for JSON; ``None`` where nothing was measured.

    - ``peers``: different peers whose work was accepted in some round; ``members``: the mean number accepted a
      round; ``rounds``: rounds certified; ``inner_steps``: H.
    - ``initial_loss``, ``final_loss``: held out, of the outer parameters, before the first round and after the last
      one that was judged. Where the log has no :class:`GenesisJudged`, ``initial_loss`` is the first round's.
    - ``tokens``: trained on in the whole run. ``bytes_sent_per_peer``: what one member that took part in every
      round sent: the mean of all members' reports of a round, times ``rounds``. Where every accepted member
      reported, that is all bytes sent over ``members``; not over ``peers``, of whom some came late or left.
    - ``ddp_bytes_per_peer``: what a ring all-reduce of fp32 gradients at every inner step of the run would have
      sent (:func:`ddp_bytes`, round by round with the round's members and steps); ``ddp_ratio`` is that over
      ``bytes_sent_per_peer``.
    - ``payload_ratio``: fp32 size over payload, median of rounds; ``bytes_per_token``: sent by all, over tokens.
      The two say different things; neither is ``ddp_ratio``.
    - ``compute_utilisation``: share of members' time spent in inner steps, mean of rounds.
    - ``state_roots``: one a round, hex. ``state_roots_agree``: every attested root of every certified round is the
      certified one, and there is at least one for each. ``attested`` defaults to the log's own
      :class:`Attested` events.
    - ``seconds``: wall clock from the run's start to its end, pauses included.

    Raises :class:`PsycheError` for a log in which no run starts.
    """
    log = list(events)
    started = next((event for event in log if isinstance(event, RunStarted)), None)
    if started is None:
        raise PsycheError("the event log holds no run; it is empty or another program's")
    summaries = list(_by_round(log, RoundSummary).values())
    certified = _by_round(log, RoundCertified)
    accepted = [event.accepted for event in certified.values()]
    # Added up here and not taken from the summaries' totals, which begin anew where a coordinator lost its log.
    tokens, bytes_up = sum(s.tokens for s in summaries), sum(s.bytes_up for s in summaries)
    reports = sum(summary.reports for summary in summaries)
    sent = bytes_up / reports * len(certified) if reports else None
    ddp = _ddp(log, certified.values(), started)
    roots = {number: event.state_root for number, event in certified.items()}
    judged = next((e.heldout_loss for e in log if isinstance(e, GenesisJudged) and e.heldout_loss is not None), None)
    losses = [summary.heldout_loss for summary in summaries if summary.heldout_loss is not None]
    ends = [event.time for event in log if isinstance(event, RunFinished)] or [log[-1].time]
    return {
        "name": started.name,
        "run_id": started.run_id,
        "codec": started.codec,
        "parameters": started.parameters,
        "peers": len({peer for peers in accepted for peer in peers}),
        "members": round(fmean(map(len, accepted)), 2) if accepted else 0.0,
        "rounds": len(certified),
        "inner_steps": started.inner_steps,
        "initial_loss": judged if judged is not None else (losses[0] if losses else None),
        "final_loss": losses[-1] if losses else None,
        "tokens": tokens,
        "bytes_sent_per_peer": round(sent) if sent is not None else None,
        "ddp_bytes_per_peer": ddp,
        "ddp_ratio": ddp / sent if sent else None,
        "payload_ratio": _over(summaries, "payload_ratio", median),
        "bytes_per_token": bytes_up / tokens if tokens else None,
        "compute_utilisation": _over(summaries, "compute_utilisation", fmean),
        "state_roots": list(roots.values()),
        "state_roots_agree": _agree(roots, attestations(log) if attested is None else attested),
        "seconds": round(ends[-1] - started.time, 3),
    }


def plot_loss(events: Iterable[Event], path: Path) -> None:
    """Draw training and held-out loss over tokens into a PNG at ``path``, wire bytes against DDP's in the title.

    Raises :class:`PsycheError` for a log without a run, :class:`OSError` where the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    log = list(events)
    report = build_report(log)
    summaries = list(_by_round(log, RoundSummary).values())
    genesis = [(0, e.heldout_loss) for e in log if isinstance(e, GenesisJudged) and e.heldout_loss is not None][:1]
    heldout = genesis + [(s.tokens_total, s.heldout_loss) for s in summaries if s.heldout_loss is not None]
    train = [(s.tokens_total, s.train_loss) for s in summaries if s.train_loss is not None]

    figure = Figure(figsize=(7.2, 4.4), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)  # Agg and no pyplot: no display, no global state
    axes = figure.add_subplot()
    axes.plot(
        *_columns(train),
        color="#9aa5b1",
        linewidth=1.6,
        marker="o",
        markersize=2.5,
        clip_on=False,
        label="training, inner steps",
    )
    axes.plot(
        *_columns(heldout),
        color="#0b6bcb",
        linewidth=2.2,
        marker="o",
        markersize=3.5,
        clip_on=False,
        label="held out, outer model",
    )
    axes.set_xlabel("tokens trained on, all members")
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.set_xlim(left=0)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(_title(report), loc="left", fontsize=10)
    figure.savefig(path, format="png")


def render_summary(report: Mapping[str, Any]) -> Panel:
    """Draw a report as a table for the terminal."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column()
    loss = f"{number(report['initial_loss'])} → {number(report['final_loss'])} nats per token on held-out text"
    steps = plural(report["inner_steps"], "inner step")
    rounds = f"{plural(report['rounds'], 'round')} of {steps}, {plural(report['peers'], 'node')}"
    sent, ddp = report["bytes_sent_per_peer"], report["ddp_bytes_per_peer"]
    less = f"{number(report['ddp_ratio'], '.0f')}× less than the {size(ddp)} of data-parallel training (DDP)"
    traffic = "–" if sent is None else f"{size(sent)} sent per node, {less}"
    grid.add_row("model", f"{amount(report['parameters'])} parameters, codec {clean(report['codec'], 40)}")
    grid.add_row("run", f"{rounds}, {report['seconds']:.0f} s")
    grid.add_row("loss", f"{loss}, after {amount(report['tokens'])} tokens")
    grid.add_row("traffic", traffic)
    per_token = f"{number(report['bytes_per_token'], '.1f')} bytes sent per token"
    grid.add_row("", f"payloads {number(report['payload_ratio'], '.1f')}× smaller than fp32; {per_token}")
    grid.add_row("utilisation", f"{number(report['compute_utilisation'], '.0%')} of the nodes' time was spent training")
    grid.add_row("state roots", _sameness(report), style="green" if report["state_roots_agree"] else "red")
    return Panel(grid, title=f"{clean(report['name'])}: result", title_align="left", border_style="cyan")


def _sameness(report: Mapping[str, Any]) -> str:
    last = root_name(report["state_roots"][-1]) if report["state_roots"] else "–"
    if report["state_roots_agree"]:
        return f"✓ all nodes hold the same model, bit for bit, after every round; the last state root is {last}"
    return "✗ the nodes' state roots are missing or differ in some round"


def _title(report: Mapping[str, Any]) -> str:
    head = f"{report['name']}: {amount(report['parameters'])} parameters, {plural(report['peers'], 'peer')}"
    head += f", {plural(report['rounds'], 'round')} of {plural(report['inner_steps'], 'inner step')}"
    if report["bytes_sent_per_peer"] is None or report["ddp_ratio"] is None:
        return head
    sent, ddp = size(report["bytes_sent_per_peer"]), size(report["ddp_bytes_per_peer"])
    return f"{head}\nsent per member: psyche {sent}, DDP {ddp} ({report['ddp_ratio']:.0f}× more)"


OfRound = TypeVar("OfRound", RoundSummary, RoundCertified)


def _by_round(log: Iterable[Event], kind: type[OfRound]) -> dict[int, OfRound]:
    """Return the last event of a kind for each round, in the order of rounds: a restart may log one again."""
    found = {event.round: event for event in log if isinstance(event, kind)}
    return dict(sorted(found.items()))


def _ddp(log: Sequence[Event], certified: Iterable[RoundCertified], started: RunStarted) -> int:
    steps = {event.round: event.inner_steps for event in log if isinstance(event, RoundStarted)}
    return sum(
        ddp_bytes(len(event.accepted), started.parameters, steps.get(event.round, started.inner_steps))
        for event in certified
    )


def _over(summaries: Iterable[RoundSummary], field: str, average: Callable[[list[float]], float]) -> float | None:
    values = [value for summary in summaries if (value := getattr(summary, field)) is not None]
    return average(values) if values else None


def _agree(roots: Mapping[int, str], attested: Attestations) -> bool:
    return bool(roots) and all(
        number in attested and set(attested[number].values()) == {root} for number, root in roots.items()
    )


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in points], [y for _, y in points]

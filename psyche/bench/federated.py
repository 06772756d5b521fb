"""What it costs that data stay where they are: nodes with corpora of their own against a run that pools them.

The corpora are consecutive quarters of the pooled one, which is sorted by path: other modules, so other vocabularies
and idioms (not iid). All rows see as many tokens, and are judged on the held-out set of all four. Then pseudo-gradients
are clipped, and then noised and shrunk, each node for itself (``federated/gaussian_mechanism.py``).

Own corpora cost nothing, clipping a percent; noise in proportion. It has as many dimensions as the model, and among a
handful of nodes little of it averages out. So a budget that means something to a single node (ε below 10) leaves
nothing to be learned here, and no better mechanism of this kind would change that: it is the price of trusting nobody
else to add the noise (Duchi, Jordan and Wainwright, arXiv 1302.3203). DP-FedAvg, where it works, averages over
thousands of users a round behind a trusted server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from psyche.bench.output import require_folder, write_rows
from psyche.bench.plan import CENTRE, default_scale
from psyche.bench.section import Preparing, chosen, outcomes_of, prepare_corpus, wide_console
from psyche.bench.trials import Outcome, Own, Setting, Trial
from psyche.config import Outer
from psyche.federated.privacy_budget import Charge, epsilon_of
from psyche.telemetry.formatting import amount

DELTA = 1e-6


@dataclass(frozen=True)
class FederatedScale:
    """One size of the section."""

    setting: Setting
    steps: int
    """Inner steps of each of ``CENTRE`` nodes."""
    inner_steps: int
    outer: Outer
    seeds: tuple[int, ...]
    clip: float
    """About the median norm of this model's pseudo-gradients."""
    noise_multipliers: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One trial, measured."""

    name: str
    data: str
    """Pooled, or how what is sent of own data is treated."""
    clip: float | None
    noise_multiplier: float | None
    epsilon: float | None
    """Of each node over the whole run, at δ = ``DELTA``; None where nothing is private."""
    seed: int
    heldout_loss: float
    tokens: int
    parameters: int
    seconds: float


def federated_scale(cache: Path | None = None) -> FederatedScale:
    """The model of :func:`~psyche.bench.plan.default_scale`, in few and long rounds: noise is paid for by the round."""
    scale = default_scale(cache)
    return FederatedScale(
        setting=scale.setting,
        steps=scale.steps // 2,
        inner_steps=40,
        outer=scale.outer,
        seeds=(0, 1),
        clip=4.0,
        noise_multipliers=(0.0003, 0.003, 0.03, 2.6),
    )


def main(json: Path | None, *, only: str | None = None, preparing: Preparing = nullcontext) -> None:
    """``psyche bench convergence --federated``: a table to stdout, progress to stderr, rows to ``json``.

    ``preparing`` shows how the corpus is prepared, which happens once. Raises ``PsycheError``.
    """
    scale = federated_scale()
    require_folder(json)
    prepare_corpus(scale.setting, preparing)
    rows = measure(scale, only)
    if json is not None:
        write_rows(json, [asdict(row) for row in rows])
    show(scale, rows, wide_console())


def measure(scale: FederatedScale, only: str | None = None) -> list[Row]:
    """Run the section's trials, on all cores, and return its rows in its order. The corpus should be prepared.

    ``only`` keeps the rows whose name contains it. Raises :class:`PsycheError` where none does.
    """
    wanted = chosen(trials(scale), lambda trial: trial.label, only)
    outcomes = outcomes_of(scale.setting, wanted)
    return [_row(trial, outcomes[trial]) for trial in wanted]


def trials(scale: FederatedScale) -> Iterator[Trial]:
    """Every row of the section, in the order of its table, the seeds of each one after the other."""
    ways = [None, Own(), Own(scale.clip), *(Own(scale.clip, noise) for noise in scale.noise_multipliers)]
    pooled = Trial(
        system="diloco",
        codec="fp32",  # a codec's own loss would hide the smaller ones that are looked for here
        nodes=CENTRE,
        steps=scale.steps,
        outer=scale.outer,
        inner_steps=scale.inner_steps,
    )
    for own in ways:
        for seed in scale.seeds:
            yield replace(pooled, own=own, seed=seed)


def _row(trial: Trial, outcome: Outcome) -> Row:
    own = trial.own
    assert trial.inner_steps is not None
    epsilon = None
    if own is not None and own.noise_multiplier:
        epsilon = epsilon_of([Charge(own.noise_multiplier, trial.steps // trial.inner_steps)], DELTA)
    return Row(
        name=trial.label,
        data="pooled" if own is None else own.label,
        clip=None if own is None else own.clip,
        noise_multiplier=None if own is None else own.noise_multiplier,
        epsilon=epsilon,
        seed=trial.seed,
        heldout_loss=outcome.heldout_loss,
        tokens=outcome.tokens,
        parameters=outcome.parameters,
        seconds=outcome.seconds,
    )


def show(scale: FederatedScale, rows: Sequence[Row], console: Console) -> None:
    """Print the table of ``rows`` and what to know to read it."""
    console.print(
        f"{amount(rows[0].parameters)} parameters, {amount(rows[0].tokens)} tokens, {CENTRE} nodes, "
        f"{scale.steps // scale.inner_steps} rounds of {scale.inner_steps} steps, fp32 payloads. ε of each node over "
        f"all of them, at δ = {DELTA:g}, for its corpus as a whole. Loss: nats a token on "
        f"{scale.setting.heldout_sequences} held-out sequences of all corpora.",
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD)
    table.add_column("data")
    for heading in ("clip", "noise σ", "ε", "seed", "loss", "against pooled"):
        table.add_column(heading, justify="right")
    pooled = {row.seed: row.heldout_loss for row in rows if row.data == "pooled"}
    for row in rows:
        against = f"{row.heldout_loss / pooled[row.seed] - 1:+.1%}" if row.seed in pooled else ""
        settings = map(_cell, (row.clip, row.noise_multiplier or None, row.epsilon))
        table.add_row(row.data, *settings, str(row.seed), f"{row.heldout_loss:.3f}", against)
    console.print(table)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"

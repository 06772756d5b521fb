"""Compare nodes that keep their own private corpora with a run that pools them.

The corpora are consecutive quarters of the pooled one, which is sorted by path: each has other modules, hence another
vocabulary and other idioms (not iid). All rows see equally many tokens and are evaluated on held-out sequences of all
four. Further rows clip pseudo-gradients, and then add noise to them on each node (``federated/gaussian_mechanism.py``).

Own corpora cost nothing and clipping costs a percent. Noise costs in proportion: it has as many dimensions as the model
and a handful of nodes hardly averages it out, so a meaningful budget (ε below 10 for one node) leaves nothing to be
learned. No mechanism of this kind avoids that: it is the price of trusting nobody else to add the noise (Duchi, Jordan
and Wainwright, arXiv 1302.3203). DP-FedAvg averages over thousands of users per round behind a trusted server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console

from psyche.bench.convergence.large_batch import default_section
from psyche.bench.convergence.section import Item, Outcomes, Section
from psyche.bench.convergence.trial import CENTRE, PrivateCorpora, Trial
from psyche.bench.harness.rows import Column, Row, table
from psyche.config import Outer
from psyche.federated.privacy_budget import Charge, epsilon_of
from psyche.telemetry.formatting import amount

DELTA = 1e-6


class FederatedRow(Row, frozen=True):
    """One trial."""

    name: str
    data: Annotated[str, Column("data", left=True)]
    """``pooled``, or what is done to the pseudo-gradients of own data."""
    clip: Annotated[float | None, Column("clip", ".3g")]
    noise_multiplier: Annotated[float | None, Column("noise σ", ".3g")]
    epsilon: Annotated[float | None, Column("ε", ".3g")]
    """ε of each node over the whole run, at δ = ``DELTA``. ``None``: no noise is added."""
    seed: Annotated[int, Column("seed")]
    heldout_loss: Annotated[float, Column("loss", ".3f")]
    against_pooled_percent: Annotated[float | None, Column("vs pooled %", "+.1f")]
    """100 × (loss / loss of the pooled run of the same seed − 1); positive is worse."""
    tokens: int
    parameters: int
    seconds: float


@dataclass(frozen=True)
class Federated(Section[FederatedRow]):
    """``psyche bench convergence --federated``."""

    steps: int
    """Inner steps of each of ``CENTRE`` nodes."""
    inner_steps: int
    outer: Outer
    seeds: tuple[int, ...]
    clip: float
    """Approximate median norm of this model's pseudo-gradients."""
    noise_multipliers: tuple[float, ...]

    def items(self) -> Iterator[Item]:
        # fp32: a codec's own loss would hide the smaller differences measured here
        pooled = Trial(steps=self.steps, outer=self.outer, inner_steps=self.inner_steps)
        noised = (PrivateCorpora(self.clip, noise) for noise in self.noise_multipliers)
        for private in (None, PrivateCorpora(), PrivateCorpora(self.clip), *noised):
            for seed in self.seeds:
                yield Item(replace(pooled, private=private, seed=seed), replace(pooled, seed=seed))

    def rows(self, items: Sequence[Item], outcomes: Outcomes) -> list[FederatedRow]:
        return [_row(item, outcomes) for item in items]

    def show(self, rows: Sequence[FederatedRow], console: Console) -> None:
        console.print(
            f"{amount(rows[0].parameters)} parameters, {amount(rows[0].tokens)} tokens, {CENTRE} nodes, "
            f"{self.steps // self.inner_steps} rounds of {self.inner_steps} steps, fp32 payloads. ε is that of a node "
            f"over all rounds, at δ = {DELTA:g}, for its corpus as a whole. Loss: nats per token on "
            f"{self.setting.heldout_sequences} held-out sequences of all corpora.",
            highlight=False,
        )
        console.print(table("Private corpora", rows))


def _row(item: Item, outcomes: Outcomes) -> FederatedRow:
    trial, outcome, private = item.trial, outcomes[item.trial], item.trial.private or PrivateCorpora()
    assert trial.inner_steps is not None, "all trials of the section are DiLoCo's"
    epsilon = None
    if private.noise_multiplier:
        epsilon = epsilon_of([Charge(private.noise_multiplier, trial.steps // trial.inner_steps)], DELTA)
    return FederatedRow.of(
        item,
        trial,
        outcome,
        data="pooled" if trial.private is None else private.label,
        clip=private.clip,
        noise_multiplier=None if trial.private is None else private.noise_multiplier,
        epsilon=epsilon,
        against_pooled_percent=item.against_reference(outcomes),
    )


def federated_section(cache: Path | None = None) -> Federated:
    """Return the section with the model of the default section and few, long rounds: noise is charged per round."""
    base = default_section(cache)
    return Federated(
        setting=base.setting,
        steps=base.steps // 2,
        inner_steps=40,
        outer=base.outer,
        seeds=(0, 1),
        clip=4.0,
        noise_multipliers=(0.0003, 0.003, 0.03, 2.6),
    )

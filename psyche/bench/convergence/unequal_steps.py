"""Compare nodes that take different numbers of inner steps with equal nodes, at equal tokens and equal rounds.

Nodes of speeds 1:2:4 are compared with equally many equal nodes that together are as fast: both train on the same
tokens per round, in the same time, and send the same bytes. Quotas are those of the protocol; weights follow tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from rich.console import Console

from psyche.bench.convergence.large_batch import NUDGE, default_section
from psyche.bench.convergence.section import Item, Outcomes, Section
from psyche.bench.convergence.trial import Trial
from psyche.bench.harness.rows import Column, Row, table
from psyche.bench.harness.turns import spread, with_error
from psyche.config import Outer
from psyche.telemetry.formatting import amount


class UnequalRow(Row, frozen=True):
    """One trial."""

    name: str
    due: str
    """Inner steps per round of each node."""
    nudge: float
    """Relative change of the initial parameters; not 0 in the control."""
    seed: int
    rounds: int
    tokens: Annotated[int, Column("tokens", amount)]
    heldout_loss: Annotated[float, Column("held-out loss", fold=spread(".4f"))]
    """Nats per token, of the outer parameters."""
    against_equal_percent: Annotated[float | None, Column("vs equal %", fold=with_error)]
    """100 × (loss / loss of equal nodes with the same seed − 1); positive is worse."""
    seconds: float

    @property
    def quotas(self) -> Annotated[str, Column("inner steps\nper round", after="rounds")]:
        return self.due + " (nudged)" * bool(self.nudge)


@dataclass(frozen=True)
class UnequalSteps(Section[UnequalRow]):
    """``psyche bench mixed --loss``."""

    outer: Outer
    mixed: tuple[int, ...]
    """Inner steps per round of each of the unequal nodes."""
    equal: int
    """Inner steps per round of each of the equal nodes."""
    rounds: int
    seeds: tuple[int, ...]

    def items(self) -> Iterator[Item]:
        for nudge in (0.0, NUDGE):
            for seed in self.seeds:
                yield Item(replace(self.equal_trial(seed), nudge=nudge), self.equal_trial(seed))
        most = max(self.mixed)
        for seed in self.seeds:
            equal = self.equal_trial(seed)
            yield Item(replace(equal, quotas=self.mixed, inner_steps=most, steps=most * self.rounds), equal)

    def equal_trial(self, seed: int) -> Trial:
        """Return the trial that the others of the same seed are compared with."""
        return Trial(  # fp32: a codec's own loss would hide the smaller difference measured here
            nodes=len(self.mixed), steps=self.equal * self.rounds, outer=self.outer, inner_steps=self.equal, seed=seed
        )

    def rows(self, items: Sequence[Item], outcomes: Outcomes) -> list[UnequalRow]:
        return [
            UnequalRow.of(
                item,
                item.trial,
                outcomes[item.trial],
                due=":".join(map(str, item.trial.quotas or [self.equal] * item.trial.nodes)),
                rounds=self.rounds,
                against_equal_percent=item.against_reference(outcomes),
            )
            for item in items
        ]

    def show(self, rows: Sequence[UnequalRow], console: Console) -> None:
        console.print(
            f"{self.rounds} rounds, seeds {', '.join(map(str, self.seeds))}, fp32 payloads, outer lr "
            f"{self.outer.lr:g}, momentum {self.outer.momentum:g}. Losses ± half their range, differences ± standard "
            "error. (nudged): initial parameters changed by a millionth, whose effect is noise.",
            highlight=False,
        )
        console.print(table("Unequal quotas", rows, group=lambda row: row.quotas))


def unequal_section(cache: Path | None = None) -> UnequalSteps:
    """Return the section with the model and outer optimizer of the default section; H is 24 for the fastest node."""
    base = default_section(cache)
    return UnequalSteps(base.setting, base.outer, mixed=(6, 12, 24), equal=14, rounds=100, seeds=(0, 1, 2))

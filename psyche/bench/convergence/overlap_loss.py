"""Compare ways to train on during the exchange with a run that waits for it.

At equal tokens an overlapped run ends sooner than one that waits: what it loses is the price of that time. At equal
wall time it takes more steps: the question is whether these help. Overlap steps are taken before the others' work is
known, so every trial here takes all τ of them in each round, which is the most that a real run would take.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Annotated

from rich.console import Console

from psyche.bench.convergence.large_batch import EQUAL_TOKENS, NUDGE, default_section
from psyche.bench.convergence.section import Item, Outcomes, Section
from psyche.bench.convergence.trial import Trial
from psyche.bench.harness.rows import DASH, Column, Row, table
from psyche.bench.harness.turns import spread, with_error
from psyche.config import Outer
from psyche.telemetry.formatting import amount

EQUAL_TIME = "equal wall time"


@dataclass(frozen=True)
class Mode:
    """One way to use the time of an exchange."""

    inner_steps: int
    """H: steps between two exchanges of one parameter. A round has ``inner_steps / fragments`` of them."""
    overlap_steps: int = 0
    """τ: steps taken during the exchange of the round before. 0: training waits."""
    fragments: int = 1
    alpha: float | None = None
    """α by which overlap steps are mixed. ``None``: they are kept by re-basing."""
    outer: Outer | None = None
    """``None``: the outer optimizer of the section."""

    @property
    def share(self) -> Fraction:
        """τ over a round's steps: for how long an exchange does not make training wait."""
        return Fraction(self.overlap_steps * self.fragments, self.inner_steps)


class OverlapRow(Row, frozen=True):
    """One trial in one comparison."""

    name: str
    comparison: str
    inner_steps: Annotated[int, Column("H")]
    """H of each parameter; a round has ``inner_steps / fragments`` steps."""
    fragments: Annotated[int, Column("frag-\nments")]
    overlap_steps: Annotated[int, Column("τ")]
    """τ in each round."""
    share: float
    """τ over a round's steps: for how long an exchange does not make training wait."""
    alpha: float | None
    """Factor by which overlap steps are mixed. ``None``: they are re-based, or there are none."""
    outer_lr: Annotated[float, Column("outer\nlr", "g")]
    momentum: Annotated[float, Column("momentum", "g")]
    seed: int
    nudge: float
    """Relative change of the initial parameters; not 0 in the control."""
    rounds: Annotated[int, Column("rounds")]
    tokens: Annotated[int, Column("tokens", amount)]
    """Tokens that all nodes together trained on."""
    steps_per_node: int
    parameters: int
    bytes_per_token: Annotated[float, Column("bytes\n/token", ",.1f")]
    heldout_loss: Annotated[float, Column("held-out loss", fold=spread(".4f"))]
    """Nats per token, of the outer parameters."""
    against_waiting_percent: Annotated[float | None, Column("vs waiting %", fold=with_error)]
    """100 × (loss / loss of the run that waits, same seed − 1); positive is worse. ``None`` if ``--only`` left out that
    run."""
    seconds: float
    """Duration of the trial on one core, which other trials may slow."""

    @property
    def part(self) -> Annotated[str, Column("τ / round", after="overlap_steps")]:
        return f"{self.share:.0%}" if self.overlap_steps else "waits"

    @property
    def merge(self) -> Annotated[str, Column("overlap steps", after="part")]:
        """What is done with overlap steps."""
        if self.nudge:
            return "(nudged)"
        if not self.overlap_steps:
            return DASH
        return "re-based" if self.alpha is None else f"mixed, α {self.alpha:g}"

    @property
    def setting(self) -> tuple[object, ...]:
        """Everything that makes the row but its seed."""
        mode = (self.inner_steps, self.fragments, self.overlap_steps, self.alpha, self.outer_lr, self.momentum)
        return (*mode, self.steps_per_node, self.nudge)


@dataclass(frozen=True)
class OverlapLoss(Section[OverlapRow]):
    """``psyche bench convergence --overlap``."""

    steps: int
    """Inner steps of each of ``CENTRE`` nodes at equal tokens, and of the run that waits at equal wall time."""
    outer: Outer
    seeds: tuple[int, ...]
    waiting: tuple[Mode, ...]
    """Modes without overlap steps. Everything is compared with the first one."""
    equal_tokens: tuple[Mode, ...]
    equal_wall_time: tuple[Mode, ...]
    """Modes that train on during the exchange for as long as the first of ``waiting`` waits. With the same H they
    complete more rounds in that time; with H larger by τ equally many."""

    def items(self) -> Iterator[Item]:
        for mode in (*self.waiting, *self.equal_tokens):
            yield from self._of_seeds(EQUAL_TOKENS, mode, self.steps)
        for seed in self.seeds:
            reference = self._trial(self.waiting[0], self.steps, seed)
            yield Item(replace(reference, nudge=NUDGE), reference, EQUAL_TOKENS)
        for mode in self.equal_wall_time:
            yield from self._of_seeds(EQUAL_TIME, mode, self.steps_in_equal_time(mode))

    def steps_in_equal_time(self, mode: Mode) -> int:
        """Inner steps in whole rounds that ``mode`` takes in the time of ``self.steps`` steps that wait.

        A round that waits takes as long as its own steps and those of ``mode`` during an exchange of as many bytes.
        """
        waits = self.waiting[0].inner_steps
        time = self.steps * Fraction(waits + mode.overlap_steps * mode.fragments, waits)
        return int(time // mode.inner_steps) * mode.inner_steps

    def _of_seeds(self, comparison: str, mode: Mode, steps: int) -> Iterator[Item]:
        for seed in self.seeds:
            yield Item(self._trial(mode, steps, seed), self._trial(self.waiting[0], self.steps, seed), comparison)

    def _trial(self, mode: Mode, steps: int, seed: int) -> Trial:
        return Trial(  # fp32: a codec's own loss would hide the smaller differences measured here
            steps=steps,
            outer=mode.outer or self.outer,
            inner_steps=mode.inner_steps,
            fragments=mode.fragments,
            overlap_steps=mode.overlap_steps,
            alpha=mode.alpha,
            seed=seed,
        )

    def rows(self, items: Sequence[Item], outcomes: Outcomes) -> list[OverlapRow]:
        return [_row(item, outcomes) for item in items]

    def show(self, rows: Sequence[OverlapRow], console: Console) -> None:
        details = (
            "fp32 payloads. Differences ± standard error. H is that of a parameter: a round has H / fragments steps, "
            "the first τ of them during the exchange of the round before. (nudged): initial parameters changed by a "
            "millionth, whose effect is noise."
        )
        console.print(self.preface(rows[0].parameters, self.steps, self.seeds, details), highlight=False)
        for comparison, group in groupby(rows, key=lambda row: row.comparison):
            console.print(table(_TITLES[comparison], list(group), group=lambda row: row.setting))


_TITLES = {
    EQUAL_TOKENS: "(a) Equal tokens: equally many inner steps, whether training waits for exchanges or not",
    EQUAL_TIME: "(b) Equal wall time: steps are taken while the first run of (a) waits",
}


def _row(item: Item, outcomes: Outcomes) -> OverlapRow:
    trial = item.trial
    assert trial.inner_steps is not None, "all trials of the section are DiLoCo's"
    return OverlapRow.of(
        item,
        trial,
        outcomes[trial],
        share=trial.overlap_steps * trial.fragments / trial.inner_steps,
        rounds=trial.steps * trial.fragments // trial.inner_steps,
        steps_per_node=trial.steps,
        against_waiting_percent=item.against_reference(outcomes),
    )


def overlap_section(cache: Path | None = None, *, full: bool = False) -> OverlapLoss:
    """Return the section with the model of the default section, at half of its full tokens and two seeds.

    ``full``: all tokens and three seeds. H is 24, so that τ can be a twelfth, a sixth and a third of it.
    """
    base = default_section(cache, full=True)
    return OverlapLoss(
        setting=base.setting,
        steps=2736 if full else 1344,
        outer=base.outer,
        seeds=base.seeds if full else base.seeds[:2],
        waiting=(Mode(24), Mode(24, fragments=2), Mode(24, fragments=3), Mode(48)),
        equal_tokens=(
            *(Mode(24, steps) for steps in (1, 2, 4, 8)),
            Mode(24, 4, alpha=0.5),
            Mode(24, 4, outer=Outer(lr=0.7, momentum=0.5)),
            Mode(24, 4, outer=Outer(lr=0.5, momentum=0.8)),
            *(Mode(24, steps, fragments=2) for steps in (1, 2, 4)),
            *(Mode(24, steps, fragments=3) for steps in (1, 2)),
            Mode(48, 8),
        ),
        equal_wall_time=(
            *(mode for steps in (4, 8) for mode in (Mode(24 + steps, steps), Mode(24, steps))),
            *(Mode(24, steps, fragments=3) for steps in (1, 2)),
        ),
    )

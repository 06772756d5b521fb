"""What the overlap section compares: ways to train on during the exchange, and what each is measured against."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

from psyche.bench.plan import CENTRE, NUDGE, full_scale
from psyche.bench.trials import Setting, Trial
from psyche.config import Outer

Comparison = Literal["equal tokens", "equal wall time"]


@dataclass(frozen=True)
class Way:
    """One way to spend the time that an exchange takes."""

    inner_steps: int
    """H: steps between two exchanges of one parameter. A round has ``inner_steps / fragments`` of them."""
    late: int = 0
    """τ: those that are taken while the round before is on the wire; 0: training waits."""
    fragments: int = 1
    mix: float | None = None
    """α, where late steps are not kept by re-basing."""
    outer: Outer | None = None
    """None is the outer optimizer of the section."""

    @property
    def share(self) -> Fraction:
        """τ/H: how long an exchange may take without training having to wait, as a share of the round's steps."""
        return Fraction(self.late * self.fragments, self.inner_steps)


@dataclass(frozen=True)
class OverlapScale:
    """One size of the section."""

    setting: Setting
    steps: int
    """Inner steps of each of ``CENTRE`` nodes at equal tokens; where training waits at equal wall time, too."""
    outer: Outer
    seeds: tuple[int, ...]
    waiting: tuple[Way, ...]
    """Without late steps. The first one is what everything is compared with."""
    equal_tokens: tuple[Way, ...]
    equal_wall_time: tuple[Way, ...]
    """These go on during the exchange for as long as the first of ``waiting`` waits for it. With the same H they take
    more rounds in that time; with H larger by τ as many."""

    @property
    def tokens(self) -> int:
        """Of each trial at equal tokens."""
        return CENTRE * self.steps * self.setting.inner.batch_size * self.setting.data.sequence_length


@dataclass(frozen=True)
class Item:
    """One row to be."""

    comparison: Comparison
    way: Way
    trial: Trial
    reference: Trial
    """The trial of the same seed that waits."""

    @property
    def name(self) -> str:
        """What ``--only`` looks in: ``equal-tokens/diloco-fp32/k4/1368-steps/lr0.7/mu0.7/H24/late4/seed0``."""
        return f"{self.comparison.replace(' ', '-')}/{self.trial.label}"


def items(scale: OverlapScale) -> Iterator[Item]:
    """Every row of the section, in the order of its tables, the seeds of a way one after the other."""
    first = scale.waiting[0]
    for way in (*scale.waiting, *scale.equal_tokens):
        yield from _of_seeds(scale, "equal tokens", way, scale.steps)
    for seed in scale.seeds:
        trial = replace(_trial(scale, first, scale.steps, seed), nudge=NUDGE)
        yield Item("equal tokens", first, trial, _trial(scale, first, scale.steps, seed))
    for way in scale.equal_wall_time:
        yield from _of_seeds(scale, "equal wall time", way, steps_in_that_time(scale, way))


def steps_in_that_time(scale: OverlapScale, way: Way) -> int:
    """Inner steps that ``way`` takes while ``scale.steps`` are taken that wait, in whole rounds.

    A round that waits lasts as long as its own steps and those that ``way`` takes during an exchange of as many bytes.
    """
    waits = scale.waiting[0].inner_steps
    time = scale.steps * Fraction(waits + way.late * way.fragments, waits)
    return int(time // way.inner_steps) * way.inner_steps


def _of_seeds(scale: OverlapScale, comparison: Comparison, way: Way, steps: int) -> Iterator[Item]:
    for seed in scale.seeds:
        reference = _trial(scale, scale.waiting[0], scale.steps, seed)
        yield Item(comparison, way, _trial(scale, way, steps, seed), reference)


def _trial(scale: OverlapScale, way: Way, steps: int, seed: int) -> Trial:
    return Trial(
        system="diloco",
        codec="fp32",  # a codec's own loss would hide the smaller ones that are looked for here
        nodes=CENTRE,
        steps=steps,
        outer=way.outer or scale.outer,
        inner_steps=way.inner_steps,
        fragments=way.fragments,
        late=way.late,
        mix=way.mix,
        seed=seed,
    )


def overlap_scale(cache: Path | None = None, *, full: bool = False) -> OverlapScale:
    """The model of :func:`~psyche.bench.plan.full_scale` at half its tokens and two seeds; in full with all of both.

    H is 24, which τ can be a twelfth, a sixth and a third of.
    """
    scale = full_scale(cache)
    return OverlapScale(
        setting=scale.setting,
        steps=2736 if full else 1344,
        outer=scale.outer,
        seeds=scale.seeds if full else scale.seeds[:2],
        waiting=(Way(24), Way(24, fragments=2), Way(24, fragments=3), Way(48)),
        equal_tokens=(
            *(Way(24, late=late) for late in (1, 2, 4, 8)),
            Way(24, late=4, mix=0.5),
            Way(24, late=4, outer=Outer(lr=0.7, momentum=0.5)),
            Way(24, late=4, outer=Outer(lr=0.5, momentum=0.8)),
            *(Way(24, late=late, fragments=2) for late in (1, 2, 4)),
            *(Way(24, late=late, fragments=3) for late in (1, 2)),
            Way(48, late=8),
        ),
        equal_wall_time=(
            *(way for late in (4, 8) for way in (Way(24 + late, late=late), Way(24, late=late))),
            *(Way(24, late=late, fragments=3) for late in (1, 2)),
        ),
    )

"""What the codecs section compares: every codec at the settings that it was found to train best with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from psyche.bench.plan import CENTRE, full_scale
from psyche.bench.trials import Setting, Trial
from psyche.config import Outer

REFERENCE, BASELINE = "fp32", "int8"
"""What losses are compared with at equal tokens, and at equal bytes."""


@dataclass(frozen=True)
class Choice:
    """The settings of one codec at one H."""

    codec: str
    inner_steps: int
    lr: float
    """Outer."""
    momentum: float
    error_feedback: float | None = None
    """β; None where there is none, or where it is what the codec is made for."""


@dataclass(frozen=True)
class CodecScale:
    """One size of the section."""

    setting: Setting
    steps: int
    """Inner steps of each of ``CENTRE`` nodes."""
    seeds: tuple[int, ...]
    choices: tuple[Choice, ...]

    @property
    def tokens(self) -> int:
        """Of each trial."""
        return CENTRE * self.steps * self.setting.inner.batch_size * self.setting.data.sequence_length

    def trials(self) -> Iterator[Trial]:
        """In the order of the table, the seeds of a choice one after the other."""
        for choice in self.choices:
            for seed in self.seeds:
                yield Trial(
                    system="diloco",
                    codec=choice.codec,
                    nodes=CENTRE,
                    steps=self.steps,
                    outer=Outer(lr=choice.lr, momentum=choice.momentum),
                    inner_steps=choice.inner_steps,
                    error_feedback=choice.error_feedback,
                    seed=seed,
                )


CHOICES = (
    Choice("fp32", 10, lr=0.7, momentum=0.7),
    Choice("int8", 10, lr=0.7, momentum=0.7),
)


def codec_scale(cache: Path | None = None, *, full: bool = False) -> CodecScale:
    """The model and tokens of :func:`~psyche.bench.plan.full_scale`, its three seeds or only two."""
    scale = full_scale(cache)
    return CodecScale(
        setting=replace(scale.setting, curve_points=24),
        steps=scale.steps,
        seeds=scale.seeds if full else scale.seeds[:2],
        choices=CHOICES,
    )

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
    # Best of seven at 10 tokens a parameter, H = 10 and one seed (lr .5 to 1, momentum .5 to .8): 0.5 with 0.7 is 0.2 %
    # worse, the others 0.5 to 1.7 %. The dense codecs lose so little that they share it.
    Choice("fp32", 10, lr=0.7, momentum=0.7),
    Choice("int8", 10, lr=0.7, momentum=0.7),
    Choice("int4", 10, lr=0.7, momentum=0.7),
    Choice("int4-32", 10, lr=0.7, momentum=0.7),
    Choice("int2", 10, lr=0.7, momentum=0.7),
    Choice("topk2-256", 5, lr=1.4, momentum=0.3, error_feedback=0.95),
    # What decays in the error feedback before its turn comes is made up for by an outer lr far above 1. At H = 10 and
    # 10 tokens a parameter: 3.147 with lr 2 and momentum .3; 3.159 with 2.8 and 0; 3.176 with 1.4 and .5; 3.256 with 1
    # and .5; 3.315 with .7 and .7. β: 3.147 with .95, 3.179 with .9, 3.189 with .98, 3.248 with 1. With more rounds in
    # as many steps the best β is nearer to 1.
    Choice("topk2", 10, lr=2.0, momentum=0.3, error_feedback=0.95),
    Choice("topk2", 5, lr=2.0, momentum=0.3, error_feedback=0.98),
    Choice("topk2", 2, lr=2.0, momentum=0.3, error_feedback=0.99),
    # What dense codecs can do with as few bytes, by sending less often: int8 with 20 and 40 beside int4 and
    # int2, int2 with 20 beside topk2-256, the others beside topk2. Not searched for, but lr 1 and momentum .5 are 0.1 %
    # worse than .7 and .7 for int2 with 40.
    Choice("int2", 20, lr=0.7, momentum=0.7),
    Choice("int8", 20, lr=0.7, momentum=0.7),
    Choice("int8", 40, lr=0.7, momentum=0.7),
    Choice("int8", 136, lr=1.0, momentum=0.5),
    Choice("int8", 544, lr=1.0, momentum=0.3),
)
"""How well each codec trains depends more on these than on the codec. Losses here are of one seed, and a difference
below half a percent may be noise. With all tokens ten runs of dense codecs with H = 10 ended at 2.870, with a standard
deviation of .010, and three of topk2 with H = 2 at 2.893."""


def codec_scale(cache: Path | None = None, *, full: bool = False) -> CodecScale:
    """The model and tokens of :func:`~psyche.bench.plan.full_scale`, its three seeds or only two."""
    scale = full_scale(cache)
    return CodecScale(
        setting=replace(scale.setting, curve_points=24),
        steps=scale.steps,
        seeds=scale.seeds if full else scale.seeds[:2],
        choices=CHOICES,
    )

"""The inner learning rate as a function of the run's global inner step, so that a late joiner has the same.

But for its first steps: AdamW without state moves every coordinate by the full lr, ±1 in units of lr where β₁ = .9 lets
noise move it by √((1 − β₁)/(1 + β₁)) = .23 later on, and by 1/√k in its k-th step. A linear warm-up over
(1 + β₁)/(1 − β₁) = 19 steps keeps every one of them to that, within a sixth. The rule for the beginning of a run,
2/(1 − β₂) steps (Ma and Yarats, arXiv 1910.04209), is for gradients that change fast, too, which they do no more in the
middle of one.
"""

from __future__ import annotations

from math import cos, pi

from psyche.config import Inner


def learning_rate(inner: Inner, step: int, total: int, taken: int | None = None) -> float:
    """The lr of global inner step ``step`` (0-based) of ``total``, for an optimizer with ``taken`` steps behind it.

    That of the schedule, and for an optimizer's own first steps no more than their share of it. At the beginning of a
    run, where ``taken`` is ``step``, the run's warm-up is the longer one, and so nothing else. None: it has many.

    The schedule: linear warm-up to ``inner.lr``, then: ``cosine`` to ``final_lr · lr`` (SGDR, arXiv 1608.03983, without
    restarts); ``wsd`` stays and falls linearly over the last ``decay_fraction`` (MiniCPM, arXiv 2404.06395,
    §4); ``constant`` stays.
    """
    lr = _after_warm_up(inner, step, total)
    fresh = min(inner.fresh_warmup_steps, inner.warmup_steps)
    if taken is not None and taken + 1 < fresh:
        lr = lr * (taken + 1) / fresh
    if step < inner.warmup_steps:
        lr = min(lr, inner.lr * (step + 1) / inner.warmup_steps)
    return lr


def _after_warm_up(inner: Inner, step: int, total: int) -> float:
    """The schedule without its warm-up: ``inner.lr`` up to there."""
    if step < inner.warmup_steps or inner.schedule == "constant":
        return inner.lr
    start = inner.warmup_steps
    if inner.schedule == "wsd":
        start = max(start, round(total * (1 - inner.decay_fraction)))
    progress = min(max((step - start) / max(total - start, 1), 0.0), 1.0)
    left = (1 + cos(pi * progress)) / 2 if inner.schedule == "cosine" else 1 - progress
    return inner.lr * (inner.final_lr + (1 - inner.final_lr) * left)

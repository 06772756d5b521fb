"""The inner learning rate as a function of the run's global inner step, so that a late joiner has the same."""

from __future__ import annotations

from math import cos, pi

from psyche.config import Inner


def learning_rate(inner: Inner, step: int, total: int) -> float:
    """The lr of global inner step ``step`` (0-based) of ``total``.

    Linear warm-up to ``inner.lr``, then: ``cosine`` to ``final_lr · lr`` (SGDR, arXiv 1608.03983, without
    restarts); ``wsd`` stays and falls linearly over the last ``decay_fraction`` (MiniCPM, arXiv 2404.06395,
    §4); ``constant`` stays.
    """
    if step < inner.warmup_steps:
        return inner.lr * (step + 1) / inner.warmup_steps
    if inner.schedule == "constant":
        return inner.lr
    start = inner.warmup_steps
    if inner.schedule == "wsd":
        start = max(start, round(total * (1 - inner.decay_fraction)))
    progress = min(max((step - start) / max(total - start, 1), 0.0), 1.0)
    left = (1 + cos(pi * progress)) / 2 if inner.schedule == "cosine" else 1 - progress
    return inner.lr * (inner.final_lr + (1 - inner.final_lr) * left)

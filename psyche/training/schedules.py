"""The inner learning rate as a function of the run's global inner step, so a late joiner uses the same one.

Its first steps are the exception. AdamW without state moves every coordinate by the full lr: noise moves it by ±1 in
units of lr in the first step and by 1/√k in the k-th, but only by √((1 − β₁)/(1 + β₁)) = 0.23 (β₁ = 0.9) later on. A
linear warm-up over (1 + β₁)/(1 − β₁) = 19 steps keeps each of them within a sixth of that. The rule for the beginning
of a run, 2/(1 − β₂) steps (Ma and Yarats, arXiv 1910.04209), also covers gradients that change fast, which they no
longer do in the middle of a run.
"""

from __future__ import annotations

from math import cos, pi

from psyche.config import Inner


def learning_rate(inner: Inner, step: int, total: int, taken: int | None = None) -> float:
    """Compute the lr of global inner step ``step`` (0-based) of ``total``, for an optimizer that took ``taken`` steps.

    The schedule is a linear warm-up to ``inner.lr``, then ``cosine``: decay to ``final_lr · lr`` (SGDR, arXiv
    1608.03983, without restarts); ``wsd``: constant, with linear decay over the last ``decay_fraction`` (MiniCPM, arXiv
    2404.06395, §4); or ``constant``.

    The first ``fresh_warmup_steps`` of an optimizer are scaled linearly on top (``taken`` None: they are over). At the
    beginning of a run, where ``taken`` equals ``step``, this has no effect, because the run's warm-up is longer.
    """
    lr = _after_warm_up(inner, step, total)
    fresh = min(inner.fresh_warmup_steps, inner.warmup_steps)
    if taken is not None and taken + 1 < fresh:
        lr = lr * (taken + 1) / fresh
    if step < inner.warmup_steps:
        lr = min(lr, inner.lr * (step + 1) / inner.warmup_steps)
    return lr


def _after_warm_up(inner: Inner, step: int, total: int) -> float:
    """Return the schedule without its warm-up, during which this is ``inner.lr``."""
    if step < inner.warmup_steps or inner.schedule == "constant":
        return inner.lr
    start = inner.warmup_steps
    if inner.schedule == "wsd":
        start = max(start, round(total * (1 - inner.decay_fraction)))
    progress = min(max((step - start) / max(total - start, 1), 0.0), 1.0)
    left = (1 + cos(pi * progress)) / 2 if inner.schedule == "cosine" else 1 - progress
    return inner.lr * (inner.final_lr + (1 - inner.final_lr) * left)

"""The error of a replay: how far the claimed parameters are from the replayed ones, relative to what the data changed.

An auditor replays from an optimizer state that the audited node provides. That state can be crafted to drown out the
data: large first moments in the direction of another node's update, and second moments so large that no gradient
counts. The resulting update costs no work, and the replay reproduces it. But the same update also follows without any
data, so errors are measured relative to what the data changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor, nn

from psyche.config import Inner
from psyche.numerics.flat import FlatLayout
from psyche.protocol.audit_messages import MOST
from psyche.training.optimizer_state import Moments
from psyche.training.optimizers import adamw, muon

NEGLIGIBLE_ERROR = 0.01
"""Relative error up to which the other precision is not tried."""
TYPICAL_NOISE = 0.02
"""Relative difference between fp32 and bf16 below which errors are not rescaled: about the largest in calm training."""
MAX_NOISE = 0.4
"""The largest noise that errors are rescaled by, so that a crafted optimizer gains a bounded factor."""


def drift_without_gradients(
    layout: FlatLayout, inner: Inner, by_muon: frozenset[str], start: Tensor, moments: Moments, lrs: Sequence[float]
) -> Tensor:
    """Take inner steps with zero gradients: where momentum and weight decay alone lead from ``start``.

    ``start`` and the result are flat parameters, ``[layout.size]`` fp32 on the CPU. ``by_muon`` names the parameters
    that Muon updates; ``lrs`` is the learning rate of each step.
    """
    flat = start.clone()
    parameters = {name: nn.Parameter(view) for name, view in layout.views(flat).items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    others = {name: p for name, p in parameters.items() if name not in by_muon}
    optimizers: list[torch.optim.Optimizer] = [adamw(others, layout, inner)]
    if by_muon:
        optimizers.append(muon([parameters[name] for name in sorted(by_muon)], inner))
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.state(layout, by_muon).items():
        kind, _, name = key.partition("/")
        states.setdefault(name, {})[kind] = value.clone()
    for optimizer in optimizers:
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        optimizer.state.update({parameters[name]: one for name, one in states.items() if id(parameters[name]) in own})
        for lr in lrs:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
    return flat


def relative_error(before: Tensor, after: Tensor, found: Tensor, drift: Tensor) -> float:
    """Return ‖after − found‖ / min(‖found − before‖, ‖found − drift‖); all ``[n]`` fp32, norms summed in fp64.

    ``after`` is what the node claims, ``found`` the replay, ``drift`` that of :func:`drift_without_gradients`. Infinite
    if anything is not finite.
    """
    apart = _distance(after, found)
    moved = min(_distance(found, before), _distance(found, drift))
    if not isfinite(apart) or not isfinite(moved):
        return float("inf")
    if moved == 0.0:
        return 0.0 if apart == 0.0 else float("inf")
    return apart / moved


def tolerant_error(before: Tensor, after: Tensor, found: Tensor, other: Tensor, drift: Tensor) -> float:
    """Return the relative error against the nearer of two replays, ``found`` and ``other``, in fp32 and bf16.

    If the two differ by more than ``TYPICAL_NOISE``, training amplifies every difference in this segment, and honest
    nodes with other hardware are as far off: the error is then divided by that excess, up to ``MAX_NOISE``. In the
    demo's second round the two precisions differ by a third of what the data change, in its first by a hundredth.
    A node that crafts an optimizer state that amplifies everything gains a factor of 20 (``MAX_NOISE /
    TYPICAL_NOISE``); an update that has nothing to do with the data still fails.
    """
    errors = [relative_error(before, after, one, drift) for one in (found, other)]
    noise = relative_error(before, other, found, drift)
    return min(errors) * TYPICAL_NOISE / min(max(noise, TYPICAL_NOISE), MAX_NOISE)


def millionths(error: float) -> int:
    """Convert a relative error to the integer unit of :class:`Finding`, clamped to ``MOST``."""
    return min(MOST, round(error * 1e6)) if isfinite(error) else MOST


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one - other, dtype=torch.float64))

"""Where parameters go by themselves: what the inner optimizer does with gradients of zero.

An auditor replays from an optimizer state that the audited node names, and such a state can be made so that it drowns
what the data say: large first moments in the direction of somebody else's update, second moments so large that no
gradient counts. The update that follows from it is then had without a step of work, and a replay agrees with it. But it
is also where the parameters go without any data; so a replay measures errors against what the data change of that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from psyche.config import Inner
from psyche.numerics.flat import FlatLayout
from psyche.training.optimizer_state import Moments
from psyche.training.optimizers import adamw, muon


def coasted(
    layout: FlatLayout,
    inner: Inner,
    by_muon: frozenset[str],
    start: Tensor,
    moments: Moments,
    lrs: Sequence[float],
) -> Tensor:
    """The flat parameters (``[layout.size]`` fp32, on the CPU) that steps of ``lrs`` without gradients lead to from
    ``start``. ``by_muon`` names the parameters that Muon steps."""
    flat = start.clone()
    parameters = {name: nn.Parameter(view) for name, view in layout.views(flat).items()}
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    others = {name: p for name, p in parameters.items() if name not in by_muon}
    parts: list[torch.optim.Optimizer] = [adamw(others, layout, inner)]
    if by_muon:
        parts.append(muon([parameters[name] for name in sorted(by_muon)], inner))
    kept: dict[str, dict[str, Tensor]] = {}
    for key, value in moments.state(layout, by_muon).items():
        kind, _, name = key.partition("/")
        kept.setdefault(name, {})[kind] = value.clone()
    for part in parts:
        own = {id(p) for group in part.param_groups for p in group["params"]}
        part.state.update({parameters[name]: state for name, state in kept.items() if id(parameters[name]) in own})
        for lr in lrs:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
    return flat

"""The inner optimizers: AdamW, or Muon for the matrices between the embeddings and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from psyche.errors import PsycheError
from psyche.numerics.flat import FlatLayout

if TYPE_CHECKING:
    from psyche.config import Inner

STATE = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
"""By class name, since torch has Muon from 2.9 on: what an optimizer keeps of each parameter; of the shape of the
parameter, but for ``step``, which is a scalar."""


class Optimizers:
    """One or two of them that step together; their state by the names of the parameters."""

    def __init__(self, model: nn.Module, inner: Inner) -> None:
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        between = between_embeddings(model) if inner.optimizer == "muon" else []
        others = {name: p for p, name in self._names.items() if p not in set(between)}
        self._parts: list[torch.optim.Optimizer] = [adamw(others, FlatLayout.of_model(model), inner)]
        if between:
            self._parts.append(muon(between, inner))

    def step(self, lr: float) -> None:
        """One step along the parameters' gradients."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    @property
    def bytes_to_come(self) -> int:
        """What the first step will allocate; 0 after it."""
        if any(part.state for part in self._parts):
            return 0
        return sum(
            p.numel() * p.element_size() * len([key for key in STATE[type(part).__name__] if key != "step"])
            for part in self._parts
            for group in part.param_groups
            for p in group["params"]
        )

    def state(self) -> dict[str, Tensor]:
        """Tensors by ``<what>/<parameter>``; none before the first step."""
        return {
            f"{key}/{self._names[parameter]}": value
            for part in self._parts
            for parameter, kept in part.state.items()
            for key, value in kept.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> int:
        """Inverse of :meth:`state`, on whatever device. Returns the steps behind it. Raises ``ValueError`` where names
        or shapes differ."""
        unknown, steps = set(state), []
        loaded: list[dict[Tensor, dict[str, Tensor]]] = []
        for part in self._parts:
            keys = STATE[type(part).__name__]
            loaded.append({})
            for parameter in (p for group in part.param_groups for p in group["params"]):
                name = self._names[parameter]
                own = {key: state[f"{key}/{name}"] for key in keys if f"{key}/{name}" in state}
                unknown -= {f"{key}/{name}" for key in own}
                if not own:
                    continue
                if len(own) < len(keys) or any(own[key].shape != parameter.shape for key in keys if key != "step"):
                    raise ValueError(f"the inner optimizer state does not fit {name}")
                # The fused kernels read all of it where the parameter is, the step, too.
                loaded[-1][parameter] = {
                    key: value.to(parameter.device, torch.float32, copy=True) for key, value in own.items()
                }
                if "step" in own:
                    steps.append(int(own["step"]))
        if unknown:
            raise ValueError(f"the inner optimizer state has {min(unknown)}, which this model has not")
        for part, tensors in zip(self._parts, loaded, strict=True):
            part.state.clear()
            part.state.update(tensors)
        return min(steps, default=0)


def adamw(parameters: Mapping[str, Tensor], layout: FlatLayout, inner: Inner) -> torch.optim.AdamW:
    """AdamW of ``parameters``, by name. ``layout`` knows their shapes, also of those that ZeRO 3 has cut up.

    Decoupled weight decay (arXiv 1711.05101) on matrices, none on vectors, as is usual for transformers (GPT-3,
    arXiv 2005.14165, and its followers).
    """
    matrices = {span.name for span in layout.spans if len(span.shape) >= 2}
    groups = [
        {"params": [p for name, p in parameters.items() if name in matrices], "weight_decay": inner.weight_decay},
        {"params": [p for name, p in parameters.items() if name not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=inner.lr, betas=inner.betas, eps=inner.eps, fused=True)


def muon(parameters: list[Tensor], inner: Inner) -> torch.optim.Muon:
    """Momentum, orthogonalised by five Newton–Schulz steps. Its updates are scaled to AdamW's RMS, 0.2·√max(A, B)
    (Moonlight, arXiv 2502.16982, §2.2), so that one lr and one weight decay serve both optimizers."""
    return torch.optim.Muon(
        parameters,
        lr=inner.lr,
        weight_decay=inner.weight_decay,
        momentum=inner.muon_momentum,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )


def between_embeddings(model: nn.Module) -> list[Tensor]:
    """Matrices whose rows and columns both mean directions: neither embeddings nor the output head (Jordan et al.,
    "Muon: An optimizer for hidden layers in neural networks", 2024)."""
    ends = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        ends.add(head.weight)
    found: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and p not in ends]
    if not found:
        raise PsycheError("run.inner.optimizer: this model has no matrices for muon: use adamw")
    return found

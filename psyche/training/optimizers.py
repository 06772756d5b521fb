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

MUON_MOMENTUM = 0.95
"""The value of Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024."""

STATE = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}
"""The tensors that an optimizer (by class name) keeps per parameter, in its shape; ``step`` is a scalar."""


class Optimizers:
    """One optimizer, or two that step together. Their state is keyed by parameter name."""

    def __init__(self, model: nn.Module, inner: Inner) -> None:
        self._names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        between = hidden_matrices(model) if inner.optimizer == "muon" else []
        others = {name: p for p, name in self._names.items() if p not in set(between)}
        self._parts: list[torch.optim.Optimizer] = [adamw(others, FlatLayout.of_model(model), inner)]
        if between:
            self._parts.append(muon(between, inner))

    def step(self, lr: float) -> None:
        """Apply one step with learning rate ``lr``."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad(set_to_none=True)

    @property
    def unallocated_bytes(self) -> int:
        """Bytes of state that the first step will allocate; 0 after it."""
        if any(part.state for part in self._parts):
            return 0
        return sum(
            p.numel() * p.element_size() * len([key for key in STATE[type(part).__name__] if key != "step"])
            for part in self._parts
            for group in part.param_groups
            for p in group["params"]
        )

    def state(self) -> dict[str, Tensor]:
        """Return the state tensors, keyed ``<tensor>/<parameter>``; empty before the first step."""
        return {
            f"{key}/{self._names[parameter]}": value
            for part in self._parts
            for parameter, kept in part.state.items()
            for key, value in kept.items()
        }

    def load_state(self, state: dict[str, Tensor]) -> int:
        """Load what :meth:`state` returned, from any device, and return its number of steps.

        Raises ``ValueError`` where names or shapes differ.
        """
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
                    raise ValueError(f"the inner optimizer state does not fit the shape of {name}")
                # fused kernels need all of the state, also ``step``, on the parameter's device
                loaded[-1][parameter] = {
                    key: value.to(parameter.device, torch.float32, copy=True) for key, value in own.items()
                }
                if "step" in own:
                    steps.append(int(own["step"]))
        if unknown:
            raise ValueError(f"the inner optimizer state has {min(unknown)}, which this model does not have")
        for part, tensors in zip(self._parts, loaded, strict=True):
            part.state.clear()
            part.state.update(tensors)
        return min(steps, default=0)


def adamw(parameters: Mapping[str, Tensor], layout: FlatLayout, inner: Inner) -> torch.optim.AdamW:
    """Create AdamW for named ``parameters``; ``layout`` has their full shapes, also of those that ZeRO 3 partitions.

    Decoupled weight decay (arXiv 1711.05101) applies to matrices only, as is usual for transformers since GPT-3
    (arXiv 2005.14165).
    """
    matrices = {span.name for span in layout.spans if len(span.shape) >= 2}
    groups = [
        {"params": [p for name, p in parameters.items() if name in matrices], "weight_decay": inner.weight_decay},
        {"params": [p for name, p in parameters.items() if name not in matrices], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=inner.lr, betas=inner.betas, eps=inner.eps, fused=True)


def muon(parameters: list[Tensor], inner: Inner) -> torch.optim.Muon:
    """Create Muon: momentum, orthogonalised by five Newton–Schulz steps.

    Updates are scaled to AdamW's RMS, 0.2·√max(A, B) (Moonlight, arXiv 2502.16982, §2.2), so one learning rate and one
    weight decay serve both optimizers.
    """
    return torch.optim.Muon(
        parameters,
        lr=inner.lr,
        weight_decay=inner.weight_decay,
        momentum=MUON_MOMENTUM,
        nesterov=True,
        adjust_lr_fn="match_rms_adamw",
    )


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """Return the hidden layers' matrices, which Muon steps: neither embeddings nor the output head (Jordan et al.,
    2024).

    Raises :class:`PsycheError` for a model without any.
    """
    ends = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        ends.add(head.weight)
    found: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p.dim() == 2 and p not in ends]
    if not found:
        raise PsycheError("run.inner.optimizer: this model has no hidden matrices for muon to step: set it to adamw")
    return found

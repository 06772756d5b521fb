"""Causal language models of ``transformers``, from nothing but their configuration."""

from __future__ import annotations

from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from psyche import config
from psyche.errors import ConfigError
from psyche.numerics.flat import FlatLayout

_IMPORTING = Lock()
"""transformers loads its modules when they are first asked for, and fails where two threads do that at once."""


def build(spec: config.Model, *, device: str = "cpu", seed: int = 0) -> nn.Module:
    """The model with freshly initialised fp32 parameters, by ``seed``; ``device="meta"`` allocates nothing.

    Raises :class:`ConfigError` for an architecture that is unknown or settings it does not have.
    """
    preload()
    from transformers import AutoModelForCausalLM

    settings = _settings(spec)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"run.model: transformers cannot build it: {error}") from None
    return model


def preload() -> None:
    """Import what :func:`build` needs, which takes seconds, while there is something else to wait for."""
    with _IMPORTING:
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def layout(spec: config.Model) -> FlatLayout:
    """The flat layout of the model, without allocating its parameters."""
    return FlatLayout.of_model(build(spec, device="meta"))


def initial_parameters(spec: config.Model, seed: int) -> tuple[FlatLayout, Tensor]:
    """Layout and θ before the first round (``[layout.size]`` fp32, padding zero)."""
    model = build(spec, seed=seed)
    flat_layout = FlatLayout.of_model(model)
    flat = torch.zeros(flat_layout.size)
    with torch.no_grad():
        flat_layout.gather(dict(model.named_parameters()), flat)
    return flat_layout, flat


@torch.no_grad()
def draws_random_numbers(model: nn.Module, tokens: Tensor) -> bool:
    """Whether a forward pass of training on ``tokens`` (int64 ``[sequences, length]``) does: dropout, of any kind.

    Seen by the generators, which have moved on; they are put back.
    """
    cuda = [tokens.device] if tokens.device.type == "cuda" else []

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda)]

    with torch.random.fork_rng(devices=cuda):
        before = states()
        model.train()(input_ids=tokens, use_cache=False)
        return any(not torch.equal(one, other) for one, other in zip(before, states(), strict=True))


def _settings(spec: config.Model) -> Any:
    from transformers import AutoConfig

    try:
        known = _known_settings(spec.architecture)
    except ValueError:
        raise ConfigError(f"run.model.architecture: transformers has no causal LM {spec.architecture!r}") from None
    if unknown := sorted(set(spec.settings) - known):
        raise ConfigError(f"run.model.settings.{unknown[0]}: {spec.architecture} has no such setting")
    try:
        return AutoConfig.for_model(spec.architecture, **spec.settings)
    except Exception as error:  # transformers validates with several libraries' exceptions
        raise ConfigError(f"run.model.settings: {' '.join(str(error).split())}") from None


@cache
def _known_settings(architecture: str) -> frozenset[str]:
    from transformers import AutoConfig

    return frozenset(AutoConfig.for_model(architecture).to_dict())

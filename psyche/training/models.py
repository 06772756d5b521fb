"""Causal language models of ``transformers``, built from their configuration alone."""

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
"""transformers imports its modules lazily, and fails if two threads trigger that at once."""


def build(spec: config.Model, *, device: str = "cpu", seed: int = 0) -> nn.Module:
    """Build the model with fp32 parameters initialised from ``seed``; ``device="meta"`` allocates nothing.

    Raises :class:`ConfigError` for an unknown architecture or setting.
    """
    preload()
    from transformers import AutoModelForCausalLM

    settings = _settings(spec)
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(f"run.model: transformers cannot build this model: {error}") from None
    return model


def preload() -> None:
    """Import what :func:`build` needs, which takes seconds, while the caller waits for something else."""
    with _IMPORTING:
        from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def layout(spec: config.Model) -> FlatLayout:
    """Compute the flat layout of the model without allocating its parameters."""
    return FlatLayout.of_model(build(spec, device="meta"))


def check_size(spec: config.Model, flat_size: int) -> None:
    """Raise :class:`ConfigError` if the model is not as large as the manifest says, before anything is allocated."""
    if (found := layout(spec).size) != flat_size:
        raise ConfigError(
            f"run.model.settings: the model has a flat size of {found:,}, the manifest says {flat_size:,}: do not join"
        )


def initial_parameters(spec: config.Model, seed: int) -> tuple[FlatLayout, Tensor]:
    """Compute the layout and θ before the first round (fp32 ``[layout.size]``, padding zero)."""
    model = build(spec, seed=seed)
    flat_layout = FlatLayout.of_model(model)
    flat = torch.zeros(flat_layout.size)
    with torch.no_grad():
        flat_layout.gather(dict(model.named_parameters()), flat)
    return flat_layout, flat


@torch.no_grad()
def draws_random_numbers(model: nn.Module, tokens: Tensor) -> bool:
    """Return whether a training forward pass on ``tokens`` (int64 ``[sequences, length]``) draws random numbers, as
    dropout does.

    Compares the states of the random number generators before and after, then restores them.
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
    except Exception as error:  # transformers raises exceptions of several libraries
        raise ConfigError(f"run.model.settings: {' '.join(str(error).split())}") from None


@cache
def _known_settings(architecture: str) -> frozenset[str]:
    from transformers import AutoConfig

    return frozenset(AutoConfig.for_model(architecture).to_dict())

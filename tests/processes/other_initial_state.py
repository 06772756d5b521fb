"""Run ``psyche join`` with initial parameters that differ from the launcher's."""

from __future__ import annotations

import sys

import torch

from psyche import config
from psyche.cli import main
from psyche.training import engine_choice

build = engine_choice.build


def build_with_another_seed(spec: config.Model, *, seed: int) -> torch.nn.Module:
    return build(spec, seed=seed + 1)


engine_choice.build = build_with_another_seed  # type: ignore[assignment]
sys.argv[0:1] = ["psyche", "join"]
main()

"""``psyche join`` on a machine whose random numbers are not the launcher's: it starts from other parameters."""

from __future__ import annotations

import sys

import torch

from psyche import config
from psyche.cli import main
from psyche.training import engine_choice

build = engine_choice.build


def build_otherwise(spec: config.Model, *, seed: int) -> torch.nn.Module:
    return build(spec, seed=seed + 1)


engine_choice.build = build_otherwise  # type: ignore[assignment]
sys.argv[0:1] = ["psyche", "join"]
main()

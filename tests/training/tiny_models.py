"""Models small enough to compare to the bit, and a token store in memory."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from psyche import config
from psyche.protocol.assignment import ShardLayout
from psyche.training.engine import Engine
from psyche.training.models import build

LENGTH = 16
VOCABULARY = 260
SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
SPEC = config.Model(settings=SETTINGS)


def tiny(seed: int = 0) -> nn.Module:
    return build(SPEC, seed=seed)


@torch.no_grad()
def away_from_zero(model: nn.Module, least: float) -> nn.Module:
    """Every parameter moved to a magnitude of at least ``least``, keeping its sign."""
    for parameter in model.parameters():
        sign = torch.where(parameter < 0, -1.0, 1.0)
        parameter.add_(sign * least)
    return model


class Sequences:
    """A split of random sequences, by index, as ``TokenStore.train`` is one."""

    def __init__(self, count: int, seed: int = 0) -> None:
        # Skewed, so that there is something to learn.
        draws = np.random.default_rng(seed).geometric(0.02, (count, LENGTH))
        self._tokens = np.minimum(draws, VOCABULARY - 1).astype(np.int64)
        self.layout = ShardLayout(count, count)

    def __len__(self) -> int:
        return len(self._tokens)

    def batch(self, indices: NDArray[np.int64] | range) -> NDArray[np.int64]:
        return self._tokens[np.asarray(indices, np.int64)]


class MemoryStore:
    """A token store without files."""

    def __init__(self, train: int = 64, heldout: int = 8) -> None:
        self.train, self.heldout = Sequences(train), Sequences(heldout, seed=1)


SPLIT = Sequences(64)


def parameters(engine: Engine) -> torch.Tensor:
    """What is trained, as one flat vector."""
    flat = torch.empty(engine.layout.size)
    engine.read(flat)
    return flat


def steps(engine: Engine, count: int, start: int = 0) -> list[float]:
    """The losses of inner steps on four sequences of ``SPLIT`` each."""
    return [engine.step(SPLIT.batch(range(4 * n, 4 * n + 4)), 1e-2) for n in range(start, start + count)]

"""The inner optimizer's state as one flat byte string, which can be hashed and needs no parsing.

Every parameter has one or two moments, and all have taken the same number of steps. Two rows of the flat space and a
step count therefore hold the whole state. Every engine produces the same bytes for the same state, and their length is
known before the first is read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.config import Model, Run
from psyche.numerics.flat import FlatLayout
from psyche.training.engine import Engine
from psyche.training.models import build
from psyche.training.optimizers import hidden_matrices

ROW = {"exp_avg": 0, "momentum_buffer": 0, "exp_avg_sq": 1}
"""The row of each optimizer tensor (``optimizers.py``). The second row is zero for parameters that Muon steps."""
_TAIL = 8
"""Bytes after the rows: the number of steps, little-endian."""
MAX_STEPS = 1 << 24
"""Optimizers count steps in fp32, which is exact up to here."""


def pack_state(engine: Engine) -> memoryview:
    """Pack the engine's optimizer state: ``[2, layout.size]`` fp32, then the steps as u64; only these before step 1.

    Copying happens in torch, which releases the GIL.
    """
    state = engine.state() if engine.steps else {}
    rows = 2 if state else 0
    content = torch.zeros(rows * engine.layout.size * 4 + _TAIL, dtype=torch.uint8)
    flat = content[:-_TAIL].view(torch.float32).view(rows, -1 if rows else 0)
    views = [engine.layout.views(row) for row in flat]
    for key, value in state.items():
        kind, _, name = key.partition("/")
        if kind in ROW:
            views[ROW[kind]][name].copy_(value)
    content[-_TAIL:] = torch.frombuffer(bytearray(engine.steps.to_bytes(_TAIL, "little")), dtype=torch.uint8)
    return content.numpy().data.cast("B")


def packed_state_bytes(layout: FlatLayout) -> int:
    """Return the size in bytes of a packed state after the first step."""
    return 8 * layout.size + _TAIL


class Moments:
    """An unpacked optimizer state that no engine has loaded yet."""

    def __init__(self, flat: Tensor, steps: int) -> None:
        self.flat = flat
        """fp32 ``[2, layout.size]``, or ``[0, layout.size]`` before the first step."""
        self.steps = steps

    @classmethod
    def unpack(cls, data: Buffer, layout: FlatLayout, most: int = MAX_STEPS) -> Moments:
        """Unpack untrusted bytes from :func:`pack_state`.

        Raises ``ValueError`` unless they are a state of this layout after at most ``most`` steps.
        """
        view = memoryview(data).cast("B")
        if view.nbytes not in (_TAIL, packed_state_bytes(layout)):
            raise ValueError(f"optimizer state of {view.nbytes} bytes, expected {packed_state_bytes(layout)}")
        steps = int.from_bytes(view[-_TAIL:], "little")
        if (steps > 0) != (view.nbytes > _TAIL) or steps > min(most, MAX_STEPS):
            raise ValueError(f"optimizer state after {steps} steps, expected at most {most}")
        if not steps:
            return cls(torch.empty(0, layout.size), 0)
        flat = torch.frombuffer(bytearray(view[:-_TAIL]), dtype=torch.float32).view(2, layout.size)
        return cls(flat, steps)

    def state(self, layout: FlatLayout, muon: frozenset[str]) -> dict[str, Tensor]:
        """Views of the state for :meth:`Engine.load_state`; ``muon`` names the parameters that Muon steps."""
        if not self.steps:
            return {}
        first, second = (layout.views(row) for row in self.flat)
        state: dict[str, Tensor] = {}
        for span in layout.spans:
            name = span.name
            if name in muon:
                state[f"momentum_buffer/{name}"] = first[name]
            else:
                state[f"step/{name}"] = torch.tensor(float(self.steps))
                state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"] = first[name], second[name]
        return state


def muon_parameters(run: Run) -> frozenset[str]:
    """Names of the parameters that Muon steps in a run; empty where AdamW steps all of them."""
    return _matrices(run.model) if run.inner.optimizer == "muon" else frozenset()


def _matrices(spec: Model) -> frozenset[str]:
    model = build(spec, device="meta")
    found = {id(matrix) for matrix in hidden_matrices(model)}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in found)

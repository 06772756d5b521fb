"""The inner optimizer's state as one flat tensor: a form that has a hash, and that nothing has to be parsed for.

Every parameter has one moment or two, whichever optimizer steps it, and all have taken as many steps. So two rows of
the flat space and a number hold all of it, on any engine: the same bytes for the same state, their length known before
the first is read.
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
"""Of what the optimizers keep (``optimizers.py``): where. Muon's parameters have zeros in the second row."""
_TAIL = 8
"""Bytes after the rows: the steps behind the state, little-endian."""
MOST_STEPS = 1 << 24
"""Up to which the fp32 number that optimizers count steps with is exact."""


def packed(engine: Engine) -> memoryview:
    """The engine's optimizer state: ``[2, layout.size]`` fp32, then the steps as u64; before the first step those only.

    Copying happens in torch, which lets go of the interpreter.
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


def packed_bytes(layout: FlatLayout) -> int:
    """The most bytes that :func:`packed` gives; fewer only before the first step."""
    return 8 * layout.size + _TAIL


class Moments:
    """A state that was unpacked, not of an engine yet."""

    def __init__(self, flat: Tensor, steps: int) -> None:
        self.flat = flat
        """``[2, layout.size]`` fp32; ``[0, …]`` without steps."""
        self.steps = steps

    @classmethod
    def unpack(cls, data: Buffer, layout: FlatLayout, most: int = MOST_STEPS) -> Moments:
        """Inverse of :func:`packed`, for bytes of anybody. Raises ``ValueError`` on what no engine with this layout has
        after at most ``most`` steps."""
        view = memoryview(data).cast("B")
        if view.nbytes not in (_TAIL, packed_bytes(layout)):
            raise ValueError(f"an optimizer state of {view.nbytes} bytes, where {packed_bytes(layout)} were due")
        steps = int.from_bytes(view[-_TAIL:], "little")
        if (steps > 0) != (view.nbytes > _TAIL) or steps > min(most, MOST_STEPS):
            raise ValueError(f"an optimizer state after {steps} steps, where {most} are the most")
        if not steps:
            return cls(torch.empty(0, layout.size), 0)
        flat = torch.frombuffer(bytearray(view[:-_TAIL]), dtype=torch.float32).view(2, layout.size)
        return cls(flat, steps)

    def state(self, layout: FlatLayout, muon: frozenset[str]) -> dict[str, Tensor]:
        """As :meth:`Engine.load_state` takes it: views. ``muon`` names the parameters that Muon steps."""
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
    """Names of the parameters that Muon steps in a run; none where AdamW steps all."""
    return _matrices(run.model) if run.inner.optimizer == "muon" else frozenset()


def _matrices(spec: Model) -> frozenset[str]:
    model = build(spec, device="meta")
    found = {id(matrix) for matrix in hidden_matrices(model)}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in found)

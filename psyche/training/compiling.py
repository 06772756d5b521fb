"""``torch.compile`` where it pays: measured on this machine with this model, and remembered.

Compiling takes a minute or so at each start, a part of a step is saved each time. Nothing else sees the difference:
what a node computes on its own may differ from what others would, and what all must agree on is not computed here.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile
from typing import Any, Literal

import torch
from torch import nn

WORTH_TRYING = 4 * 3600.0
"""Seconds of training without compiling below which it is not even tried: it costs about a minute to know, in
which the others go on with the next round."""
REPEATS = 5

Forward = Callable[..., Any]
Passes = Callable[[Forward, int], Callable[[], None]]
"""From a forward pass and a number of sequences to one that also goes backward, and ends when the device has."""


@dataclass(frozen=True)
class Prospect:
    """What decides."""

    wanted: Literal["auto", "on", "off"]
    rows: int
    """Sequences of a pass."""
    passes: int
    """Forward and backward passes that are still to come."""
    shape: str
    """All that the speeds depend on."""
    memory: Path
    """Directory where they are remembered."""


@dataclass(frozen=True)
class Measured:
    """Seconds: a pass as it is, a pass compiled, and the first one, which compiles. ``fault``: why it cannot."""

    eager: float
    compiled: float
    compiling: float
    fault: str = ""

    def pays(self, passes: int) -> bool:
        """Whether ``passes`` of them save more than compiling takes."""
        return not self.fault and (self.eager - self.compiled) * passes > self.compiling


def compiled_if_it_pays(
    model: nn.Module, through: Passes, prospect: Prospect, say: Callable[[str], None]
) -> Forward | None:
    """The compiled model, or None. Raises nothing: what cannot be compiled is trained as it is.

    ``say`` is told before it takes long, and what came of it; nothing where it is not worth a try.
    """
    try:
        return _compiled_if_it_pays(model, through, prospect, say)
    except torch.OutOfMemoryError:  # today: it is not remembered
        say("the model is not compiled: memory ran out while its speed was measured")
        return None


def _compiled_if_it_pays(
    model: nn.Module, through: Passes, prospect: Prospect, say: Callable[[str], None]
) -> Forward | None:
    """The same, and raises ``torch.OutOfMemoryError``."""
    path = prospect.memory / f"{sha256(prospect.shape.encode()).hexdigest()[:32]}.json"
    known = _remembered(path)
    if prospect.wanted == "off" or (prospect.wanted == "auto" and known is None and _short(model, through, prospect)):
        return None
    compiled: Forward = torch.compile(model, dynamic=False)
    if known is None:
        say("compiling the model to see whether that pays; it takes about a minute, and is remembered")
        known = _measure(through(model, prospect.rows), through(compiled, prospect.rows))
        _remember(path, known)
    if known.fault:
        say(f"the model is not compiled: {known.fault}")
        return None
    taken = prospect.wanted == "on" or known.pays(prospect.passes)
    gain = f"a pass takes {known.compiled:.3g} s compiled and {known.eager:.3g} s as it is"
    say(f"the model is {'compiled' if taken else 'not compiled'}: {gain}")
    return compiled if taken else None


def _short(model: nn.Module, through: Passes, prospect: Prospect) -> bool:
    return _seconds(through(model, 1), repeats=1) * prospect.rows * prospect.passes < WORTH_TRYING


def _remembered(path: Path) -> Measured | None:
    try:
        return Measured(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _remember(path: Path, known: Measured) -> None:
    """Several nodes of a machine may do so at once, and a disk may not take it: then it is measured again."""
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(json.dumps(asdict(known)).encode())
        os.replace(file.name, path)


def _measure(eager: Callable[[], None], compiled: Callable[[], None]) -> Measured:
    began = time.perf_counter()
    try:
        compiled()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Dynamo, Inductor, Triton and the C++ compiler have each their own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return Measured(0.0, 0.0, 0.0, reason)
    compiling = time.perf_counter() - began
    return Measured(_seconds(eager), _seconds(compiled), compiling)


def _seconds(once: Callable[[], None], repeats: int = REPEATS) -> float:
    """Of a pass, the median of some after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        once()
        taken.append(time.perf_counter() - began)
    return median(taken[1:])

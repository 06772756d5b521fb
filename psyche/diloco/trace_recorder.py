"""What a replica notes of its own rounds, so that others can do them again: trace points, error feedback, θ's roots.

Runs without audits, and nodes that train on text of their own, pay for none of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from psyche.config import Run
from psyche.diloco.audit_bundle import AuditBundle, AuditBundles, Base
from psyche.diloco.trace import Trace, Withheld
from psyche.numerics.digest import BlobIndex, blob_root
from psyche.numerics.outer import OuterState
from psyche.protocol.messages import WITHHELD
from psyche.training.engine import Engine
from psyche.training.optimizer_state import pack_state


class TraceRecorder:
    """Of one replica."""

    def __init__(self, run: Run, engine: Engine) -> None:
        self._audits, self._engine = run.audits, engine
        self.bundles: AuditBundles | None = None
        """Where what others need to check this node is kept; None: the roots are all that is left of it."""
        self.bases: dict[int, Base] = {}
        """After so many rounds, of the last ``audits.window`` and of now: what an audited round of this node's peers
        was to be trained from."""

    def stands(self, rounds: int, host: OuterState, index: BlobIndex) -> None:
        """The outer state after ``rounds``, and its chunk hashes."""
        if self._audits.rate:
            self.bases[rounds] = Base.of(index, host.buffer)
            oldest = rounds - self._audits.window
            self.bases = {at: base for at, base in self.bases.items() if oldest <= at <= rounds}

    def begin(self, round_number: int, trace: Trace, late: int, theta: Tensor) -> None:
        """The inner steps of ``round`` that are not late begin, after ``late`` of them; ``trace`` is the round's, and
        ``theta`` its θ on the CPU."""
        if not self._audited(trace):
            return
        trace.keep = blob_root
        if self.bundles is not None:
            self.bundles.begin(round_number)
            trace.keep = partial(self.bundles.keep, round_number)
            trace.keep(theta.numpy().data)
        self.mark(trace, late)

    def pass_by(self, trace: Trace, step: int) -> None:
        """Inner step ``step`` is next: a trace point, if the run wants one there."""
        every = self._audits.trace_steps
        if every is not None and step % every == 0:
            self.mark(trace, step)

    def mark(self, trace: Trace, step: int) -> None:
        """A trace point after ``step`` inner steps of the round, unless there is one."""
        if self._audited(trace) and (not trace.points or trace.points[-1].step < step):
            local = torch.empty(self._engine.layout.size)  # a new one: the last may still be on its way to the disk
            self._engine.read(local)
            trace.mark(step, local.numpy().data, pack_state(self._engine))

    def residual(self, trace: Trace, residual: Tensor | None, parts: Sequence[slice]) -> bytes:
        """Root of the error feedback in what a round exchanges."""
        if residual is None or not self._audited(trace):
            return WITHHELD
        return trace.keep(torch.cat([residual[part] for part in parts]).cpu().numpy().data)

    def finish(self, round_number: int, trace: Trace) -> None:
        """All that others need is kept."""
        if self.bundles is not None and self._audited(trace):
            self.bundles.finish(round_number, AuditBundle(tuple(trace.points)))

    def _audited(self, trace: Trace) -> bool:
        return bool(self._audits.rate) and not isinstance(trace, Withheld)

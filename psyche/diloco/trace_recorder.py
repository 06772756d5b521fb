"""Record the trace of a replica's rounds, so that others can replay them.

Runs without audits and nodes that train on private data pay nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from psyche.config import Run
from psyche.diloco.audit_bundle import AuditBundle, AuditBundleStore, ThetaProof
from psyche.diloco.trace import PrivateTrace, Trace
from psyche.numerics.digest import BlobIndex, blob_root
from psyche.numerics.outer import OuterState
from psyche.protocol.messages import WITHHELD
from psyche.training.engine import Engine
from psyche.training.optimizer_state import pack_state


class TraceRecorder:
    """Records trace points, error feedback and proofs of θ of one replica."""

    def __init__(self, run: Run, engine: Engine) -> None:
        self._audits, self._engine = run.audits, engine
        self.bundles: AuditBundleStore | None = None
        """Where the blobs that auditors need are stored; None: blobs are hashed and not kept."""
        self.theta_proofs: dict[int, ThetaProof] = {}
        """Proofs of θ by rounds completed, for the last ``audits.window``: the base states of audited rounds."""

    def record_state(self, rounds: int, host: OuterState, index: BlobIndex) -> None:
        """Keep the proof of θ in the outer state after ``rounds``, whose chunk hashes are ``index``."""
        if self._audits.rate:
            self.theta_proofs[rounds] = ThetaProof.of(index, host.buffer)
            oldest = rounds - self._audits.window
            self.theta_proofs = {at: proof for at, proof in self.theta_proofs.items() if oldest <= at <= rounds}

    def begin(self, round_number: int, trace: Trace, overlap_steps: int, theta: Tensor) -> None:
        """Start the round's trace after its ``overlap_steps``. ``theta`` is the round's θ on the CPU."""
        if not self._audited(trace):
            return
        trace.store_blob = blob_root
        if self.bundles is not None:
            self.bundles.begin(round_number)
            trace.store_blob = partial(self.bundles.store, round_number)
            trace.store_blob(theta.numpy().data)
        self.record_point(trace, overlap_steps)

    def before_step(self, trace: Trace, step: int) -> None:
        """Record a trace point before inner step ``step`` if the run wants one there."""
        every = self._audits.trace_steps
        if every is not None and step % every == 0:
            self.record_point(trace, step)

    def record_point(self, trace: Trace, step: int) -> None:
        """Record the trace point after ``step`` inner steps of the round, unless it is recorded already."""
        if self._audited(trace) and (not trace.points or trace.points[-1].step < step):
            local = torch.empty(self._engine.layout.size)  # a new one: the last may not be on disk yet
            self._engine.read(local)
            trace.record_point(step, local.numpy().data, pack_state(self._engine))

    def residual(self, trace: Trace, residual: Tensor | None, parts: Sequence[slice]) -> bytes:
        """Return the root of the error feedback in ``parts``, which the round exchanges."""
        if residual is None or not self._audited(trace):
            return WITHHELD
        return trace.store_blob(torch.cat([residual[part] for part in parts]).cpu().numpy().data)

    def finish(self, round_number: int, trace: Trace) -> None:
        """Complete the round's audit bundle."""
        if self.bundles is not None and self._audited(trace):
            self.bundles.finish(round_number, AuditBundle(tuple(trace.points)))

    def _audited(self, trace: Trace) -> bool:
        return bool(self._audits.rate) and not isinstance(trace, PrivateTrace)

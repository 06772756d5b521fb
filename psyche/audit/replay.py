"""Replay a contribution and measure how far the replay is from what the node claims. Blobs are passed in: no network.

Exact checks come first. The trace points, θ, the data, the payload and the error feedback must agree with the
commitments bit for bit on any hardware; a mismatch makes the finding ``false``. Then every segment between two trace
points is trained again from the state that the node claims for its start, and the displacements are compared.

Not covered in runs with ``overlap``: overlap steps are part of the data digest but are not replayed, because no trace
point names the parameters that they start from. A round that consists of overlap steps has nothing to replay. If a
round does not start from θ (overlap steps, or several fragments), nothing ties its first trace point to earlier rounds.
The optimizer state at the first trace point is never tied to the round before; ``replay_error.py`` bounds what a
crafted one gains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.audit.probes import Probe, draw_probes
from psyche.audit.replay_error import (
    NEGLIGIBLE_ERROR,
    drift_without_gradients,
    millionths,
    relative_error,
    tolerant_error,
)
from psyche.config import Run
from psyche.data.token_store import Split
from psyche.diloco.audit_bundle import BlobUnavailable
from psyche.diloco.trace import Trace, TracePoint, trace_point_steps, trace_root
from psyche.numerics.backends.base import Backend
from psyche.numerics.codecs.base import Codec, NonFinite
from psyche.numerics.digest import blob_root, digest, payload_root
from psyche.protocol.assignment import permute
from psyche.protocol.audit_messages import MOST, Finding
from psyche.protocol.messages import WITHHELD, Contribution, Plan
from psyche.training.engine import Batch, Engine
from psyche.training.optimizer_state import Moments, packed_state_bytes
from psyche.training.schedules import learning_rate
from psyche.training.torch_engine import TorchEngine

GAIN_SEQUENCES = 8
"""Held-out sequences that a contribution's gain is measured on: enough to tell harm from benefit in the median of
several auditors, and a fraction of the work of one inner step."""

Blobs = Callable[[bytes, int], Buffer]
"""Returns the blob of a root, verified, of at most so many bytes. Raises :class:`BlobUnavailable`."""


class ReplayStopped(Exception):
    """The replay was stopped before its end."""


class MismatchCode(StrEnum):
    """The part of the work that does not match the commitments."""

    TRACE_ROOT = "trace-root"
    TOO_MANY_STEPS = "too-many-steps"
    TRACE_STEPS = "trace-steps"
    BASE_PARAMETERS = "base-parameters"
    DATA = "data"
    NOT_FINITE = "not-finite"
    PAYLOAD = "payload"
    RESIDUAL_IN = "residual-in"
    RESIDUAL_OUT = "residual-out"
    VECTOR_SIZE = "vector-size"
    OPTIMIZER = "optimizer"


class Mismatch(Exception):
    """Something that must agree bit for bit does not."""

    def __init__(self, code: MismatchCode) -> None:
        super().__init__(code.value)
        self.code = code


@dataclass(frozen=True)
class ClaimedWork:
    """A contribution, and what an auditor knows that it must follow from."""

    plan: Plan
    node: str
    contribution: Contribution
    points: tuple[TracePoint, ...]
    """The trace points in the node's audit bundle."""
    theta_root: bytes
    """Root of θ before the round, as a blob of its own."""
    seed: bytes
    """Draws the held-out sequences for the gain, the same for all contributions of a round. It must be unknown until
    commitments close, or a node could train on those sequences."""
    allowed_residuals: frozenset[bytes] | None = None
    """Roots that the node's error feedback may have had before the round, from ``residual_out`` of earlier rounds;
    zeros are always allowed. None: the records do not determine it, because a contribution of the node was excluded."""


@dataclass(frozen=True)
class ReplayContext:
    """The engine, codec and data that a replay uses."""

    run: Run
    engine: TorchEngine
    backend: Backend
    parts: tuple[slice, ...]
    """The parameter ranges that the round exchanges."""
    batch: Callable[[int], Batch]
    """Returns the audited node's batch for an inner step that is not an overlap step. Raises ``BadShard``."""
    overlap_batch: Callable[[int], Batch] | None
    """Returns its batch for an overlap step; None if the plan of the round before is unknown."""
    heldout: Split
    by_muon: frozenset[str]
    """Names of the parameters that Muon updates."""
    stop: Callable[[], bool] = lambda: False
    """Polled before every inner step: whether to stop the replay."""
    measure_noise: bool = False
    """Replay every segment in both precisions, even where the error is negligible."""


def replay(context: ReplayContext, claim: ClaimedWork, blobs: Blobs) -> Finding:
    """Replay a contribution and return the finding. The engine's own state is restored afterwards.

    Raises ``BadShard`` if the data is not here, and :class:`ReplayStopped`.
    """
    try:
        theta, payload = verify_exact(context, claim, blobs)
        probes = draw_probes(digest("looked at", claim.seed, claim.node.encode()), claim.points, context.engine.layout)
        with preserved_state(context.engine):
            segments = [
                replay_segment(context, claim, number, blobs, probes.get(number))
                for number in range(len(claim.points) - 1)
            ]
            gain = _heldout_gain(context, claim, theta, payload)
    except BlobUnavailable:
        return Finding("unserved", 0, 0, 0)
    except Mismatch:
        return Finding("false", MOST, 0, 0)
    worst = max(range(len(segments)), key=lambda number: segments[number].error, default=0)
    error = max((one.error for one in segments), default=0.0)
    noise = max((one.noise for one in segments), default=0.0)
    sketch = tuple(number for one in segments for number in one.sketch)
    return Finding("measured", millionths(error), worst, gain, millionths(noise), sketch)


def required_blobs(engine: Engine, claim: ClaimedWork) -> dict[bytes, int]:
    """Return the roots of the blobs that a replay reads, with the maximum size of each in bytes."""
    vector = 4 * engine.layout.size
    roots = {claim.theta_root: vector, claim.points[-1].parameters: vector}
    for point in claim.points[:-1]:
        roots |= {point.parameters: vector, point.optimizer: packed_state_bytes(engine.layout)}
    if claim.contribution.residual_in not in (WITHHELD, blob_root(bytes(vector))):
        roots[claim.contribution.residual_in] = vector
    return roots


@contextmanager
def preserved_state(engine: Engine) -> Iterator[None]:
    """Save the engine's parameters and optimizer state, and restore them bit for bit when the block ends."""
    flat = torch.empty(engine.layout.size)
    engine.read(flat)
    state = {name: value.clone() for name, value in engine.state().items()}
    try:
        yield
    finally:
        engine.write(flat)
        engine.load_state(state)


# ------------------------------------------------------------------------------- exact checks


def verify_exact(context: ReplayContext, claim: ClaimedWork, blobs: Blobs) -> tuple[Tensor, list[bytes]]:
    """Check everything that must agree bit for bit, and return θ and the payload.

    Raises :class:`Mismatch`, :class:`BlobUnavailable` and ``BadShard``.
    """
    _check_trace(context, claim)
    size = context.engine.layout.size
    theta, end = (_vector(blobs, root, size) for root in (claim.theta_root, claim.points[-1].parameters))
    return theta, _recompute_payload(context, claim, theta, end, blobs)


def _check_trace(context: ReplayContext, claim: ClaimedWork) -> None:
    run, contribution, points = context.run, claim.contribution, claim.points
    overlap_steps = contribution.overlap_steps
    if trace_root(points) != contribution.trace_root:
        raise Mismatch(MismatchCode.TRACE_ROOT)
    member = claim.plan.member(claim.node)
    if member is None or not overlap_steps <= contribution.inner_steps <= max(member.inner_steps, overlap_steps):
        raise Mismatch(MismatchCode.TOO_MANY_STEPS)
    expected = trace_point_steps(overlap_steps, contribution.inner_steps, run.audits.trace_steps)
    if [point.step for point in points] != expected:
        raise Mismatch(MismatchCode.TRACE_STEPS)
    if run.overlap.fragments == 1 and not overlap_steps and points[0].parameters != claim.theta_root:
        raise Mismatch(MismatchCode.BASE_PARAMETERS)
    if overlap_steps and context.overlap_batch is None:
        return
    trace = Trace()
    for step in range(contribution.inner_steps):
        trace.record_batch(_batch(context, claim, step))
    if trace.data_digest != contribution.data_digest:
        raise Mismatch(MismatchCode.DATA)


def _batch(context: ReplayContext, claim: ClaimedWork, step: int) -> Batch:
    """Return the batch assigned to the audited node for inner step ``step`` of the round."""
    if step >= claim.contribution.overlap_steps:
        return context.batch(step)
    assert context.overlap_batch is not None
    return context.overlap_batch(step)


def _recompute_payload(
    context: ReplayContext, claim: ClaimedWork, theta: Tensor, end: Tensor, blobs: Blobs
) -> list[bytes]:
    """Encode the payload again, which θ, the parameters at the round's end and the error feedback determine."""
    contribution, device = claim.contribution, context.backend.device
    codec = context.backend.codec(context.run.codec.name)
    feedback = _residual(context, claim, codec, blobs)
    payload, at = [], 0
    for part in context.parts:
        size = part.stop - part.start
        residual = None if feedback is None else feedback[at : at + size].to(device)
        try:
            encoded = codec.encode(
                theta[part].to(device), end[part].to(device), residual, context.run.codec.error_feedback
            )
        except NonFinite:
            raise Mismatch(MismatchCode.NOT_FINITE) from None
        payload.append(encoded)
        if feedback is not None and residual is not None:
            feedback[at : at + size].copy_(residual)
        at += size
    if payload_root(payload) != contribution.payload_root:
        raise Mismatch(MismatchCode.PAYLOAD)
    if feedback is not None and blob_root(feedback.numpy().data) != contribution.residual_out:
        raise Mismatch(MismatchCode.RESIDUAL_OUT)
    return payload


def _residual(context: ReplayContext, claim: ClaimedWork, codec: Codec, blobs: Blobs) -> Tensor | None:
    """Return a copy of the node's error feedback before encoding, for the ranges that the round exchanges."""
    if not codec.error_feedback:
        return None
    size = sum(part.stop - part.start for part in context.parts)
    zeros, root = torch.zeros(size), claim.contribution.residual_in
    if root == blob_root(zeros.numpy().data):
        return zeros
    if claim.allowed_residuals is not None and root not in claim.allowed_residuals:
        raise Mismatch(MismatchCode.RESIDUAL_IN)
    return _vector(blobs, root, size)


def _vector(blobs: Blobs, root: bytes, size: int) -> Tensor:
    """Return a copy of a blob of ``size`` fp32 numbers, ``[size]`` on the CPU."""
    content = bytearray(blobs(root, 4 * size))
    if len(content) != 4 * size:
        raise Mismatch(MismatchCode.VECTOR_SIZE)
    return torch.frombuffer(content, dtype=torch.float32)


# -------------------------------------------------------------------------- replay of segments


@dataclass(frozen=True)
class SegmentReplay:
    """The result of replaying one segment."""

    error: float
    """‖d − d'‖ / ‖d'‖: d is the displacement that the node claims, d' that of the replay from the same state on the
    same batches. Infinite if anything is not finite."""
    noise: float
    """The relative difference between this engine's two precisions; infinite if it was not measured."""
    sketch: tuple[int, ...] = ()
    """The probe's measurement (``audit/probes.py``), if the segment has one."""


def replay_segment(
    context: ReplayContext, claim: ClaimedWork, number: int, blobs: Blobs, probe: Probe | None = None
) -> SegmentReplay:
    """Train segment ``number`` again, from that trace point to the next, and compare.

    If the error is not negligible, repeat in the other precision (:func:`tolerant_error`). The engine is left at the
    segment's end. Raises as :func:`verify_exact`, and :class:`ReplayStopped`.
    """
    layout = context.engine.layout
    start, stop = claim.points[number], claim.points[number + 1]
    before, after = (_vector(blobs, point.parameters, layout.size) for point in (start, stop))
    moments = _moments(context, blobs, start.optimizer)
    if not all(bool(torch.isfinite(one).all()) for one in (before, after, moments.flat)):
        return SegmentReplay(float("inf"), float("inf"))
    steps = range(start.step, stop.step)
    found, lrs, sketch = _train(context, claim, steps, before, moments, probe)
    drift = drift_without_gradients(layout, context.run.inner, context.by_muon, before, moments, lrs)
    error = relative_error(before, after, found, drift)
    if error <= NEGLIGIBLE_ERROR and not context.measure_noise:
        return SegmentReplay(error, float("inf"), sketch)
    with context.engine.other_precision():
        other, _, _ = _train(context, claim, steps, before, moments)
    noise = relative_error(before, other, found, drift)
    if error > NEGLIGIBLE_ERROR:
        error = tolerant_error(before, after, found, other, drift)
    return SegmentReplay(error, noise, sketch)


def _train(
    context: ReplayContext,
    claim: ClaimedWork,
    steps: range,
    before: Tensor,
    moments: Moments,
    probe: Probe | None = None,
) -> tuple[Tensor, list[float], tuple[int, ...]]:
    """Take ``steps`` of the round from ``before``. Return the parameters, learning rates and probe measurement."""
    engine, run = context.engine, context.run
    engine.write(before)
    engine.load_state(moments.state(engine.layout, context.by_muon))
    first, lrs, found = (claim.plan.round - 1) * run.rounds.inner_steps, [], torch.empty_like(before)
    sketch: tuple[int, ...] = ()
    for step in steps:
        if context.stop():
            raise ReplayStopped
        lrs.append(learning_rate(run.inner, first + step, run.total_steps, engine.steps))
        engine.step(_batch(context, claim, step), lrs[-1])
        if probe is not None and step == probe.step:
            engine.read(found)
            sketch = probe.measure(before, found)
    engine.read(found)
    return found, lrs, sketch


def _moments(context: ReplayContext, blobs: Blobs, root: bytes) -> Moments:
    run, layout = context.run, context.engine.layout
    max_steps = run.total_steps + run.rounds.inner_steps  # a newcomer's warm-up takes up to one round more
    try:
        return Moments.unpack(blobs(root, packed_state_bytes(layout)), layout, max_steps)
    except ValueError:
        raise Mismatch(MismatchCode.OPTIMIZER) from None


def _heldout_gain(context: ReplayContext, claim: ClaimedWork, theta: Tensor, payload: Sequence[bytes]) -> int:
    """Return by how much an outer step of this contribution alone lowers the held-out loss, in 10⁻⁶ nats a token."""
    codec, change = context.backend.codec(context.run.codec.name), torch.zeros_like(theta)
    for part, encoded in zip(context.parts, payload, strict=True):
        out = torch.zeros(part.stop - part.start, device=context.backend.device)
        codec.decode_add(encoded, 1.0, out)
        change[part] = out.cpu()
    key, count = digest("gain", claim.seed), len(context.heldout)
    drawn = permute(np.arange(min(GAIN_SEQUENCES, count), dtype=np.uint64), count, key)
    without, with_it = (_heldout_loss(context, flat, drawn) for flat in (theta, theta - context.run.outer.lr * change))
    gain = (without - with_it) * 1e6
    return round(max(-MOST, min(MOST, gain))) if isfinite(gain) else -MOST


def _heldout_loss(context: ReplayContext, flat: Tensor, sequences: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    """Return the loss of parameters ``flat`` on held-out ``sequences``, in nats a token."""
    context.engine.write(flat)
    size, total, tokens = context.run.inner.batch_size, 0.0, 0
    for at in range(0, len(sequences), size):
        loss, predicted = context.engine.evaluate(context.heldout.batch(sequences[at : at + size]))
        total, tokens = total + loss, tokens + predicted
    return total / tokens

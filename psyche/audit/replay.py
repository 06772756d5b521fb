"""Do a contribution's work again and say how far apart the two are (DESIGN §8). Knows no network: blobs are handed in.

Exact first: what has to agree to the bit on any hardware (points against the commitment, θ, data, payload and error
feedback) makes a contribution ``false`` where it does not. Then every segment between two trace points is trained
again from the state that the node says it was in, and the displacements are compared.

What a run with ``overlap`` leaves uncovered: late steps are part of the data digest, but not replayed (they were taken
from parameters that no trace point names), so a round that is all late steps has nothing to replay; and where a round
does not start from θ, because of late steps or because fragments are exchanged in turn, nothing ties its first point
to the rounds before. Nor is the optimizer at the first point tied to the round before: ``coasting.py`` says why that
gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.audit.probes import Glimpse, glimpses
from psyche.audit.replay_error import coasted
from psyche.config import Run
from psyche.data.store import Split
from psyche.diloco.audit_bundle import Unserved
from psyche.diloco.trace import Point, Trace, point_steps, trace_root
from psyche.numerics.backends.base import Backend
from psyche.numerics.codecs.base import Codec, NonFinite
from psyche.numerics.digest import blob_root, digest, payload_root
from psyche.protocol.assignment import permute
from psyche.protocol.messages import WITHHELD, Contribution, Plan
from psyche.protocol.verdicts import MOST, Finding
from psyche.training.engine import Batch, Engine
from psyche.training.optimizer_state import Moments, packed_state_bytes
from psyche.training.schedules import learning_rate
from psyche.training.torch_engine import TorchEngine

CLEAR = 0.01
"""A relative error up to which nobody needs to look closer."""
USUAL = 0.02
"""Relative difference between fp32 and bf16 that an error is not measured by: about the most where training is calm."""
MOST_NOISE = 0.4
"""The most that an error is measured by."""
GAIN_SEQUENCES = 8
"""Held-out sequences that a contribution's gain is measured on: enough to tell harm from use in the median of some
auditors, and a fraction of one inner step's work."""

Blobs = Callable[[bytes, int], Buffer]
"""The blob of a root, checked, of at most so many bytes. Raises :class:`Unserved`."""


class Stopped(Exception):
    """An audit was given up before its end."""


class Contradiction(Exception):
    """Something that has to agree to the bit does not. The message says what."""


@dataclass(frozen=True)
class Claim:
    """A contribution, and what an auditor knows that it has to follow from."""

    plan: Plan
    node: str
    given: Contribution
    points: tuple[Point, ...]
    """Of the node's kit."""
    theta_root: bytes
    """Of the outer parameters before the round: a blob of θ alone."""
    seed: bytes
    """What draws the held-out sequences that the gain is measured on, the same for all contributions of a round. It has
    to be unknown until commitments are closed: who knows them could train on them."""
    residuals: frozenset[bytes] | None = None
    """What the node's error feedback may have been before the round, as far as records say: what it was after earlier
    ones. Nothing (zeros) is always possible. None: they say nothing, because work of this node was not accepted."""


@dataclass(frozen=True)
class ReplayContext:
    """What an audit is done with."""

    run: Run
    engine: TorchEngine
    backend: Backend
    parts: tuple[slice, ...]
    """What the round exchanges."""
    batch: Callable[[int], Batch]
    """The audited node's sequences in an inner step of the round that is not late. Raises ``BadShard``."""
    late_batch: Callable[[int], Batch] | None
    """The same for late ones; None where nobody knows."""
    heldout: Split
    by_muon: frozenset[str]
    """Names of the parameters that Muon steps."""
    stop: Callable[[], bool] = lambda: False
    """Whether the audit is to be given up; asked before every inner step."""
    thorough: bool = False
    """Measure noise where nothing is wrong, too."""


def replay(replay_context: ReplayContext, claim: Claim, blobs: Blobs) -> Finding:
    """What an auditor has to say. The engine is used, and afterwards is what it was.

    Raises ``BadShard`` where the text is not here, and :class:`Stopped`.
    """
    try:
        theta, payload = agreement(replay_context, claim, blobs)
        shown = glimpses(
            digest("looked at", claim.seed, claim.node.encode()), claim.points, replay_context.engine.layout
        )
        with undisturbed(replay_context.engine):
            found = [
                segment(replay_context, claim, number, blobs, shown.get(number))
                for number in range(len(claim.points) - 1)
            ]
            gain = _gain(replay_context, claim, theta, payload)
    except Unserved:
        return Finding("unserved", 0, 0, 0)
    except Contradiction:
        return Finding("false", MOST, 0, 0)
    worst = max(range(len(found)), key=lambda number: found[number].error, default=0)
    error, noise = (max((getattr(one, name) for one in found), default=0.0) for name in ("error", "noise"))
    sketch = tuple(number for one in found for number in one.sketch)
    return Finding("measured", millionths(error), worst, gain, millionths(noise), sketch)


def needed(engine: Engine, claim: Claim) -> dict[bytes, int]:
    """Roots of the blobs that a replay asks for, and the most bytes each may have."""
    vector = 4 * engine.layout.size
    roots = {claim.theta_root: vector, _end(claim): vector}
    for point in claim.points[:-1]:
        roots |= {point.parameters: vector, point.optimizer: packed_state_bytes(engine.layout)}
    if claim.given.residual_in not in (WITHHELD, blob_root(bytes(vector))):
        roots[claim.given.residual_in] = vector
    return roots


@contextmanager
def undisturbed(engine: Engine) -> Iterator[None]:
    """Within, the engine may train anything; afterwards parameters and optimizer are what they were, to the bit."""
    flat = torch.empty(engine.layout.size)
    engine.read(flat)
    state = {name: value.clone() for name, value in engine.state().items()}
    try:
        yield
    finally:
        engine.write(flat)
        engine.load_state(state)


def millionths(error: float) -> int:
    """A relative error as a :class:`Finding` has it."""
    return min(MOST, round(error * 1e6)) if isfinite(error) else MOST


# ----------------------------------------------------------------------------- to the bit


def agreement(replay_context: ReplayContext, claim: Claim, blobs: Blobs) -> tuple[Tensor, list[bytes]]:
    """θ and the payload, where all that has to agree to the bit does. Raises :class:`Contradiction`, ``Unserved`` and
    ``BadShard``."""
    _check_trace(replay_context, claim)
    theta, end = (_vector(blobs, root, replay_context.engine.layout.size) for root in (claim.theta_root, _end(claim)))
    return theta, _encoded_again(replay_context, claim, theta, end, blobs)


def _check_trace(replay_context: ReplayContext, claim: Claim) -> None:
    given, points = claim.given, claim.points
    if trace_root(points) != given.trace_root:
        raise Contradiction("the trace points are not those committed to")
    member = claim.plan.member(claim.node)
    if member is None or not given.overlap_steps <= given.inner_steps <= max(member.inner_steps, given.overlap_steps):
        raise Contradiction("more steps than were due")
    expected = point_steps(given.overlap_steps, given.inner_steps, replay_context.run.audits.trace_steps)
    if [point.step for point in points] != expected:
        raise Contradiction("trace points at other steps than the run asks for")
    if (
        replay_context.run.overlap.fragments == 1
        and not given.overlap_steps
        and points[0].parameters != claim.theta_root
    ):
        raise Contradiction("trained from other parameters than the run's")
    if given.overlap_steps and replay_context.late_batch is None:
        return
    trace = Trace()
    for step in range(given.inner_steps):
        trace.saw(batch_of(replay_context, claim, step))
    if trace.data_digest != given.data_digest:
        raise Contradiction("trained on other data than assigned")


def batch_of(replay_context: ReplayContext, claim: Claim, step: int) -> Batch:
    """What the node was to train on in inner step ``step`` of the round."""
    if step >= claim.given.overlap_steps:
        return replay_context.batch(step)
    assert replay_context.late_batch is not None
    return replay_context.late_batch(step)


def _encoded_again(
    replay_context: ReplayContext, claim: Claim, theta: Tensor, end: Tensor, blobs: Blobs
) -> list[bytes]:
    """The payload, which the parameters at the end of the round and the error feedback before it determine."""
    codec, device, given = (
        replay_context.backend.codec(replay_context.run.codec.name),
        replay_context.backend.device,
        claim.given,
    )
    kept = _residual(replay_context, claim, codec, blobs)
    payload, at = [], 0
    for part in replay_context.parts:
        size = part.stop - part.start
        residual = None if kept is None else kept[at : at + size].to(device)
        try:
            encoded = codec.encode(
                theta[part].to(device), end[part].to(device), residual, replay_context.run.codec.error_feedback
            )
        except NonFinite:
            raise Contradiction("parameters or error feedback are not finite") from None
        payload.append(encoded)
        if kept is not None and residual is not None:
            kept[at : at + size].copy_(residual)
        at += size
    if payload_root(payload) != given.payload_root:
        raise Contradiction("the payload is not what follows from the parameters")
    if kept is not None and blob_root(kept.numpy().data) != given.residual_out:
        raise Contradiction("the error feedback afterwards is not what follows")
    return payload


def _residual(replay_context: ReplayContext, claim: Claim, codec: Codec, blobs: Blobs) -> Tensor | None:
    """The node's error feedback before it encoded, of what the round exchanges; a copy."""
    if not codec.error_feedback:
        return None
    size = sum(part.stop - part.start for part in replay_context.parts)
    nothing, root = torch.zeros(size), claim.given.residual_in
    if root == blob_root(nothing.numpy().data):
        return nothing
    if claim.residuals is not None and root not in claim.residuals:
        raise Contradiction("the error feedback is not what it was after earlier rounds")
    return _vector(blobs, root, size)


def _vector(blobs: Blobs, root: bytes, size: int) -> Tensor:
    """A blob of ``size`` fp32 numbers, ``[size]`` on the CPU; a copy."""
    content = bytearray(blobs(root, 4 * size))
    if len(content) != 4 * size:
        raise Contradiction("a blob that is no vector of this model")
    return torch.frombuffer(content, dtype=torch.float32)


def _end(claim: Claim) -> bytes:
    return claim.points[-1].parameters


# ------------------------------------------------------------------------------- to within noise


@dataclass(frozen=True)
class Segment:
    """What a segment's replay says."""

    error: float
    """‖d − d'‖ / ‖d'‖, d the displacement that the node claims and d' that of this engine from the same state on the
    same batches. Infinite where anything is not finite."""
    noise: float
    """The same between two precisions of this engine; infinite where that was not looked at."""
    sketch: tuple[int, ...] = ()


def segment(
    replay_context: ReplayContext, claim: Claim, number: int, blobs: Blobs, glimpse: Glimpse | None = None
) -> Segment:
    """Train segment ``number`` again, between the points of that number and the next.

    Where the error is not clear, it is done once more in the other precision: see :func:`tolerant_error`. The engine is
    left at the end. Raises as :func:`agreement`, and :class:`Stopped`.
    """
    start, stop = claim.points[number], claim.points[number + 1]
    before, after = (_vector(blobs, point.parameters, replay_context.engine.layout.size) for point in (start, stop))
    moments = _moments(replay_context, blobs, start.optimizer)
    if not all(bool(torch.isfinite(one).all()) for one in (before, after, moments.flat)):
        return Segment(float("inf"), float("inf"))
    steps = range(start.step, stop.step)
    found, lrs, sketch = _trained(replay_context, claim, steps, before, moments, glimpse)
    drift = coasted(
        replay_context.engine.layout, replay_context.run.inner, replay_context.by_muon, before, moments, lrs
    )
    error = relative_error(before, after, found, drift)
    if error <= CLEAR and not replay_context.thorough:
        return Segment(error, float("inf"), sketch)
    with replay_context.engine.other_precision():
        other, _, _ = _trained(replay_context, claim, steps, before, moments)
    noise = relative_error(before, other, found, drift)
    if error > CLEAR:
        error = tolerant_error(before, after, found, other, drift)
    return Segment(error, noise, sketch)


def _trained(
    replay_context: ReplayContext,
    claim: Claim,
    steps: range,
    before: Tensor,
    moments: Moments,
    glimpse: Glimpse | None = None,
) -> tuple[Tensor, list[float], tuple[int, ...]]:
    """Parameters after ``steps`` of the round from ``before``, the learning rates, and what ``glimpse`` shows."""
    engine, run = replay_context.engine, replay_context.run
    engine.write(before)
    engine.load_state(moments.state(engine.layout, replay_context.by_muon))
    first, lrs, found = (claim.plan.round - 1) * run.rounds.inner_steps, [], torch.empty_like(before)
    sketch: tuple[int, ...] = ()
    for step in steps:
        if replay_context.stop():
            raise Stopped
        lrs.append(learning_rate(run.inner, first + step, run.total_steps, engine.steps))
        engine.step(batch_of(replay_context, claim, step), lrs[-1])
        if glimpse is not None and step == glimpse.step:
            engine.read(found)
            sketch = glimpse.show(before, found)
    engine.read(found)
    return found, lrs, sketch


def tolerant_error(before: Tensor, after: Tensor, found: Tensor, other: Tensor, drift: Tensor) -> float:
    """The relative error against the nearer of two replays in different precision, fp32 and bf16, in units of how far
    these two are apart where that is more than usual: in such a segment training enlarges every difference, and honest
    nodes of other hardware are as far off.

    So what is as near to the truth as the other precision passes. In the demo's second round the two are apart by a
    third of what the data change, and by a hundredth in its first. Who makes up an optimizer that enlarges all there is
    gains a factor of twenty by it: what has nothing to do with the data fails all the same.
    """
    errors = [relative_error(before, after, one, drift) for one in (found, other)]
    noise = relative_error(before, other, found, drift)
    return min(errors) * USUAL / min(max(noise, USUAL), MOST_NOISE)


def relative_error(before: Tensor, after: Tensor, found: Tensor, drift: Tensor) -> float:
    """‖after − found‖ over the smaller of ‖found − before‖ and ‖found − drift‖; all ``[n]`` fp32, summed in fp64.

    Where momentum alone would have come far, what counts is what the data change of that: ``drift`` is where it would
    have come, as in ``coasting.py``.
    """
    apart = _distance(after, found)
    moved = min(_distance(found, before), _distance(found, drift))
    if not isfinite(apart) or not isfinite(moved):
        return float("inf")
    if moved == 0.0:
        return 0.0 if apart == 0.0 else float("inf")
    return apart / moved


def _distance(one: Tensor, other: Tensor) -> float:
    return float(torch.linalg.vector_norm(one - other, dtype=torch.float64))


def _moments(replay_context: ReplayContext, blobs: Blobs, root: bytes) -> Moments:
    run, layout = replay_context.run, replay_context.engine.layout
    most = run.total_steps + run.rounds.inner_steps  # the second are those of a newcomer's warming up
    try:
        return Moments.unpack(blobs(root, packed_state_bytes(layout)), layout, most)
    except ValueError as error:
        raise Contradiction(str(error)) from None


def _gain(replay_context: ReplayContext, claim: Claim, theta: Tensor, payload: Sequence[bytes]) -> int:
    """By how much an outer step of this contribution alone lowers the held-out loss, millionths of a nat a token."""
    codec, change = replay_context.backend.codec(replay_context.run.codec.name), torch.zeros_like(theta)
    for part, encoded in zip(replay_context.parts, payload, strict=True):
        out = torch.zeros(part.stop - part.start, device=replay_context.backend.device)
        codec.decode_add(encoded, 1.0, out)
        change[part] = out.cpu()
    key, count = digest("gain", claim.seed), len(replay_context.heldout)
    drawn = permute(np.arange(min(GAIN_SEQUENCES, count), dtype=np.uint64), count, key)
    without, with_it = (
        _loss(replay_context, flat, drawn) for flat in (theta, theta - replay_context.run.outer.lr * change)
    )
    gain = (without - with_it) * 1e6
    return round(max(-MOST, min(MOST, gain))) if isfinite(gain) else -MOST


def _loss(replay_context: ReplayContext, flat: Tensor, sequences: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float:
    """Nats a token."""
    replay_context.engine.write(flat)
    size, total, tokens = replay_context.run.inner.batch_size, 0.0, 0
    for at in range(0, len(sequences), size):
        loss, predicted = replay_context.engine.evaluate(replay_context.heldout.batch(sequences[at : at + size]))
        total, tokens = total + loss, tokens + predicted
    return total / tokens

"""An audit case: the contribution to replay, and what the ledger says it must follow from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from psyche.audit.replay import Blobs, ClaimedWork, ReplayContext, replay
from psyche.config import Run
from psyche.data.token_store import TokenStore
from psyche.diloco.audit_bundle import AuditBundle, ThetaProof
from psyche.diloco.local_data import DataAssignment
from psyche.diloco.replica import Replica
from psyche.numerics.backends.base import Backend
from psyche.protocol.audit_messages import Finding
from psyche.protocol.audits import seed_of
from psyche.protocol.messages import Contribution, Plan, Record
from psyche.training.engine import Batch
from psyche.training.optimizer_state import muon_parameters
from psyche.training.torch_engine import TorchEngine

LOOKBACK = 64
"""Rounds searched for a node's earlier error feedback. A node that restarts continues with that of a checkpoint."""


@dataclass(frozen=True)
class AuditCase:
    """A contribution under audit, with what the records determine about it."""

    plan: Plan
    node: str
    """The audited node."""
    contribution: Contribution
    previous_plan: Plan | None
    """The plan of the round before, whose data the overlap steps used. Without it those steps are not checked."""
    seed: bytes
    """See :attr:`ClaimedWork.seed`."""
    allowed_residuals: frozenset[bytes] | None
    """See :attr:`ClaimedWork.allowed_residuals`."""
    jury: bool = False
    """The auditors disagree: also measure the noise between precisions."""


# ------------------------------------------------------------------------------ from records


def first_round_needed(round_number: int) -> int:
    """Return the first round whose record :func:`open_case` needs to audit ``round_number``."""
    return max(1, round_number - LOOKBACK)


def open_case(
    node: str, round_number: int, records: Mapping[int, Record], run_id: bytes, fragments: int, *, jury: bool = False
) -> AuditCase | None:
    """Build the case for what ``node`` contributed to ``round_number``; None if ``records`` hold no contribution."""
    record = records.get(round_number)
    if record is None:
        return None
    contribution = next((one.contribution for one in record.accepted if one.node == node), None)
    if contribution is None:
        return None
    previous = records.get(round_number - 1)
    residuals = _residuals(node, round_number, records, fragments)
    seed = seed_of(record.plan, record.accepted, run_id)
    return AuditCase(record.plan, node, contribution, previous.plan if previous else None, seed, residuals, jury)


def _residuals(node: str, audited: int, records: Mapping[int, Record], fragments: int) -> frozenset[bytes] | None:
    """Return the roots that the fragment's error feedback may have had before the round.

    None if the records do not determine them: a contribution of the node was excluded and returned to its error
    feedback, or the error feedback is older than the records.
    """
    found: set[bytes] = set()
    for round_number in range(audited - fragments, first_round_needed(audited) - 1, -fragments):
        record = records.get(round_number)
        if record is None or any(one.node == node for one in record.excluded):
            return None
        found |= {one.contribution.residual_out for one in record.accepted if one.node == node}
    return frozenset(found) if found or first_round_needed(audited) == 1 else None


# ------------------------------------------------------------------------------- on a replica


def can_audit(replica: Replica, round_number: int) -> bool:
    """Return whether this node still has the proof of the round's base state and an engine that can replay.

    A node with several ranks is audited but audits nobody: a non-finite gradient terminates its ranks, and an audited
    node can choose a state that produces one.
    """
    return round_number - 1 in replica.trace_recorder.theta_proofs and isinstance(replica.engine, TorchEngine)


def audit(
    replica: Replica, case: AuditCase, bundle: AuditBundle, blobs: Blobs, *, stop: Callable[[], bool] = lambda: False
) -> Finding:
    """Replay the contribution of ``case`` on the replica's engine, whose own training state is restored afterwards.

    Call it on the training thread, between two inner steps. Raises ``KeyError`` unless :func:`can_audit`, ``BadShard``
    if the audited node's data is not here, and :class:`ReplayStopped` once ``stop()`` is true.
    """
    assert not case.contribution.private, "private data cannot be replayed"
    assert isinstance(replica.engine, TorchEngine), "see can_audit"
    context = replay_context_for(replica.run, replica.engine, replica.backend, replica.store, case)
    proof = replica.trace_recorder.theta_proofs[case.plan.round - 1]
    return replay(replace(context, stop=stop, measure_noise=case.jury), claimed_work(case, bundle, proof), blobs)


def claimed_work(case: AuditCase, bundle: AuditBundle, proof: ThetaProof) -> ClaimedWork:
    """Combine case, trace points and base state. Raises :class:`BlobUnavailable` if ``proof`` is of another state."""
    root = proof.theta_root(case.plan.base_root)
    return ClaimedWork(case.plan, case.node, case.contribution, bundle.points, root, case.seed, case.allowed_residuals)


def replay_context_for(
    run: Run, engine: TorchEngine, backend: Backend, store: TokenStore, case: AuditCase
) -> ReplayContext:
    """Collect the engine, codec and data with which ``case`` is replayed."""
    fragments = engine.layout.fragments(run.overlap.fragments)
    previous = case.previous_plan
    return ReplayContext(
        run=run,
        engine=engine,
        backend=backend,
        parts=fragments[(case.plan.round - 1) % len(fragments)],
        batch=partial(DataAssignment(run, store.train, case.node).round_batch, case.plan),
        overlap_batch=None if previous is None else _overlap_batch(run, store, previous, case.node),
        heldout=store.heldout,
        by_muon=muon_parameters(run),
    )


def _overlap_batch(run: Run, store: TokenStore, previous: Plan, node: str) -> Callable[[int], Batch] | None:
    """Return the batches assigned to ``node`` for overlap steps, or None if it was no member of the round before."""
    member, assignment = previous.member(node), DataAssignment(run, store.train, node)
    if member is None:
        return None
    quota = member.inner_steps
    return lambda step: assignment.round_batch(previous, quota + step)

"""An audit on a replica: what ``audit/replay.py`` needs, from what a node has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from psyche.audit.audit_case import AuditCase
from psyche.audit.replay import Blobs, Claim, ReplayContext, replay
from psyche.config import Run
from psyche.data.store import TokenStore
from psyche.diloco.audit_bundle import AuditBundle, Base
from psyche.diloco.batches import DataAssignment
from psyche.diloco.replica import Replica
from psyche.numerics.backends.base import Backend
from psyche.protocol.messages import Plan
from psyche.protocol.verdicts import Finding
from psyche.training.engine import Batch
from psyche.training.optimizer_state import muon_parameters
from psyche.training.torch_engine import TorchEngine


def can_audit(replica: Replica, round_number: int) -> bool:
    """Whether this node still knows the outer state that the round was trained from, and can do its work again.

    A node of several ranks is audited like others and audits nobody: a gradient that is not finite ends its ranks, and
    there are states from which a step has one.
    """
    return round_number - 1 in replica.trace_recorder.bases and isinstance(replica.engine, TorchEngine)


def audit(
    replica: Replica, case: AuditCase, bundle: AuditBundle, blobs: Blobs, *, stop: Callable[[], bool] = lambda: False
) -> Finding:
    """Do the contribution of ``case`` again; what this replica trains is put aside meanwhile.

    To be called where the replica trains, between two inner steps. Raises ``KeyError`` unless :func:`can_audit`,
    ``BadShard`` where the node's text is not here, and :class:`Stopped` once ``stop()`` is true.
    """
    assert not case.given.private, "there is nothing to see of it"
    assert isinstance(replica.engine, TorchEngine), "see can_audit"
    replay_context = replay_context_for(replica.run, replica.engine, replica.backend, replica.store, case)
    base = replica.trace_recorder.bases[case.plan.round - 1]
    return replay(replace(replay_context, stop=stop, thorough=case.jury), claim_of(case, bundle, base), blobs)


def claim_of(case: AuditCase, bundle: AuditBundle, base: Base) -> Claim:
    """What the node says, and what is known that it has to follow from. Raises :class:`Unserved` where ``base`` is not
    that of the round."""
    root = base.theta_root(case.plan.base_root)
    return Claim(case.plan, case.node, case.given, bundle.points, root, case.seed, case.residuals)


def replay_context_for(
    run: Run, engine: TorchEngine, backend: Backend, store: TokenStore, case: AuditCase
) -> ReplayContext:
    """With what the work of ``case`` can be done again."""
    fragments = engine.layout.fragments(run.overlap.fragments)
    return ReplayContext(
        run=run,
        engine=engine,
        backend=backend,
        parts=fragments[(case.plan.round - 1) % len(fragments)],
        batch=partial(DataAssignment(run, store.train, case.node).of_round, case.plan),
        late_batch=None if case.before is None else _late(run, store, case.before, case.node),
        heldout=store.heldout,
        by_muon=muon_parameters(run),
    )


def _late(run: Run, store: TokenStore, before: Plan, node: str) -> Callable[[int], Batch] | None:
    """What ``node`` was dealt for late steps while the round of ``before`` was on the wire; None: it was no member."""
    member, portion = before.member(node), DataAssignment(run, store.train, node)
    if member is None:
        return None
    owed = member.inner_steps
    return lambda step: portion.of_round(before, owed + step)

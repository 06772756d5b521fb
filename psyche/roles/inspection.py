"""An audit on a replica: what ``verification/replay.py`` needs, from what a node has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from psyche.protocol.messages import Plan
from psyche.protocol.verdicts import Finding
from psyche.roles.casefile import Case
from psyche.roles.portion import Portion
from psyche.roles.replica import Replica
from psyche.training.engine import Batch
from psyche.training.moments import muon_parameters
from psyche.training.torch_engine import TorchEngine
from psyche.verification.kit import Kit
from psyche.verification.replay import Blobs, Claim, Lab, replay


def can_audit(replica: Replica, plan: Plan) -> bool:
    """Whether this node still knows what the round of ``plan`` was trained from, and can do it again.

    A node of several ranks is audited like others and audits nobody: a gradient that is not finite ends its ranks, and
    there are states from which a step has one.
    """
    return plan.round - 1 in replica.witness.theta_roots and isinstance(replica.engine, TorchEngine)


def audit(replica: Replica, case: Case, kit: Kit, blobs: Blobs, *, stop: Callable[[], bool] = lambda: False) -> Finding:
    """Do the contribution of ``case`` again; what this replica trains is put aside meanwhile.

    To be called where the replica trains, between two inner steps. Raises ``KeyError`` unless :func:`can_audit`,
    ``BadShard`` where the node's text is not here, and :class:`Stopped` once ``stop()`` is true.
    """
    assert not case.given.private, "there is nothing to see of it"
    lab = lab_of(replica, case.plan, case.node, case.before)
    return replay(replace(lab, stop=stop, thorough=case.jury), claim_of(replica, case, kit), blobs)


def claim_of(replica: Replica, case: Case, kit: Kit) -> Claim:
    """What the node says, and what this replica knows that it has to follow from. Raises ``KeyError`` unless
    :func:`can_audit`."""
    root = replica.witness.theta_roots[case.plan.round - 1]
    return Claim(case.plan, case.node, case.given, kit.points, root, case.seed, case.residuals)


def lab_of(replica: Replica, plan: Plan, node: str, before: Plan | None = None) -> Lab:
    """With what this replica can do the work of ``node`` again."""
    run, split, engine = replica.run, replica.store.train, replica.engine
    assert isinstance(engine, TorchEngine), "see can_audit"
    return Lab(
        run=run,
        engine=engine,
        backend=replica.backend,
        parts=replica.slices_of(plan.round),
        batch=partial(Portion(run, split, node).of_round, plan),
        late_batch=None if before is None else _late(replica, before, node),
        heldout=replica.store.heldout,
        by_muon=muon_parameters(run),
    )


def _late(replica: Replica, before: Plan, node: str) -> Callable[[int], Batch] | None:
    """What ``node`` was dealt for late steps while the round of ``before`` was on the wire; None: it was no member."""
    member, portion = before.member(node), Portion(replica.run, replica.store.train, node)
    if member is None:
        return None
    owed = member.inner_steps
    return lambda step: portion.of_round(before, owed + step)

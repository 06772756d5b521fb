"""An audit on a replica: what ``verification/replay.py`` needs, from what a node has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from psyche.protocol.messages import Contribution, Plan
from psyche.protocol.verdicts import Finding
from psyche.roles.portion import Portion
from psyche.roles.replica import Replica
from psyche.training.moments import muon_parameters
from psyche.verification.kit import Kit
from psyche.verification.replay import Blobs, Claim, Lab, replay


def can_audit(replica: Replica, plan: Plan) -> bool:
    """Whether this node still knows what the round of ``plan`` was trained from."""
    return plan.round - 1 in replica.witness.theta_roots


def audit(
    replica: Replica,
    plan: Plan,
    node: str,
    contribution: Contribution,
    kit: Kit,
    blobs: Blobs,
    *,
    before: Plan | None = None,
    residuals: frozenset[bytes] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Finding:
    """Do again what ``node`` contributed to the round of ``plan``; what this replica trains is put aside meanwhile.

    To be called where the replica trains, between two inner steps. ``before`` is the plan of the round before, where
    the late steps were dealt their data; without it those are not checked. ``residuals``: see :class:`Claim`. Raises
    ``KeyError`` unless :func:`can_audit`, and ``BadShard`` where the node's text is not here, and
    :class:`Stopped` once ``stop()`` is true.
    """
    assert not contribution.private, "there is nothing to see of it"
    claim = claim_of(replica, plan, node, contribution, kit, residuals)
    return replay(replace(lab_of(replica, plan, node, before), stop=stop), claim, blobs)


def claim_of(
    replica: Replica,
    plan: Plan,
    node: str,
    contribution: Contribution,
    kit: Kit,
    residuals: frozenset[bytes] | None = None,
) -> Claim:
    """What ``node`` says, and what this replica knows that it has to follow from. Raises ``KeyError`` unless
    :func:`can_audit`."""
    return Claim(plan, node, contribution, kit.points, replica.witness.theta_roots[plan.round - 1], residuals)


def lab_of(replica: Replica, plan: Plan, node: str, before: Plan | None = None) -> Lab:
    """With what this replica can do the work of ``node`` again."""
    run, split = replica.run, replica.store.train
    member = None if before is None else before.member(node)
    late = None
    if before is not None and member is not None:
        owed = member.inner_steps
        dealt = partial(Portion(run, split, node).of_round, before)
        late = lambda step: dealt(owed + step)  # noqa: E731
    return Lab(
        run=run,
        engine=replica.engine,
        backend=replica.backend,
        parts=replica.slices_of(plan.round),
        batch=partial(Portion(run, split, node).of_round, plan),
        late_batch=late,
        heldout=replica.store.heldout,
        by_muon=muon_parameters(run),
    )

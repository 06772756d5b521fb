"""An audit on a replica: what ``verification/replay.py`` needs, from what a node has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from psyche.protocol.messages import Contribution, Plan
from psyche.protocol.verdicts import Finding
from psyche.roles.portion import Portion
from psyche.roles.replica import Replica
from psyche.training.engine import Batch
from psyche.training.moments import muon_parameters
from psyche.training.zero.engine import DeepSpeedEngine
from psyche.verification.kit import Kit
from psyche.verification.replay import Blobs, Claim, Lab, replay


def can_audit(replica: Replica, plan: Plan) -> bool:
    """Whether this node still knows what the round of ``plan`` was trained from, and can do it again.

    A node of several ranks is audited like others and audits nobody: a gradient that is not finite ends its ranks, and
    there are states from which a step has one.
    """
    return plan.round - 1 in replica.witness.theta_roots and not isinstance(replica.engine, DeepSpeedEngine)


def audit(
    replica: Replica,
    plan: Plan,
    node: str,
    contribution: Contribution,
    kit: Kit,
    blobs: Blobs,
    *,
    seed: bytes,
    before: Plan | None = None,
    residuals: frozenset[bytes] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Finding:
    """Do again what ``node`` contributed to the round of ``plan``; what this replica trains is put aside meanwhile.

    To be called where the replica trains, between two inner steps. ``before`` is the plan of the round before, where
    the late steps were dealt their data; without it those are not checked. ``seed`` and ``residuals`` are those of
    :class:`Claim`. Raises ``KeyError`` unless :func:`can_audit`, ``BadShard`` where the node's text is not here, and
    :class:`Stopped` once ``stop()`` is true.
    """
    assert not contribution.private, "there is nothing to see of it"
    root = replica.witness.theta_roots[plan.round - 1]
    claim = Claim(plan, node, contribution, kit.points, root, seed, residuals)
    return replay(replace(lab_of(replica, plan, node, before), stop=stop), claim, blobs)


def lab_of(replica: Replica, plan: Plan, node: str, before: Plan | None = None) -> Lab:
    """With what this replica can do the work of ``node`` again."""
    run, split = replica.run, replica.store.train
    return Lab(
        run=run,
        engine=replica.engine,
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

"""The part of a run's rules that its manifest says without the model: enough to check a chain, and quick to import."""

from __future__ import annotations

from psyche.config import Manifest
from psyche.protocol.state import AuditRules, Rules

MILLION = 1_000_000
SECOND_AUDITS = 0.1
"""Share of audits that two nodes do, neither of which knows the other's finding. An auditor that reports results it did
not compute is caught at this rate; the price is a tenth more audits."""
AUDITOR_PATIENCE = 3
"""Rounds after which an audit without a result is given to one more auditor. A replay takes as long as training a
round, and the auditor also trains; one round would hand on the audits of every slow node."""


def chain_rules(manifest: Manifest) -> Rules:
    """The rules that a certified chain is held to.

    What depends on the model's shape alone (sizes of payloads, numbers of slices) was for the voters to check, and
    allows anything here; so nobody has to build the model, or to have what it takes, to verify a ledger.
    """
    run, audits = manifest.run, manifest.run.audits
    return Rules(
        run_id=manifest.run_id,
        genesis=bytes.fromhex(manifest.resolved.genesis),
        rounds=run.rounds.total,
        inner_steps=run.rounds.inner_steps,
        overlap_steps=run.overlap.overlap_steps,
        batch_size=run.inner.batch_size,
        tokens_per_step=run.tokens_per_step,
        payload_bytes=2**62,
        slices=(),
        reducers=run.exchange.reducers,
        sharded_from=None,
        start_members=run.rounds.start_members,
        min_members=run.rounds.min_members,
        round_bounds=(run.deadlines.round_min, run.deadlines.round_max),
        exchange_bounds=(run.deadlines.exchange_min, run.deadlines.exchange_max),
        silence=run.deadlines.silence,
        probation=run.rounds.probation,
        private_share=run.private_share,
        audits=AuditRules(
            rate=audits.rate,
            second=SECOND_AUDITS,
            patience=AUDITOR_PATIENCE,
            window=audits.window,
            pass_error=round(audits.pass_error * MILLION),
            fail_error=round(audits.fail_error * MILLION),
        ),
        coordinators=len(manifest.resolved.coordinators),
    )

"""The run manifest (DESIGN §2): the run, what its launch resolved, and the hash that is its identity."""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from pydantic import Field

from psyche.config.base import Count, HexDigest, PeerId, Strict, validated
from psyche.config.run import Run
from psyche.errors import ConfigError
from psyche.numerics.digest import digest
from psyche.protocol.state import AuditRules, Rules

MANIFEST = "manifest.msgpack"
"""The run manifest in the directory of each of its processes."""


class Resolved(Strict):
    """What a launch adds: facts that follow from the rest but that a joiner must be able to check."""

    coordinators: Annotated[tuple[PeerId, ...], Field(min_length=1, strict=False)]
    store: HexDigest
    """Root of the token store's index (the training split's shards, the held-out shards, the tokenizer)."""
    layout: HexDigest
    genesis: HexDigest
    """state_root before the first round."""
    parameters: Count
    flat_size: Count
    """Elements of the flat vector; with the codec it fixes the sizes of all payloads."""


class Manifest(Strict):
    """The run manifest (DESIGN §2): the run, and what its launch resolved."""

    run: Run
    resolved: Resolved

    def encode(self) -> bytes:
        """Canonical msgpack: keys sorted, defaults written out. Equal manifests give equal bytes."""
        return msgspec.msgpack.encode(self.model_dump(mode="json"), order="sorted")

    @property
    def run_id(self) -> bytes:
        """32 bytes; the identity of the run everywhere."""
        return digest("manifest", self.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Inverse of :meth:`encode`. Raises :class:`ConfigError` on anything else."""
        try:
            tree = msgspec.msgpack.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"the run manifest is not valid msgpack: {error}") from None
        manifest = validated(cls, tree, "the run manifest")
        if manifest.encode() != data:
            raise ConfigError("the run manifest is not in canonical form; its author runs another version of psyche")
        return manifest


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

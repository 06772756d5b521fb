"""The run manifest: the run's configuration, what its launch resolved, its hash (the run id), and the protocol's
rules."""

from __future__ import annotations

from typing import Annotated, Self

import msgspec
from pydantic import Field

from psyche.config.base import Count, HexDigest, PeerId, Strict, validated
from psyche.config.run_config import Run
from psyche.errors import ConfigError
from psyche.numerics.digest import digest
from psyche.protocol.round_state import AuditRules, Rules

MANIFEST = "manifest.msgpack"
"""File of the run manifest in the directory of each process."""


class Resolved(Strict):
    """What a launch adds to the configuration, for joining nodes to check."""

    coordinators: Annotated[tuple[PeerId, ...], Field(min_length=1, strict=False)]
    """PeerIDs of the coordinators: the one that launched the run, then its standbys."""
    store: HexDigest
    """Root hash of the token store: training shards, held-out shards, tokenizer."""
    layout: HexDigest
    """Hash of the flat layout of the model's parameters."""
    genesis: HexDigest
    """State root before the first round."""
    parameters: Count
    """Parameters of the model."""
    flat_size: Count
    """Elements of the flat vector, padding included; with the codec it fixes the size of every payload."""


class Manifest(Strict):
    """The run manifest: the configuration and what its launch resolved."""

    run: Run
    resolved: Resolved

    def encode(self) -> bytes:
        """Encode as canonical msgpack: keys sorted, defaults included. Equal manifests give equal bytes."""
        return msgspec.msgpack.encode(self.model_dump(mode="json"), order="sorted")

    @property
    def run_id(self) -> bytes:
        """The 32-byte identity of the run."""
        return digest("manifest", self.encode())

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """Invert :meth:`encode`. Raises :class:`ConfigError` on any other bytes."""
        try:
            tree = msgspec.msgpack.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"the run manifest is not valid msgpack: {error}") from None
        manifest = validated(cls, tree, "the run manifest")
        if manifest.encode() != data:
            raise ConfigError("the run manifest is not in canonical form: it was written by another version of psyche")
        return manifest


MILLION = 1_000_000
SECOND_AUDITS = 0.1
"""Share of audits that two nodes do, neither of which knows the other's finding. An auditor that reports results it did
not compute is caught at this rate; the price is a tenth more audits."""
AUDITOR_PATIENCE = 3
"""Rounds after which an audit without a result is given to one more auditor. A replay takes as long as training a
round, and the auditor also trains; one round would hand on the audits of every slow node."""


def chain_rules(manifest: Manifest) -> Rules:
    """Return the rules that a certified chain must follow, without building the model.

    Payload sizes and slice counts depend on the model and were checked by the voters; these rules allow any. Verifying
    a ledger therefore needs neither PyTorch nor the model.
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

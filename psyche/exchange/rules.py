"""The protocol's rules of a run, including those that depend on the model: payload sizes, slices, sharding."""

from __future__ import annotations

from dataclasses import replace

from psyche.config import Manifest, Run
from psyche.config.manifest import chain_rules
from psyche.errors import ConfigError
from psyche.exchange.cost import sharded_from
from psyche.numerics.codecs.registry import codec
from psyche.numerics.flat import FlatLayout
from psyche.protocol.round_state import Rules
from psyche.training.models import layout


def rules_of(manifest: Manifest) -> Rules:
    """Return all rules of the run."""
    run, resolved = manifest.run, manifest.resolved
    encoder = codec(run.codec.name)
    # Without fragments the flat size is enough, and the model need not be built.
    flat = FlatLayout.of([("", (resolved.flat_size,))]) if run.overlap.fragments == 1 else layout(run.model)
    fragments = fragments_of(run, flat)
    return replace(
        chain_rules(manifest),
        payload_bytes=max(sum(encoder.payload_bytes(p.stop - p.start) for p in parts) for parts in fragments),
        slices=tuple(len(parts) for parts in fragments),
        sharded_from=sharded_from(run, fragments),
    )


ACCUMULATED_ROUNDS = 20
"""Rounds of updates that error feedback may send at once: 1/(1 − β) for the largest β in use, .95 (SparseLoCo)."""
STEP_BOUND = 32.0
"""Largest ratio of an AdamW step to its learning rate: (1 − β1)/√(1 − β2) (Kingma and Ba 2015, §2.1), which is below
1/√(1 − .999) = 31.6. Orthogonalised steps (Muon) stay below it for layers up to 25,000 wide."""


def update_limit(run: Run) -> float:
    """Return the largest root mean square that the values of an honest payload or result can have.

    Generous, but it keeps θ finite: without a bound, reducers that agree on a false result write anything into it.
    """
    return STEP_BOUND * ACCUMULATED_ROUNDS * run.inner.lr * run.rounds.inner_steps


def fragments_of(run: Run, flat: FlatLayout) -> tuple[tuple[slice, ...], ...]:
    """Return the slices of each fragment. Raises :class:`ConfigError` if the model has too few layers."""
    try:
        return flat.fragments(run.overlap.fragments)
    except ValueError as error:
        raise ConfigError(f"run.overlap.fragments: {error}") from None

"""What the state machine needs to know of a manifest."""

from __future__ import annotations

from dataclasses import replace

from psyche.config import Manifest, Run
from psyche.config.manifest import chain_rules
from psyche.errors import ConfigError
from psyche.exchange.cost import sharded_from
from psyche.numerics.codecs.registry import codec
from psyche.numerics.flat import FlatLayout
from psyche.protocol.state import Rules
from psyche.training.models import layout


def rules_of(manifest: Manifest) -> Rules:
    """The manifest as the protocol sees it."""
    run, resolved = manifest.run, manifest.resolved
    encoder = codec(run.codec.name)
    # Without fragments the model's size says it all, and nobody has to build the model to know it.
    flat = FlatLayout.of([("", (resolved.flat_size,))]) if run.overlap.fragments == 1 else layout(run.model)
    fragments = fragments_of(run, flat)
    return replace(
        chain_rules(manifest),
        payload_bytes=max(sum(encoder.payload_bytes(p.stop - p.start) for p in parts) for parts in fragments),
        slices=tuple(len(parts) for parts in fragments),
        sharded_from=sharded_from(run, fragments),
    )


def fragments_of(run: Run, flat: FlatLayout) -> tuple[tuple[slice, ...], ...]:
    """The slices of each fragment of the run. Raises :class:`ConfigError` where the model has too few layers."""
    try:
        return flat.fragments(run.overlap.fragments)
    except ValueError as error:
        raise ConfigError(f"run.overlap.fragments: {error}") from None

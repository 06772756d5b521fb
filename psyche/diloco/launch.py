"""Launch a run: prepare the data, build the model, and resolve the configuration into a manifest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from psyche.config import Config, Manifest, Resolved, Run
from psyche.data.prepare import Progress, prepare
from psyche.data.token_store import TokenStore
from psyche.errors import ConfigError
from psyche.exchange.rules import fragments_of
from psyche.numerics.outer import OuterState
from psyche.training.models import build, draws_random_numbers
from psyche.training.torch_engine import TorchEngine


@dataclass(frozen=True)
class Launch:
    """A launched run, before its first round."""

    manifest: Manifest
    store: TokenStore
    genesis: OuterState
    """The outer state before the first round."""
    heldout: tuple[float, int]
    """Summed loss and predicted tokens of the held-out sequences under the initial parameters."""


def launch(config: Config, coordinator: str, progress: Callable[[Progress], None] | None = None) -> Launch:
    """Resolve a configuration into the manifest of a new run led by ``coordinator`` (a PeerID).

    Raises ``PsycheError`` if the data cannot be prepared and :class:`ConfigError` if it does not fit the model.
    """
    run = config.run
    coordinators = (coordinator, *run.standbys)
    if len(set(coordinators)) < len(coordinators):
        raise ConfigError(
            "run.standbys: all coordinators, including the one that launches the run, need different keys"
        )
    store = prepare(run.data, config.node.cache.expanduser(), vocab_limit=run.model.vocab_size, progress=progress)
    check_fit(run, store)
    if config.node.threads is not None:
        torch.set_num_threads(config.node.threads)
    engine = TorchEngine(build(run.model, seed=run.seed), run.inner, config.node, store.index.pad)
    fragments_of(run, engine.layout)
    if run.audits.rate and draws_random_numbers(engine.model, torch.zeros(1, 1, dtype=torch.int64).to(engine.device)):
        raise ConfigError(
            "run.model.settings: audits cannot replay dropout: set it to 0 (attention_dropout, attn_pdrop, …), "
            "or disable audits with run.audits.rate: 0"
        )
    theta = torch.empty(engine.layout.size)
    engine.read(theta)
    genesis = OuterState.initial(theta)
    count = min(run.heldout_sequences, len(store.heldout))
    heldout = engine.evaluate(store.heldout.batch(range(count)))
    resolved = Resolved(
        coordinators=coordinators,
        store=store.root.hex(),
        layout=engine.layout.digest.hex(),
        genesis=genesis.index().root.hex(),
        parameters=engine.layout.parameters,
        flat_size=engine.layout.size,
    )
    return Launch(Manifest(run=run, resolved=resolved), store, genesis, heldout)


def check_fit(run: Run, store: TokenStore) -> None:
    """Check that sequence length and vocabulary of ``store`` fit the model. Raises :class:`ConfigError`."""
    positions = run.model.settings.get("max_position_embeddings")
    if positions is not None and run.data.sequence_length > positions:
        raise ConfigError(
            f"run.data.sequence_length: {run.data.sequence_length} is more than "
            f"run.model.settings.max_position_embeddings ({positions})"
        )
    if store.vocab_size > run.model.vocab_size:
        raise ConfigError(
            f"run.model.settings.vocab_size: {run.model.vocab_size} is smaller than the tokenizer's {store.vocab_size}"
        )

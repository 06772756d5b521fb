"""Load a trained model from a node's newest checkpoint or an exported directory, and export a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from psyche.config import MANIFEST, Manifest, Node
from psyche.data.provision import local_store
from psyche.data.token_store import TokenStore
from psyche.diloco.checkpoint import Checkpoint, load_latest
from psyche.errors import PsycheError
from psyche.numerics.outer import OuterState
from psyche.tools.exported_model import export, model_of
from psyche.training.devices import pick_device


@dataclass(frozen=True)
class Trained:
    """A ``transformers`` model in evaluation mode on its device, with its tokenizer."""

    model: Any
    tokenizer: Any
    name: str
    """A label: the run and round, or the directory."""
    store: TokenStore | None
    """The token store it was trained on; None for an exported model."""
    heldout_sequences: int = 0
    """Held-out sequences that the run evaluates on; every node has them."""

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    @property
    def window(self) -> int:
        """Context length in tokens: that of training, or the model's positions up to 1024."""
        if self.store is not None:
            return self.store.sequence_length
        return min(getattr(self.model.config, "max_position_embeddings", None) or 1024, 1024)


def load_trained(directory: Path, device: str = "auto", cache: Path | None = None) -> Trained:
    """Load the model in ``directory``, a node's or an exported one. Raises :class:`PsycheError`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    where = pick_device(device)
    logging.disable_progress_bar()
    if (directory / MANIFEST).exists():
        manifest, checkpoint = newest_checkpoint(directory)
        store = local_store(manifest, (cache or Node().cache).expanduser())
        model = model_of(manifest.run.model, OuterState(checkpoint.outer).theta)
        tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path, local_files_only=True, trust_remote_code=False)
        name = f"{manifest.run.name} after round {checkpoint.chain.rounds}"
        heldout_sequences = min(manifest.run.heldout_sequences, len(store.heldout))
        return Trained(model.to(where).eval(), tokenizer, name, store, heldout_sequences)
    if not (directory / "config.json").exists():
        raise PsycheError(
            f"{directory} is neither a node's directory (it has no {MANIFEST}) nor an exported model (no config.json): "
            "give a directory made by psyche join or psyche export"
        )
    try:
        local = {"local_files_only": True, "trust_remote_code": False}
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **local)
        tokenizer = AutoTokenizer.from_pretrained(directory, **local)
    except Exception as error:  # transformers raises a different type for each fault
        reason = " ".join(str(error).split())[:200]
        raise PsycheError(f"transformers cannot load {directory}: {reason}; export it again") from error
    return Trained(loaded.to(where).eval(), tokenizer, str(directory), None)


def newest_checkpoint(directory: Path) -> tuple[Manifest, Checkpoint]:
    """Return the manifest and the newest valid checkpoint of a node's directory. Raises :class:`PsycheError`."""
    try:
        manifest = Manifest.decode((directory / MANIFEST).read_bytes())
    except OSError:
        raise PsycheError(f"{directory} is not a node's directory: it has no {MANIFEST}") from None
    problems: list[str] = []
    checkpoint = load_latest(directory / "checkpoints", manifest.run_id, problems.append)
    if checkpoint is None:
        raise PsycheError(f"{directory} has no valid checkpoint yet{': ' * bool(problems)}{'; '.join(problems)}")
    return manifest, checkpoint


def export_node(directory: Path, output: Path, cache: Path | None = None) -> int:
    """Export a node's newest valid checkpoint for transformers; return its round. Raises ``PsycheError``."""
    manifest, checkpoint = newest_checkpoint(directory)
    store = local_store(manifest, (cache or Node().cache).expanduser())
    export(manifest.run.model, OuterState(checkpoint.outer).theta, store.tokenizer_path, output)
    return checkpoint.chain.rounds

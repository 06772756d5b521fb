"""A trained model in memory: from a node's newest checkpoint, or from a directory that transformers loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from psyche.config import MANIFEST, Manifest, Node
from psyche.data.provision import local_store
from psyche.data.store import TokenStore
from psyche.diloco.checkpoint import Checkpoint, load_latest
from psyche.errors import PsycheError
from psyche.numerics.outer import OuterState
from psyche.tools.exported_model import model_of
from psyche.training.devices import pick_device


@dataclass(frozen=True)
class Trained:
    """``model`` and ``tokenizer`` are those of ``transformers``; the model is in evaluation mode, on its device."""

    model: Any
    tokenizer: Any
    name: str
    """In words: which run and round, or which directory."""
    store: TokenStore | None
    """What it was trained on, where that is known."""
    judged: int = 0
    """Held-out sequences of it that the run judges itself on; every node has those."""

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    @property
    def window(self) -> int:
        """Tokens it sees at once: those it was trained on, or as many as it has positions for; 1024 at most."""
        if self.store is not None:
            return self.store.sequence_length
        return min(getattr(self.model.config, "max_position_embeddings", None) or 1024, 1024)


def load_trained(directory: Path, device: str = "auto", cache: Path | None = None) -> Trained:
    """What is in ``directory``. Raises :class:`PsycheError` where that is neither a node nor a model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    where = pick_device(device)
    logging.disable_progress_bar()
    if (directory / MANIFEST).exists():
        manifest, checkpoint = newest(directory)
        store = local_store(manifest, (cache or Node().cache).expanduser())
        model = model_of(manifest.run.model, OuterState(checkpoint.outer).theta)
        tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path, local_files_only=True)
        name = f"{manifest.run.name} after round {checkpoint.chain.rounds}"
        judged = min(manifest.run.heldout_sequences, len(store.heldout))
        return Trained(model.to(where).eval(), tokenizer, name, store, judged)
    if not (directory / "config.json").exists():
        raise PsycheError(
            f"{directory} is neither a node's directory (it has no {MANIFEST}) nor an exported model (no config.json): "
            "name one that psyche join or psyche export made"
        )
    try:
        loaded = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # a broken file, an unknown architecture: each its own type
        reason = " ".join(str(error).split())[:200]
        raise PsycheError(f"transformers cannot load {directory}: {reason}; export it again") from error
    return Trained(loaded.to(where).eval(), tokenizer, str(directory), None)


def newest(directory: Path) -> tuple[Manifest, Checkpoint]:
    """The run of a node's directory and its newest whole checkpoint. Raises :class:`PsycheError`."""
    try:
        manifest = Manifest.decode((directory / MANIFEST).read_bytes())
    except OSError:
        raise PsycheError(f"{directory} is not the directory of a node: it has no {MANIFEST}") from None
    problems: list[str] = []
    checkpoint = load_latest(directory / "checkpoints", manifest.run_id, problems.append)
    if checkpoint is None:
        raise PsycheError(f"{directory} has no whole checkpoint yet{': ' * bool(problems)}{'; '.join(problems)}")
    return manifest, checkpoint

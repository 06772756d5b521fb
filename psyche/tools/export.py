"""From a node's directory to a model that anyone can load."""

from __future__ import annotations

from pathlib import Path

from psyche.config import Node
from psyche.data.provision import local_store
from psyche.numerics.outer import OuterState
from psyche.tools.exported_model import export
from psyche.tools.load import newest


def export_node(directory: Path, output: Path, cache: Path | None = None) -> int:
    """Export the newest whole checkpoint of a node. Returns its round. Raises ``PsycheError``."""
    manifest, checkpoint = newest(directory)
    store = local_store(manifest, (cache or Node().cache).expanduser())
    export(manifest.run.model, OuterState(checkpoint.outer).theta, store.tokenizer_path, output)
    return checkpoint.chain.rounds

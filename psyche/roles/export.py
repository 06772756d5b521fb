"""From a node's directory to a model that anyone can load."""

from __future__ import annotations

from pathlib import Path

from psyche.config import MANIFEST, Manifest, Node
from psyche.errors import PsycheError
from psyche.numerics.outer import OuterState
from psyche.roles.provision import local_store
from psyche.state.checkpoint import load_latest
from psyche.state.export import export


def export_node(directory: Path, output: Path, cache: Path | None = None) -> int:
    """Export the newest whole checkpoint of a node. Returns its round. Raises ``PsycheError``."""
    try:
        manifest = Manifest.decode((directory / MANIFEST).read_bytes())
    except OSError:
        raise PsycheError(f"{directory} is not the directory of a node: it has no {MANIFEST}") from None
    problems: list[str] = []
    checkpoint = load_latest(directory / "checkpoints", manifest.run_id, problems.append)
    if checkpoint is None:
        raise PsycheError(f"{directory} has no whole checkpoint yet{': ' * bool(problems)}{'; '.join(problems)}")
    store = local_store(manifest, (cache or Node().cache).expanduser())
    export(manifest.run.model, OuterState(checkpoint.outer).theta, store.tokenizer_path, output)
    return checkpoint.chain.rounds

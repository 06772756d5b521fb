"""A run small enough to finish in seconds: configuration, processes, and the reference it must match."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any

import torch
import yaml

from psyche.config import MANIFEST, Config, Manifest, Node, load_config
from psyche.data.provision import local_store
from psyche.diloco.reference import replay_ledger
from psyche.diloco.replica import Replica
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.network.identity import IDENTITY, Identity
from psyche.numerics.backends.base import Backend
from psyche.numerics.outer import OuterState
from psyche.protocol.chain import claimed
from psyche.telemetry.event_log import LOG_NAME, read_events
from psyche.telemetry.events import RoundCertified
from psyche.training.models import build
from psyche.training.torch_engine import TorchEngine

MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}

LARGER = {
    "architecture": "llama",
    "settings": MODEL | {"hidden_size": 128, "intermediate_size": 512, "vocab_size": 2048},
}
"""Of more than one slice."""


def write_config(directory: Path, *, members: int, **changes: Any) -> Path:
    """A configuration file for a run of ``members`` tiny nodes; ``changes`` replace keys of its run: part."""
    run: dict[str, Any] = {
        "name": "tiny",
        "seed": 11,
        "model": {"architecture": "llama", "settings": MODEL},
        "data": {
            "source": {"kind": "text", "paths": [str(Path(sysconfig.get_path("stdlib")) / "email" / "*.py")]},
            "tokenizer": {"kind": "bpe", "vocab_size": 512},
            "sequence_length": 32,
            "heldout_fraction": 0.3,
        },
        "codec": {"name": "int8"},
        "inner": {"lr": 0.003, "batch_size": 2, "warmup_steps": 2},
        "rounds": {"total": 4, "inner_steps": 3, "start_members": members},
        "deadlines": {"round_min": 10.0, "round_max": 60.0, "exchange_min": 5.0, "exchange_max": 20.0, "silence": 10.0},
        "heldout_sequences": 4,
        "audits": {"rate": 0.0},
    }
    node = {
        "listen": ["/ip4/127.0.0.1/tcp/0"],
        "threads": 1,
        "device": "cpu",
        "compile": "off",
        "cache": str(directory / "cache"),
        "checkpoint_every": 2,
        "wandb": {"mode": "disabled"},
    }
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump({"run": run | changes, "node": node}))
    return path


def replica(
    manifest: Manifest,
    node: Node,
    identity: Identity,
    backend: Backend | None = None,
    kind: type[Replica] = Replica,
) -> Replica:
    """The replica that a node of this identity would start with, or one of another ``kind``."""
    torch.set_num_threads(1)
    store = local_store(manifest, node.cache)
    initial = build(manifest.run.model, seed=manifest.run.seed)
    engine = TorchEngine(initial, manifest.run.inner, node, store.index.pad)
    theta = torch.empty(engine.layout.size)
    engine.read(theta)
    outer, secret = OuterState.initial(theta), identity.secret_digest(b"salt")
    return kind(manifest, engine, store, outer, identity.peer_id, secret, backend)


def overlap_steps(directory: Path) -> dict[tuple[int, str], int]:
    """How many late steps each node of a finished run took while a round was on the wire, by round and node."""
    taken = {}
    with Ledger.read(directory / "node-1" / LEDGER) as ledger:
        for entry in ledger.entries():
            for accepted in claimed(entry.certificate).record.accepted:
                taken[entry.round - 1, accepted.node] = accepted.contribution.overlap_steps
    return taken


def reference_roots(directory: Path, config: Config) -> list[str]:
    """State roots, one a round, of the single-process reference that does again what a finished run's ledger says."""
    manifest = Manifest.decode((directory / "coordinator" / MANIFEST).read_bytes())
    identities = [
        Identity.load_or_create(path / IDENTITY) for path in sorted(directory.glob("node-*")) if path.is_dir()
    ]
    replicas = {identity.peer_id: replica(manifest, config.node, identity) for identity in identities}
    with Ledger.read(directory / "node-1" / LEDGER) as ledger:
        return list(replay_ledger(replicas, [claimed(entry.certificate).record for entry in ledger.entries()]))


def certified_roots(log: Path) -> list[str]:
    """State roots, one a round, that an event log says were certified."""
    return [event.state_root for event in read_events(log) if isinstance(event, RoundCertified)]


def report(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "report.json").read_text())
    return loaded


__all__ = [
    "LOG_NAME",
    "certified_roots",
    "load_config",
    "overlap_steps",
    "reference_roots",
    "replica",
    "report",
    "write_config",
]

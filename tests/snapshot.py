"""State roots and record hashes of six small runs by the single-process reference, for holding behaviour still.

A change that is to change no behaviour gives the same file before and after it, on the same machine::

    python -m tests.snapshot before.json
    ...
    python -m tests.snapshot after.json && diff before.json after.json

A round's seed follows from the hash of the record before it, so everything changes with the format of a message or of
the manifest. With ``--fixed-seeds`` seeds follow from the round's number instead: then state roots hold across a change
of format, too.
"""

# ruff: noqa: E402 - digest() is replaced before anything imports it

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from psyche.numerics import digest as digests

FIXED_SEEDS = "--fixed-seeds" in sys.argv
_hash, _heads = digests.digest, dict[bytes, int]()


def _fixed(domain: str, *parts: bytes) -> bytes:
    """``digest``, but that no seed depends on the bytes of a record or of the manifest."""
    match domain:
        case "manifest":
            return _hash(domain)
        case "seed":
            return _hash(domain, bytes([_heads.setdefault(parts[0], len(_heads))]))
        case "audits":
            return _hash(domain, parts[0])
    return _hash(domain, *parts)


if FIXED_SEEDS:
    digests.digest = _fixed  # before anything imports it by name

from psyche.audit.simulated_audits import SimulatedAudits, honest
from psyche.config import load_config
from psyche.config import manifest as manifests
from psyche.diloco.audit_bundle import AuditBundleStore
from psyche.diloco.launch import launch
from psyche.diloco.reference import simulate_rounds
from psyche.exchange.rules import rules_of
from psyche.network.identity import Identity
from psyche.numerics.digest import digest
from tests.tiny import LARGER, replica, write_config

NODES = 4
SHARDED = {"exchange": {"kind": "sharded", "reducers": 2}, "model": LARGER}
AUDITED = {"audits": {"rate": 0.5, "window": 20}}
manifests.SECOND_AUDITS, manifests.AUDITOR_PATIENCE = 0.2, 2  # second audits and overdue ones within six rounds
CASES: dict[str, dict[str, object]] = {
    "fp32, gather": {"codec": {"name": "fp32"}},
    "int8, gather, audits": {"codec": {"name": "int8"}} | AUDITED,
    "int8, sharded": {"codec": {"name": "int8"}} | SHARDED,
    "int4, gather, two fragments, late steps": {
        "codec": {"name": "int4"},
        "overlap": {"fragments": 2, "overlap_steps": 2},
    },
    "topk2e, sharded, audits": {"codec": {"name": "topk2e"}} | SHARDED | AUDITED,
    "topk2e, gather, late steps": {"codec": {"name": "topk2e"}, "overlap": {"overlap_steps": 1}},
}


def run(name: str, directory: Path, cache: Path) -> list[dict[str, str]]:
    """State root and record hash of each round."""
    rounds = {"total": 6, "inner_steps": 4, "start_members": NODES}
    config = load_config(write_config(directory, members=NODES, rounds=rounds, **CASES[name]))
    config = config.model_copy(update={"node": config.node.model_copy(update={"cache": cache})})
    _heads.clear()
    identities = [Identity(digest("snapshot", bytes([number])), directory / f"{number}.key") for number in range(NODES)]
    manifest = launch(config, identities[0].peer_id).manifest
    replicas = {one.peer_id: replica(manifest, config.node, one) for one in identities}
    for node, one in replicas.items():
        one.trace_recorder.bundles = AuditBundleStore(directory / node / "audits")
    overlap_steps = manifest.run.overlap.overlap_steps
    audits = SimulatedAudits(replicas, manifest.run_id, rules_of(manifest).audits, honest)
    played = simulate_rounds(
        manifest, replicas, overlap_steps=lambda _round, _node: overlap_steps, audit=audits.statements_after
    )
    return [
        {"state_root": replicas[min(replicas)].chain.state_root.hex(), "record": record.hash.hex()}
        for record, _ in played
    ]


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(CASES):
            directory = Path(folder) / str(number)
            directory.mkdir()
            found[name] = run(name, directory, Path(folder) / "cache")
    target = next(argument for argument in sys.argv[1:] if argument != "--fixed-seeds")
    Path(target).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

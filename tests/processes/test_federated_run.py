"""Four real nodes with private corpora: nothing they send or log contains the text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from psyche.config import MANIFEST, Manifest, load_config
from psyche.data.encoding import document_hash
from psyche.data.provision import local_store
from psyche.data.tokenizer import Encoder
from psyche.federated.privacy_budget import Budget
from psyche.federated.private_text import TOKENS
from psyche.federated.private_training import DIRECTORY
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.numerics.digest import blob_root
from psyche.protocol.chain import claimed
from psyche.protocol.messages import WITHHELD
from psyche.telemetry.event_log import LOG_NAME, read_events
from psyche.telemetry.events import MemberMetrics, PrivacySpent, RoundCertified, RunFinished
from tests.processes.swarm import swarm
from tests.tiny import write_config

NODES, ROUNDS = 4, 4
DELTA = 1e-6
TOPICS = ("harbour", "orchard", "foundry", "library")
LONG = 8
"""Canary tokens to search for; too many to occur by chance."""


def corpus(directory: Path, number: int) -> tuple[list[Path], str]:
    """Write files on a topic of this node's own, each with a canary: text that occurs nowhere else."""
    directory.mkdir()
    canary = f"canary{number} " + " ".join(f"{word}{number}" for word in ("zyxq", "vlorp", "kwimj", "trufz", "hgnask"))
    topic = TOPICS[number]
    files = [directory / f"{topic}-{page}.txt" for page in range(6)]
    for page, file in enumerate(files):
        file.write_text(f"Of the {topic}, page {page}. {canary}. Nobody else may read of this {topic}.\n" * 12)
    return files, canary


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_private_text_is_sent_or_logged(tmp_path: Path) -> None:
    rounds = {"total": ROUNDS, "inner_steps": 3, "start_members": NODES, "min_members": 1}
    config = write_config(tmp_path, members=NODES, rounds=rounds, federated={"clip": 1.0, "max_share": 1.0})
    corpora = {f"node-{number + 1}": corpus(tmp_path / f"own-{number}", number) for number in range(NODES)}
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name, (files, _) in corpora.items():
            options = ["--private-data", str(files[0].parent), "--epsilon", "8"]
            if name == "node-4":  # noise for fewer rounds than the run has
                options += ["--noise-multiplier", "1.0"]
            run.node(name, str(tmp_path / "tap" / name), *options, module="tests.processes.socket_recorder")
        run.wait("coordinator", RunFinished)
        for name in [*corpora, "coordinator"]:
            assert run.join(name) == 0, run.output(name)[-2000:]

    directory = tmp_path / "run"
    logs = {name: list(read_events(directory / name / LOG_NAME)) for name in corpora}
    records = certified(directory / "coordinator" / LEDGER)
    check_budgets(directory, logs, records)
    check_labels(directory, records)

    haystack = {path: path.read_bytes() for path in sent_and_logged(tmp_path)}
    sent = b"".join(content for path, content in haystack.items() if "tap" in path.parts)
    for record in records:
        for one in record.accepted:
            assert one.contribution.payload_root in sent, "the recorder misses sent bytes"
    assert len(sent) > sum(one.contribution.payload_bytes for record in records for one in record.accepted)
    manifest = Manifest.decode((directory / "coordinator" / MANIFEST).read_bytes())
    encoder = Encoder.load(local_store(manifest, load_config(config).node.cache).tokenizer_path)
    for name, (files, canary) in corpora.items():
        for what, needle in needles(directory / name, files, canary, encoder).items():
            found = [path for path, content in haystack.items() if needle in content]
            assert not found, f"{what} of {name} is in {found}"


def certified(path: Path) -> list:  # type: ignore[type-arg]
    with Ledger.read(path) as ledger:
        return [claimed(entry.certificate).record for entry in ledger.entries()]


def check_budgets(directory: Path, logs: dict, records: list) -> None:  # type: ignore[type-arg]
    """Check that each node spent budget for the rounds it took part in; the one with too little left gracefully."""
    from opacus.accountants import RDPAccountant

    for name, log in logs.items():
        (me,) = {event.node for event in log}
        took = sum(me in {one.node for one in record.accepted} for record in records)
        told = [event for event in log if isinstance(event, PrivacySpent)]
        noise = json.loads((directory / name / "privacy.json").read_text())[0]["noise_multiplier"]
        accountant = RDPAccountant()
        accountant.history = [(noise, 1.0, took)]
        assert told[-1].epsilon == accountant.get_epsilon(DELTA) <= 8.0
        assert told[-1].epsilon == Budget(directory / name, 8.0, DELTA, noise).spent
        assert told[-1].rounds_left == 0
        assert took == (2 if name == "node-4" else ROUNDS)
        own = [event for event in log if isinstance(event, MemberMetrics) and event.peer == me]
        assert own
        assert all(event.train_loss is None for event in own)
    assert len([event for event in logs["node-1"] if isinstance(event, RoundCertified)]) == ROUNDS


def check_labels(directory: Path, records: list) -> None:  # type: ignore[type-arg]
    for record in records:
        for one in record.accepted:
            given = one.contribution
            assert given.private
            assert given.data_digest == given.trace_root == WITHHELD
    place = str(directory / "coordinator")
    command = [sys.executable, "-m", "psyche", "ledger"]
    shown = subprocess.run([*command, "show", place], capture_output=True, text=True, check=True).stdout
    assert "unaudited" in shown
    assert "valid" in subprocess.run([*command, "verify", place], capture_output=True, text=True, check=True).stdout


def sent_and_logged(directory: Path) -> list[Path]:
    """Return what the socket recorders wrote, and every file of the run except the nodes' own tokens."""
    found = [path for folder in ("tap", "run") for path in (directory / folder).rglob("*") if path.is_file()]
    return [path for path in found if path.parent.name != DIRECTORY]


def needles(node: Path, files: list[Path], canary: str, encoder: Encoder) -> dict[str, bytes]:
    """Return all forms in which the text, or a hash of it, could have been sent."""
    found = {"a canary": canary.encode(), "a word of it": canary.split()[0].encode()}
    ids = encoder.encode([f" {canary}."])[0]
    for kind in ("<u2", "<u4", "<i8"):
        for at in range(0, len(ids) - LONG - 2, LONG):
            found[f"tokens {at} as {kind}"] = np.array(ids[at : at + LONG], kind).tobytes()
    tokens = node / DIRECTORY / TOKENS
    rows = np.fromfile(tokens, "<u2").reshape(-1, 32).astype("<i8")
    hashes = {
        "the tokens": blake3(tokens.read_bytes()).digest(),
        "the tokens, as a blob": blob_root(tokens.read_bytes()),
    }
    for number, row in enumerate(rows):
        hashes[f"sequence {number}"] = blake3(row.tobytes(), derive_key_context="psyche 1 data").digest()
    for file in files:
        hashes |= {
            f"{file.name}": blake3(file.read_bytes()).digest(),
            f"{file.name}, as a document": document_hash(file.read_text()),
            f"{file.name}, as a blob": blob_root(file.read_bytes()),
        }
        found[f"the name of {file.name}"] = file.name.encode()
    found |= {f"the hash of {what}": value for what, value in hashes.items()}
    return found | {f"the hash of {what}, in hex": value.hex().encode() for what, value in hashes.items()}

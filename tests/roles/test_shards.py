"""No node has the whole corpus: shards come from wherever they are, and what is nowhere costs only its sequences."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from psyche.data.prepare import prepare
from psyche.data.store import TokenStore
from psyche.protocol.assignment import shards
from psyche.telemetry.events import Notice, RunStarted
from tests.roles.swarm import Swarm, swarm
from tests.roles.tiny import certified_roots, load_config, reference_roots, write_config

SHARD_BYTES = 2048
"""32 sequences of the tiny run; a round of two members takes 80."""
ROUNDS = {"total": 4, "inner_steps": 20, "start_members": 2}


def launched(run: Swarm, config: Path) -> TokenStore:
    """The coordinator's store, whose training shards it no longer has: they are in ``all``."""
    loaded = load_config(config)
    data = loaded.run.data
    store = prepare(data, loaded.node.cache, vocab_limit=512, shard_bytes=SHARD_BYTES)
    run.coordinator()
    run.wait("coordinator", RunStarted)
    (run.directory / "all").mkdir()
    for shard in store.train.shards:
        store.place(shard).rename(run.directory / "all" / shard.file)
    return store


def lone_node(run: Swarm, name: str, **settings: Any) -> None:
    """Start a node that shares no disk with another, but for what ``settings`` name."""
    tree = yaml.safe_load(run.config.read_text())
    tree["node"] |= {"cache": str(run.directory / f"cache-{name}")} | settings
    config = run.directory / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    run.node(name, config=config)


def some(run: Swarm, store: TokenStore, name: str, numbers: range | list[int]) -> str:
    """A directory with copies of these shards."""
    directory = run.directory / name
    directory.mkdir()
    for number in numbers:
        shutil.copy(run.directory / "all" / store.train.shards[number].file, directory)
    return str(directory)


def fetched(run: Swarm, name: str) -> set[str]:
    """Roots of the shards in a node's cache."""
    return {path.name for path in (run.directory / f"cache-{name}" / "data" / "shards").iterdir()}


def notices(run: Swarm, name: str) -> list[str]:
    return [event.text for event in run.events(name, Notice)]


@pytest.mark.slow
def test_two_nodes_with_disjoint_halves_and_no_common_disk_finish_the_run(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=2, rounds=ROUNDS)
    with swarm(tmp_path / "run", config) as run:
        store = launched(run, config)
        count = len(store.train.shards)
        lone_node(run, "node-1", data_mirrors=[some(run, store, "even", range(0, count, 2))])
        lone_node(run, "node-2", data_mirrors=[some(run, store, "odd", range(1, count, 2))])
        assert run.join("node-1") == 0, run.output("node-1")
        assert run.join("node-2") == 0, run.output("node-2")
        run.join("coordinator")
        got = {name: fetched(run, name) for name in ("node-1", "node-2")}
        needed = {store.train.shards[n].root for n in shards(range(5 * 80), store.train.shape, 11)}
        assert got["node-1"]
        assert got["node-2"]
        assert not got["node-1"] & got["node-2"], "each fetched only what the other had"
        assert got["node-1"] | got["node-2"] <= needed
        assert len(needed) < count / 3
        assert any("came from other members" in text for text in notices(run, "node-1"))
        roots = certified_roots(run.directory / "node-1" / "events.jsonl")
        assert roots == certified_roots(run.directory / "node-2" / "events.jsonl")
        for shard in store.train.shards:
            (run.directory / "all" / shard.file).rename(store.place(shard))
        assert roots == reference_roots(run.directory, load_config(config))

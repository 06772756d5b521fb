"""No node has the whole corpus: shards come from wherever they are, and what is nowhere costs only its sequences."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from psyche.data.prepare import prepare
from psyche.data.token_store import TokenStore
from psyche.protocol.assignment import shards
from psyche.telemetry.event_log import LOG_NAME
from psyche.telemetry.events import MemberMetrics, Notice, RunStarted
from tests.data.test_token_store import flip_bit
from tests.processes.swarm import Swarm, swarm
from tests.tiny import certified_roots, load_config, reference_roots, write_config

SHARD_BYTES = 2048
"""32 sequences of the tiny run; a round of two members takes 80."""
SEED = 11
"""Of the tiny run."""
ROUNDS = {"total": 4, "inner_steps": 20, "start_members": 2}


def prepared(config: Path) -> TokenStore:
    """The coordinator's store."""
    loaded = load_config(config)
    return prepare(loaded.run.data, loaded.node.cache, vocab_limit=512, shard_bytes=SHARD_BYTES)


def launched(run: Swarm, store: TokenStore) -> None:
    """A coordinator that has none of the training shards any more: they are in ``all``."""
    run.coordinator()
    run.wait("coordinator", RunStarted)
    (run.directory / "all").mkdir(exist_ok=True)
    for shard in store.train.shards:
        store.path_of(shard).rename(run.directory / "all" / shard.file)


def reference(run: Swarm, store: TokenStore) -> list[str]:
    """What the run should have come to."""
    for path in (run.directory / "all").glob("*.bin"):
        path.rename(store.path / path.name)
    return reference_roots(run.directory, load_config(run.config))


def roots(run: Swarm, name: str) -> list[str]:
    return certified_roots(run.directory / name / LOG_NAME)


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
    store = prepared(config)
    with swarm(tmp_path / "run", config) as run:
        launched(run, store)
        count = len(store.train.shards)
        lone_node(run, "node-1", data_mirrors=[some(run, store, "even", range(0, count, 2))])
        lone_node(run, "node-2", data_mirrors=[some(run, store, "odd", range(1, count, 2))])
        assert run.join("node-1") == 0, run.output("node-1")
        assert run.join("node-2") == 0, run.output("node-2")
        got = {name: fetched(run, name) for name in ("node-1", "node-2")}
        needed = {store.train.shards[n].root for n in shards(range(5 * 80), store.train.layout, SEED)}
        assert got["node-1"]
        assert got["node-2"]
        assert not got["node-1"] & got["node-2"], "each fetched only what the other had"
        assert got["node-1"] | got["node-2"] <= needed
        assert len(needed) < count / 3
        assert any("came from other members" in text for text in notices(run, "node-1"))
        assert roots(run, "node-1") == roots(run, "node-2") == reference(run, store)


@pytest.mark.slow
def test_a_node_with_a_small_cache_trains_from_a_mirror_and_is_not_fooled_by_another(tmp_path: Path) -> None:
    (tmp_path / "run" / "all").mkdir(parents=True)
    (tmp_path / "run" / "lies").mkdir()
    with web(tmp_path / "run") as url:
        tree = yaml.safe_load(write_config(tmp_path, members=1).read_text())["run"]
        data = tree["data"] | {"mirrors": [f"{url}/lies", f"{url}/all"]}
        config = write_config(tmp_path, members=1, data=data, rounds=ROUNDS | {"start_members": 1, "total": 8})
        store = prepared(config)
        with swarm(tmp_path / "run", config) as run:
            launched(run, store)
            first, second = shards(range(64), store.train.layout, SEED)[:2]
            for number in (first, second):
                shard = store.train.shards[number]
                (run.directory / "lies" / shard.file).write_bytes(bytes(shard.bytes))
            limit = 4 * SHARD_BYTES
            lone_node(run, "node-1", data_cache=f"{limit}B")
            assert run.join("node-1") == 0, run.output("node-1")
            told = notices(run, "node-1")
            for number in (first, second):
                name = store.train.shards[number].file
                assert any(f"{url}/lies/{name} is not the run's" in text for text in told)
                assert any(text.startswith(name) and f"came from {url}/all in" in text for text in told)
            used = shards(range(8 * 40), store.train.layout, SEED)
            assert len(used) > 4
            assert len([text for text in told if "came from" in text]) >= len(used)
            cache = run.directory / "cache-node-1" / "data" / "shards"
            assert sum(path.stat().st_size for path in cache.iterdir()) <= limit
            assert roots(run, "node-1") == reference(run, store)


@pytest.mark.slow
def test_a_corrupt_copy_is_fetched_anew_from_another_member(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=1, rounds=ROUNDS | {"start_members": 1})
    store = prepared(config)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.wait("coordinator", RunStarted)
        copy = run.directory / "copy"
        shutil.copytree(store.path, copy)
        shard = store.train.shards[shards(range(40, 41), store.train.layout, SEED)[0]]
        flip_bit(copy / shard.file)
        lone_node(run, "node-1", data_mirrors=[str(copy)])
        assert run.join("node-1") == 0, run.output("node-1")
        assert any(f"{copy / shard.file} is corrupt, so" in text for text in notices(run, "node-1"))
        assert fetched(run, "node-1") == {shard.root}
        assert roots(run, "node-1") == reference(run, store)


@pytest.mark.slow
def test_a_shard_that_nobody_has_costs_its_sequences_and_not_the_run(tmp_path: Path) -> None:
    quick = {"round_min": 3.0, "round_max": 60.0, "exchange_min": 5.0, "exchange_max": 20.0, "silence": 10.0}
    config = write_config(tmp_path, members=2, rounds=ROUNDS, deadlines=quick)
    store = prepared(config)
    with swarm(tmp_path / "run", config) as run:
        launched(run, store)
        lost = shards(range(100, 101), store.train.layout, SEED)[0]  # of the second round
        rest = [number for number in range(len(store.train.shards)) if number != lost]
        there = some(run, store, "there", rest)
        for name in ("node-1", "node-2"):
            lone_node(run, name, data_mirrors=[there])
        for name in ("node-1", "node-2"):
            assert run.join(name) == 0, run.output(name)
        assert roots(run, "node-1") == roots(run, "node-2")
        assert len(roots(run, "node-1")) == ROUNDS["total"]
        told = [text for name in ("node-1", "node-2") for text in notices(run, name)]
        assert any(f"{store.train.shards[lost].file} cannot be had" in text for text in told)
        done = [event.inner_steps for name in ("node-1", "node-2") for event in run.events(name, MemberMetrics)]
        assert any(0 < steps < 20 for steps in done), "the steps before it were handed in"


@pytest.mark.slow
def test_two_nodes_of_one_machine_fetch_each_shard_once(tmp_path: Path) -> None:
    config = write_config(tmp_path, members=2, rounds=ROUNDS)
    store = prepared(config)
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        run.wait("coordinator", RunStarted)
        for name in ("node-1", "node-2"):
            lone_node(run, name, cache=str(run.directory / "cache-shared"))
        for name in ("node-1", "node-2"):
            assert run.join(name) == 0, run.output(name)
        came = [text for name in ("node-1", "node-2") for text in notices(run, name) if "came from" in text]
        assert 5 < len(came) == len(fetched(run, "shared"))
        assert roots(run, "node-1") == roots(run, "node-2") == reference(run, store)


@contextmanager
def web(directory: Path) -> Iterator[str]:
    """The URL of a server of files."""
    handler = partial(Quiet, directory=str(directory))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Tests are quiet."""

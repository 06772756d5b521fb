"""A node that is behind applies the steps it missed; a run resumes after all its processes are killed."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from psyche.bench.harness import paced_engine
from psyche.bench.harness.paced_engine import PACE
from psyche.config import MANIFEST, Manifest
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.telemetry.events import CaughtUp, PeerLeft, Resynchronised, RoundCertified
from tests.processes.swarm import swarm
from tests.tiny import MODEL, certified_roots, write_config

PACED = paced_engine.__name__
ROUNDS = {"inner_steps": 40, "min_members": 1, "total": 500}
QUICK = {"round_min": 3.0, "round_max": 20.0, "exchange_min": 3.0, "exchange_max": 10.0, "silence": 5.0}


@pytest.mark.slow
def test_a_node_that_missed_rounds_applies_their_outer_steps(tmp_path: Path) -> None:
    """Payloads are small and rounds long, so fetching the state would cost more."""
    rounds = ROUNDS | {"start_members": 3, "inner_steps": 200}
    config = write_config(tmp_path, members=3, rounds=rounds, deadlines=QUICK, codec={"name": "topk2"})
    config.write_text(
        config.read_text().replace("checkpoint_every: 2", "checkpoint_every: 10")
    )  # also sets how many rounds of payloads are kept
    names = ["node-1", "node-2", "node-3"]
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in names:
            run.node(name)
        run.wait("node-3", RoundCertified, lambda event: event.round == 3)  # it has no checkpoint yet
        run.kill("node-3")
        gone = run.wait("coordinator", PeerLeft)
        run.wait("coordinator", RoundCertified, lambda event: event.round > gone.round + 1)
        run.node("node-3")
        own = run.wait("node-3", CaughtUp)
        assert own.round >= 3, "it replays its own rounds from its disk"
        back = run.wait("node-3", CaughtUp, lambda event: event.round > own.round)
        run.wait("coordinator", RoundCertified, lambda event: event.round > back.round and gone.peer in event.accepted)
        assert not run.events("node-3", Resynchronised), "no state was fetched"
        for name in (*names, "coordinator"):
            run.kill(name, signal.SIGINT)
    roots = dict(enumerate(certified_roots(tmp_path / "run" / "node-1" / "events.jsonl"), 1))
    with Ledger.read(tmp_path / "run" / "node-3" / LEDGER) as ledger:
        assert ledger.missing() == ()
        for entry in ledger.entries():
            assert entry.state_root is not None
            assert roots.get(entry.round, entry.state_root.hex()) == entry.state_root.hex()


@pytest.mark.slow
def test_a_run_whose_processes_are_all_killed_resumes_where_it_was(tmp_path: Path) -> None:
    """Checkpoints are of earlier rounds; later payloads are in every node's journal."""
    config = write_config(tmp_path, members=2, rounds=ROUNDS | {"start_members": 2}, deadlines=QUICK)
    names = ["node-1", "node-2", "coordinator"]
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in names[:2]:
            run.node(name)
        run.wait("coordinator", RoundCertified, lambda event: event.round == 5)
        run.cut_power()
        last = run.events("coordinator", RoundCertified)[-1]
        run.coordinator()
        for name in names[:2]:
            run.node(name)
        run.wait("coordinator", RoundCertified, lambda event: event.round > last.round + 1)
        for name in names:
            run.kill(name, signal.SIGINT)
        certified = [event.round for event in run.events("coordinator", RoundCertified)]
        assert certified == list(range(1, certified[-1] + 1)), "no round was lost, and none certified again"
        for name in names:
            with Ledger.read(run.directory / name / LEDGER) as ledger:
                assert ledger.superseded() == []
    first, second = (certified_roots(tmp_path / "run" / name / "events.jsonl") for name in names[:2])
    shared = min(len(first), len(second))
    assert first[:shared] == second[:shared]


@pytest.mark.slow
def test_a_state_that_changes_during_the_transfer_is_still_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transfer takes four rounds or more; chunks that have arrived are advanced by each outer step."""
    monkeypatch.setenv(PACE, "0.3")
    settings = MODEL | {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    rounds = ROUNDS | {"start_members": 2, "inner_steps": 10}
    changes = {"rounds": rounds, "deadlines": QUICK, "codec": {"name": "topk2"}}
    config = write_config(tmp_path, members=2, model={"architecture": "llama", "settings": settings}, **changes)
    text = config.read_text().replace("checkpoint_every: 2", "checkpoint_every: 1000")  # no checkpoints
    config.write_text(text)
    slow = tmp_path / "slow.yaml"
    slow.write_text(
        text.replace("checkpoint_every: 1000", "checkpoint_every: 1\n  checkpoints_kept: 1\n  max_download: 16mbit")
    )
    with swarm(tmp_path / "run", config) as run:
        run.coordinator()
        for name in ("node-1", "node-2"):
            run.node(name, module=PACED)
        run.wait("coordinator", RoundCertified, lambda event: event.round == 3)
        run.node("node-3", module=PACED, config=slow)
        got = run.wait("node-3", Resynchronised)
        me = got.node
        run.wait("coordinator", RoundCertified, lambda event: me in event.accepted)
        assert got.moved > 0, "rounds were shorter than the transfer"
        state = 2 * 4 * Manifest.decode((tmp_path / "run" / "node-3" / MANIFEST).read_bytes()).resolved.flat_size
        assert state <= sum(count for _, count in got.gave) < 1.5 * state, "few chunks were fetched twice"
        assert len(got.gave) == 2, "from both donors"
        for name in ("node-1", "node-2", "node-3", "coordinator"):
            run.kill(name, signal.SIGINT)
    roots = dict(enumerate(certified_roots(tmp_path / "run" / "node-1" / "events.jsonl"), 1))
    assert roots[got.round] == got.state_root

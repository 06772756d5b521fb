"""Six nodes and two coordinators under random faults keep one chain and bit-equal states and leave no orphan process.

PSYCHE_CHAOS_SECONDS is how long faults last for each seed (default 150); PSYCHE_CHAOS_SEED selects the seeds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from psyche.config import MANIFEST, Manifest, load_config
from psyche.ledger.store import NAME as LEDGER
from psyche.ledger.store import Ledger
from psyche.ledger.verify import verify_ledger
from psyche.network.identity import IDENTITY, Identity
from psyche.telemetry.events import RoundCertified
from tests.processes.swarm import Swarm, standby_key
from tests.slow.chaos import summary
from tests.slow.chaos.fault_injector import FaultInjector
from tests.slow.chaos.faults import KINDS, PLAIN, schedule
from tests.slow.chaos.observer import RunObserver
from tests.slow.chaos.replay import Reference, records_of
from tests.slow.chaos.testbed import COORDINATOR, Testbed, make_testbed, missing_requirement
from tests.tiny import write_config

SECONDS = float(os.environ.get("PSYCHE_CHAOS_SECONDS", "150"))
SEEDS = [int(seed) for seed in os.environ.get("PSYCHE_CHAOS_SEED", "1,2").split(",")]
NODES = [f"node-{number}" for number in range(1, 7)]
SPARE = [f"node-{number}" for number in range(7, 7 + max(2, round(SECONDS / 200)))]
STANDBY = "standby"
COORDINATORS = [COORDINATOR, STANDBY]
QUICK = {"round_min": 3.0, "round_max": 20.0, "exchange_min": 3.0, "exchange_max": 10.0, "silence": 5.0, "lease": 4.0}
RECOVERY_SECONDS = 300.0
"""Timeout for every node to take part in a round again: a guard, not a measurement."""
LOSS_TOLERANCE = 0.02
"""Allowed relative excess of the run's loss over that of undisturbed runs."""


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS + 1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_swarm_under_random_faults_keeps_one_chain(tmp_path: Path, seed: int) -> None:
    if (reason := missing_requirement()) is not None:
        print(f"no faults of networks, disks and clocks: {reason}")
    faults = schedule(seed, SECONDS, NODES, COORDINATORS, SPARE, PLAIN if reason else KINDS)
    names = [*COORDINATORS, *NODES, *SPARE]
    with make_testbed(tmp_path / "run", names, standbys=[STANDBY], without_data=SPARE, plain=reason is not None) as run:
        run.config = configure(tmp_path, run.directory)
        with RunObserver(run, tmp_path / "payloads") as watch:
            injector = FaultInjector(run, watch.seen)
            injector.begin(*COORDINATORS, *NODES)
            injector.wait_for_all({name: peer_id(run, name) for name in NODES}, RECOVERY_SECONDS)
            injector.run_schedule(faults, SECONDS)
            nodes = {name: peer_id(run, name) for name in injector.present if name not in COORDINATORS}
            complete = injector.wait_for_all(nodes, RECOVERY_SECONDS)
            injector.stop_all()
        print(f"\nseed {seed}, {SECONDS:.0f} s", *faults, sep="\n")
        print(summary.endings(injector))
        print(summary.table(injector, watch.seen, COORDINATORS))
        print(summary.leaving(injector))
        assert not injector.unexplained()
        assert not watch.orphans()
        ever = [name for name in names if (run.directory / name / LEDGER).exists()]
        roots = compare(run, ever)
        assert len({root_in(run, name, complete) for name in nodes}) == 1
        print(f"{len(roots)} rounds certified; all nodes took part in round {complete}")
        check_against_the_reference(run, ever, roots, tmp_path / "payloads")


def configure(directory: Path, run: Path) -> Path:
    # A node that is alone in a round could leave for good and take the run's only state with it.
    rounds = {"inner_steps": 20, "total": 20000, "start_members": len(NODES), "min_members": 2}
    return write_config(
        directory,
        members=len(NODES),
        rounds=rounds,
        deadlines=QUICK,
        standbys=[standby_key(run / STANDBY)],
        inner={"lr": 0.001, "batch_size": 2, "warmup_steps": 20},
        outer={"momentum": 0.7},
        heldout_sequences=128,
        exchange={"kind": "gather"},
    )


def compare(run: Swarm, names: Sequence[str]) -> dict[int, str]:
    """Check that all nodes hold the same verified chain and states; return the state root after each round."""
    manifest = Manifest.decode((run.directory / names[0] / MANIFEST).read_bytes())
    hashes: dict[int, bytes | None] = {}
    roots: dict[int, str] = {}
    for name in names:
        verify_ledger(run.directory / name / LEDGER, manifest)
        with Ledger.read(run.directory / name / LEDGER) as ledger:
            assert not ledger.superseded(), name
            for entry in ledger.entries():
                found = ledger.hash_of(entry.round)
                assert hashes.setdefault(entry.round, found) == found, (name, entry.round)
                if entry.state_root is not None:
                    root = entry.state_root.hex()
                    assert roots.setdefault(entry.round, root) == root, (name, entry.round)
        for event in run.events(name, RoundCertified):
            assert roots.setdefault(event.round, event.state_root) == event.state_root, (name, event.round)
        assert "Traceback" not in run.output(name), run.output(name)[-3000:]
    assert sorted(hashes) == list(range(1, max(hashes) + 1)), "a round is missing"
    return roots


def check_against_the_reference(run: Testbed, names: Sequence[str], roots: dict[int, str], payloads: Path) -> None:
    """Check that one process replaying the records and payloads gets the same states."""
    manifest = Manifest.decode((run.directory / names[0] / MANIFEST).read_bytes())
    records = records_of([run.directory / name / LEDGER for name in names])
    keys = tuple(run.directory / name / IDENTITY for name in names if name not in COORDINATORS)
    reference = Reference(manifest, load_config(run.config).node, keys)
    replayed, taker = reference.replay(records, payloads)
    assert {number: root.hex() for number, root in enumerate(replayed, 1)} == roots
    found = reference.losses(records, taker)
    print(summary.losses(found))
    assert found.after < found.before
    assert found.after <= max(found.undisturbed, *found.reordered) * (1 + LOSS_TOLERANCE)


def root_in(run: Swarm, name: str, round_number: int) -> str:
    """Return a node's state root after a round it took part in."""
    return next(event.state_root for event in run.events(name, RoundCertified) if event.round == round_number)


def peer_id(run: Swarm, name: str) -> str:
    return Identity.load_or_create(run.directory / name / IDENTITY).peer_id

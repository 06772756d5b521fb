"""Six nodes and two coordinators, to which everything happens that can: one chain, the same bits, no orphan.

PSYCHE_CHAOS_SECONDS of faults a seed, 150 by default; PSYCHE_CHAOS_SEED plays the story of one seed.
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
from tests.slow.chaos.conductor import Conductor
from tests.slow.chaos.faults import KINDS, PLAIN, schedule
from tests.slow.chaos.replay import Reference, records_of
from tests.slow.chaos.watch import Watch
from tests.slow.chaos.world import COORDINATOR, World, why_not, world
from tests.tiny import write_config

SECONDS = float(os.environ.get("PSYCHE_CHAOS_SECONDS", "150"))
SEEDS = [int(seed) for seed in os.environ.get("PSYCHE_CHAOS_SEED", "1,2").split(",")]
NODES = [f"node-{number}" for number in range(1, 7)]
SPARE = [f"node-{number}" for number in range(7, 7 + max(2, round(SECONDS / 200)))]
STANDBY = "standby"
COORDINATORS = [COORDINATOR, STANDBY]
QUICK = {"round_min": 3.0, "round_max": 20.0, "exchange_min": 3.0, "exchange_max": 10.0, "silence": 5.0, "lease": 4.0}
WHOLE_SECONDS = 300.0
"""Until everybody is in a round again. A guard, not a measurement."""
WORSE = 0.02
"""A run's loss may be so much above those of undisturbed ones, relatively."""


@pytest.mark.slow
@pytest.mark.timeout(3 * SECONDS + 1800)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_swarm_under_random_faults_keeps_one_chain(tmp_path: Path, seed: int) -> None:
    if (reason := why_not()) is not None:
        print(f"networks, disks and clocks are left alone: {reason}")
    story = schedule(seed, SECONDS, NODES, COORDINATORS, SPARE, PLAIN if reason else KINDS)
    names = [*COORDINATORS, *NODES, *SPARE]
    with world(tmp_path / "run", names, standbys=[STANDBY], strangers=SPARE, plain=reason is not None) as run:
        run.config = configure(tmp_path, run.directory)
        with Watch(run, tmp_path / "payloads") as watch:
            conductor = Conductor(run, watch.seen)
            conductor.begin(*COORDINATORS, *NODES)
            conductor.wait_for_all({name: peer_id(run, name) for name in NODES}, WHOLE_SECONDS)
            conductor.play(story, SECONDS)
            nodes = {name: peer_id(run, name) for name in conductor.present if name not in COORDINATORS}
            whole = conductor.wait_for_all(nodes, WHOLE_SECONDS)
            conductor.stop_all()
        print(f"\nseed {seed}, {SECONDS:.0f} s", *story, sep="\n")
        print(summary.endings(conductor))
        print(summary.table(conductor, watch.seen, COORDINATORS))
        print(summary.leaving(conductor))
        assert not conductor.unexplained()
        assert not watch.orphans()
        ever = [name for name in names if (run.directory / name / LEDGER).exists()]
        roots = compare(run, ever)
        assert len({root_in(run, name, whole) for name in nodes}) == 1
        print(f"{len(roots)} rounds certified; everybody was in round {whole}")
        check_against_the_reference(run, ever, roots, tmp_path / "payloads")


def configure(directory: Path, run: Path) -> Path:
    # Whoever were in a round alone could leave for good, and take the run's state along.
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
    """All that anybody holds of a round is the same, and proven; the state_root after each round."""
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


def check_against_the_reference(run: World, names: Sequence[str], roots: dict[int, str], payloads: Path) -> None:
    """One process, given the records and the payloads they name, comes to the same bits after every round."""
    manifest = Manifest.decode((run.directory / names[0] / MANIFEST).read_bytes())
    records = records_of([run.directory / name / LEDGER for name in names])
    keys = tuple(run.directory / name / IDENTITY for name in names if name not in COORDINATORS)
    reference = Reference(manifest, load_config(run.config).node, keys)
    replayed, taker = reference.replay(records, payloads)
    assert {number: root.hex() for number, root in enumerate(replayed, 1)} == roots
    found = reference.losses(records, taker)
    print(summary.losses(found))
    assert found.after < found.before
    assert found.after <= max(found.undisturbed, *found.dealt) * (1 + WORSE)


def root_in(run: Swarm, name: str, round_number: int) -> str:
    """What a node came to hold after a round it went through."""
    return next(event.state_root for event in run.events(name, RoundCertified) if event.round == round_number)


def peer_id(run: Swarm, name: str) -> str:
    return Identity.load_or_create(run.directory / name / IDENTITY).peer_id

"""The benches on shaped links, with rival systems: measurements are checked, speeds are not asserted."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from psyche.bench import joining, mixed_speeds, utilisation
from psyche.bench.exchange import exchange_speed
from psyche.bench.harness.shaped_links import namespaces, remove_stale
from tests.bench.test_shaped_links import needs_namespaces
from tests.processes.swarm import PATIENCE, alive, descendants

MBIT = 10**6


@pytest.mark.slow
@needs_namespaces
def test_all_systems_average_the_same_vectors_and_none_exceeds_its_bandwidth() -> None:
    plan = exchange_speed.Plan(
        peers=3,
        parameters=1 << 20,
        codecs=("int8", "topk2"),
        exchanges=("gather", "sharded"),
        rate=50 * MBIT,
        repeats=2,
    )
    result = exchange_speed.measure(plan)
    assert [row.system for row in result.rows] == ["psyche"] * 4 + ["hivemind"] * 2 + ["gloo"], result.notes
    for row in result.rows:
        assert row.averaged == 3
        assert row.relative_error < {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.05, "topk2": 2.0}[row.codec]
        assert row.ideal_seconds is not None
        assert 0.95 * row.ideal_seconds < row.seconds, "the rate limit is not enforced"
        assert row.share_of_line == pytest.approx(row.ideal_seconds / row.seconds, rel=0.5)
        assert row.bytes_down is not None
        assert row.bytes_down * 8 / (50 * MBIT) > 0.9 * row.ideal_seconds, "bytes were not counted"
    assert not namespaces()


@pytest.mark.slow
@needs_namespaces
def test_a_killed_bench_leaves_no_process_and_the_next_one_removes_its_namespaces() -> None:
    command = [sys.executable, "-m", "psyche", "bench", "exchange", "--peers", "2", "--params", "4M"]
    with subprocess.Popen(
        [*command, "--rate", "1mbit", "--no-rivals"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + PATIENCE
        while (
            len(below := descendants(process.pid)) < 6 and time.monotonic() < deadline
        ):  # three processes, each with its p2pd
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    while any(map(alive, below)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in below if alive(pid)]
    remove_stale()
    assert not namespaces()


@pytest.mark.slow
@needs_namespaces
def test_overlap_raises_the_share_of_time_a_node_trains() -> None:
    plan = utilisation.Plan(peers=3, ratio=0.5, modes=("none", "tail"), rounds=3, step_seconds=0.1)
    rows = utilisation.measure(utilisation.planned_runs(plan))
    shares = {
        mode: min(row.utilisation for row in rows if row.overlap == mode and row.node.startswith("node-"))
        for mode in plan.modes
    }
    assert len(rows) == 6
    assert all(row.rounds == 3 and row.step_seconds >= 0.1 for row in rows)
    assert shares["none"] < 0.75 < shares["tail"] <= 1.01


@pytest.mark.slow
@needs_namespaces
def test_a_joining_node_fetches_the_state_from_all_donors_within_its_bandwidth() -> None:
    plan = joining.Plan(peers=2, parameters=4_000_000, rate=50 * MBIT, at=(0.0, 0.5), inner_steps=20, step_seconds=0.5)
    rows = joining.measure(joining.planned_join(plan))
    assert [row.at for row in rows] == [0.0, 0.5]
    for row in rows:
        assert row.donors == 2
        assert 0 < row.line_share < 0.97, "the rate limit is not enforced"
        assert 0 < row.imported < row.connected < row.asked < row.fetched <= row.first_step <= row.member
        assert row.round_before >= 10
        assert row.round_during >= 10
    assert not namespaces()


@pytest.mark.slow
def test_in_later_rounds_nodes_are_assigned_work_by_their_speed() -> None:
    """Shares of work are asserted; durations are not, because the machine may be busy."""
    found = mixed_speeds.measure(mixed_speeds.Plan((1.0, 2.0, 4.0), step_seconds=0.2, inner_steps=20, rounds=3))
    slow, middle, fast = found.rows
    assert (slow.first_quota, middle.first_quota, fast.first_quota) == (20, 20, 20)
    assert slow.first_done < 20, "the slow node returned the rest"
    assert slow.done < 0.4 * fast.done
    assert slow.done < middle.done < 0.75 * fast.done
    assert all(row.rounds == 3 and 0 < row.idle < 1 for row in found.rows)
    assert found.training < found.equal

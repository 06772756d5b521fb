"""After a partition with a coordinator on each side, a vote promised on one side does not exclude a member."""

from __future__ import annotations

from pathlib import Path

import pytest

from psyche.telemetry.events import Notice, PeerLeft, RoundCertified
from tests.coordinator.test_failover import QUICK
from tests.processes.swarm import standby_key
from tests.slow.chaos.testbed import COORDINATOR, make_testbed, missing_requirement
from tests.tiny import write_config

NODES = ["node-1", "node-2", "node-3"]


@pytest.mark.slow
@pytest.mark.skipif(missing_requirement() is not None, reason=missing_requirement() or "")
def test_a_member_that_promised_to_the_other_coordinator_rejoins_after_the_partition(tmp_path: Path) -> None:
    """The standby leads throughout; its terms grow past the one that the member promised."""
    with make_testbed(tmp_path / "run", [COORDINATOR, "standby", *NODES], standbys=["standby"]) as run:
        key = standby_key(run.directory / "standby")
        rounds = {"inner_steps": 20, "total": 5000, "start_members": 3, "min_members": 1}
        run.config = write_config(tmp_path, members=3, rounds=rounds, deadlines=QUICK, standbys=[key])
        for name in [COORDINATOR, "standby", *NODES]:
            run.begin(name)
        run.wait(COORDINATOR, RoundCertified)
        run.kill(COORDINATOR)
        run.wait("standby", Notice, lambda event: event.text.startswith("leading, in term"))
        run.wait("standby", RoundCertified)
        run.begin(COORDINATOR)
        run.wait(COORDINATOR, Notice, lambda event: event.text.startswith("standing by"))
        run.kill("node-3")
        gone = run.wait("standby", PeerLeft)
        reached = run.wait("standby", RoundCertified, lambda event: event.round > gone.round + 1)
        assert gone.peer not in reached.accepted, "the others continue without it and its vote"

        run.part([COORDINATOR, "node-3"])
        run.begin("node-3")
        run.wait("node-3", Notice, lambda event: event.text.startswith("the coordinator says: restarted after round"))
        later = run.events("standby", RoundCertified)[-1].round
        run.wait("standby", RoundCertified, lambda event: event.round > later + 5)
        run.unite()
        later = run.events("standby", RoundCertified)[-1].round
        run.wait("node-3", RoundCertified, lambda event: event.round > later and gone.peer in event.accepted)

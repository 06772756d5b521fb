"""A privacy budget: what Opacus says of it, and that nothing spent is ever given back."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from psyche.diloco.local_data import PrivacyBudgetSpent
from psyche.errors import PsycheError
from psyche.federated.privacy_budget import NAME, Budget, noise_for

DELTA = 1e-6


@pytest.mark.parametrize(("noise", "releases"), [(1.0, 1), (2.5, 7), (20.0, 100), (0.3, 3)])
def test_epsilon_is_the_accountants(tmp_path: Path, noise: float, releases: int) -> None:
    from opacus.accountants import RDPAccountant

    budget = Budget(tmp_path, 1e9, DELTA, noise)
    assert budget.spent == 0.0
    accountant = RDPAccountant()
    for _ in range(releases):
        budget.charge()
        accountant.step(noise_multiplier=noise, sample_rate=1.0)
    assert budget.spent == accountant.get_epsilon(DELTA)


def test_other_noise_later_is_added_up_as_the_accountant_does(tmp_path: Path) -> None:
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    for noise, delta in ((3.0, 1e-5), (1.0, 1e-7), (3.0, 1e-5)):
        Budget(tmp_path, 1e9, delta, noise).charge()
        accountant.step(noise_multiplier=noise, sample_rate=1.0)
        assert Budget(tmp_path, 1e9, delta, noise).spent == accountant.get_epsilon(delta)


@pytest.mark.parametrize(("epsilon", "releases"), [(1.0, 10), (8.0, 100), (200.0, 5)])
def test_noise_is_found_that_makes_the_budget_last(tmp_path: Path, epsilon: float, releases: int) -> None:
    noise = noise_for(epsilon, DELTA, releases)
    budget = Budget(tmp_path, epsilon, DELTA, noise)
    assert budget.rounds_left(10 * releases) == releases
    for left in reversed(range(releases)):
        budget.charge()
        assert budget.rounds_left(10 * releases) == left
    assert 0.98 * epsilon < budget.spent <= epsilon
    with pytest.raises(PrivacyBudgetSpent, match=r"the privacy budget is spent: ε is .* of "):
        budget.charge()
    assert Budget(tmp_path, epsilon, DELTA, noise).rounds_left(10) == 0, "nor does it come back"


def test_a_budget_that_no_noise_can_keep_is_refused() -> None:
    with pytest.raises(PsycheError, match="too low"):
        noise_for(0.01, DELTA, 100)


@pytest.mark.slow
def test_who_is_killed_before_it_can_send_has_paid_all_the_same(tmp_path: Path) -> None:
    """SIGKILL between the charge and what it pays for; with a budget for two, the third is refused."""
    noise = noise_for(8.0, DELTA, 2)
    code = (
        "import os, signal, sys; from pathlib import Path; from psyche.federated.privacy_budget import Budget\n"
        f"budget = lambda: Budget(Path(sys.argv[1]), 8.0, {DELTA}, {noise})\n"
        "print(budget().rounds_left(5))\n"
        "for _ in range(2):\n"
        "    if not (child := os.fork()):\n"
        "        budget().charge(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), budget().rounds_left(5), flush=True)"
    )
    said = subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True)
    killed = -signal.SIGKILL
    assert [int(word) for word in said.split()] == [2, killed, 1, killed, 0]
    with pytest.raises(PrivacyBudgetSpent):
        Budget(tmp_path, 8.0, DELTA, noise).require()


def test_the_directory_is_closed_to_others_before_anything_private_is_in_it(tmp_path: Path) -> None:
    node = tmp_path / "node"
    for mode in (None, 0o755, 0o777):
        if mode is not None:
            node.chmod(mode)
        Budget(node, 8.0, DELTA, 1.0)
        assert node.stat().st_mode & 0o777 == 0o700


def test_where_others_cannot_be_kept_out_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without users, where chmod says that all is well; one where it is not allowed."""
    tmp_path.chmod(0o755)
    monkeypatch.setattr(Path, "chmod", lambda path, mode: None)
    with pytest.raises(PsycheError, match=r"other users can read .*: choose another directory with --directory"):
        Budget(tmp_path, 8.0, DELTA, 1.0)

    def refused(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "chmod", refused)
    with pytest.raises(PsycheError, match=r"Operation not permitted\): choose another directory with --directory"):
        Budget(tmp_path, 8.0, DELTA, 1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"[", b"{}", b'[{"noise_multiplier":0,"releases":1}]', b"\xff"])
def test_a_record_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(PsycheError, match="cannot read the spent"):
        Budget(tmp_path, 1.0, DELTA, 1.0)

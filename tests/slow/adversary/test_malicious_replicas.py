"""A quarter of the nodes is malicious: the effect on them, on honest nodes and on the model.

Prints a line for each attack; ``attack_table.py`` runs more seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from psyche.audit.simulated_audits import VerdictPolicy
from tests.slow.adversary.malicious_auditors import always_unsure, collude, fail_honest, pass_all
from tests.slow.adversary.malicious_nodes import ATTACKS, Cheat, noise, scaled, with_attack, withhold_bundles, zero
from tests.slow.adversary.simulated_run import RunResult, run

pytestmark = pytest.mark.slow

NODE_ROUNDS = int(os.environ.get("PSYCHE_HONEST_NODE_ROUNDS", "800"))
"""Rounds times honest nodes that must pass without a conviction."""
BIG = {"nodes": 16, "hostile": 4, "rounds": 12}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def check(name: str, result: RunResult) -> None:
    """Check that exactly the malicious nodes are banned and unpaid, and print how long that took."""
    found = result.convicted_in()
    outliers = sorted(result.first_outlier().values())
    print(f"{name}: rounds {sorted(found.values())}, outliers {outliers}, loss {result.loss:.4f}")
    assert result.banned == result.hostile
    assert result.paid(result.hostile) == 0
    honest = set(result.records[-1].voters) - result.hostile
    assert result.paid(honest) > 0


@pytest.mark.parametrize("attack_name", ATTACKS)
def test_only_nodes_that_cheat_in_their_work_are_convicted(tmp_path: Path, cache: Path, attack_name: str) -> None:
    check(attack_name, run(tmp_path, cache, nodes=8, hostile=2, rounds=20, attack=ATTACKS[attack_name]))


@pytest.mark.parametrize(("attack_name", "forge"), [("zero update", zero), ("noise", noise), ("sign flip", scaled(-1))])
def test_four_of_sixteen_nodes_that_cheat_and_collude_are_convicted(
    tmp_path: Path, cache: Path, attack_name: str, forge: Callable[..., object]
) -> None:
    check(f"{attack_name}, 16 nodes", run(tmp_path, cache, **BIG, attack=with_attack(forge=forge), policy=collude))


def test_auditors_that_fail_honest_work_are_convicted(tmp_path: Path, cache: Path) -> None:
    check("fail_honest", run(tmp_path, cache, nodes=8, hostile=2, rounds=20, attack=with_attack(), policy=fail_honest))


@pytest.mark.parametrize("policy", [collude, pass_all])
def test_auditors_that_pass_a_cheating_node_are_convicted_with_it(
    tmp_path: Path, cache: Path, policy: Callable[[frozenset[str]], VerdictPolicy]
) -> None:
    check(
        policy.__name__,
        run(tmp_path, cache, nodes=8, hostile=2, rounds=20, attack=ATTACKS["other data"], policy=policy),
    )


@pytest.mark.parametrize("policy", [pass_all, always_unsure])
def test_auditors_that_do_not_replay_are_convicted_even_when_all_work_is_honest(
    tmp_path: Path, cache: Path, policy: Callable[[frozenset[str]], VerdictPolicy]
) -> None:
    check(policy.__name__, run(tmp_path, cache, nodes=8, hostile=2, rounds=30, attack=with_attack(), policy=policy))


def test_nodes_that_withhold_bundles_forfeit_the_credit_of_audited_work_and_are_banned(
    tmp_path: Path, cache: Path
) -> None:
    result = run(tmp_path, cache, nodes=8, hostile=2, rounds=20, attack=withhold_bundles)
    lost = [one for one in result.closed if one.outcome == "unserved"]
    assert lost
    assert {one.accused for one in lost} <= result.hostile
    assert result.banned <= result.hostile
    assert result.credits is not None
    for one in lost:
        assert result.credits.account(one.accused).forfeited > 0


def test_no_honest_node_is_ever_convicted(tmp_path: Path, cache: Path) -> None:
    """Honest nodes that are outliers by chance pass their audits."""
    rounds = NODE_ROUNDS // 8
    result = run(tmp_path, cache, nodes=8, hostile=0, rounds=rounds)
    outcomes = [one.outcome for one in result.closed]
    outliers = sum(len(record.audit_state.suspects) for record in result.records)
    print(f"{8 * rounds} honest node-rounds: {len(outcomes)} audits, {outliers} outliers")
    assert set(outcomes) <= {"passed"}
    assert len(outcomes) > 0.05 * 8 * rounds
    assert not result.banned


def test_a_node_that_turns_malicious_forfeits_its_pending_credit(tmp_path: Path, cache: Path) -> None:
    def attack(cheat: Cheat) -> None:
        with_attack(forge=zero)(cheat)

    result = run(tmp_path, cache, nodes=8, hostile=2, rounds=20, attack=attack, from_round=8)
    assert result.banned == result.hostile
    assert all(round_number > 8 for round_number in result.convicted_in().values())
    assert result.paid(result.hostile) == 0, "all of its credit was still pending"

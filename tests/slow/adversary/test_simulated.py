"""A quarter of the nodes lies, each in one way: what becomes of them, of the honest, and of the model.

Prints a line for each way; ``table.py`` beside this has more seeds.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from psyche.audit.simulated_audits import VerdictPolicy
from tests.slow.adversary.cheats import WAYS, Cheat, armed, hands_nothing_over, noise, scaled, zero
from tests.slow.adversary.liars import shrug, slander, vouch, wave_through
from tests.slow.adversary.simulated import Ran, run

pytestmark = pytest.mark.slow

NODE_ROUNDS = int(os.environ.get("PSYCHE_HONEST_NODE_ROUNDS", "800"))
"""Of honest nodes, without a conviction."""
BIG = {"nodes": 16, "hostile": 4, "rounds": 12}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def check(name: str, ran: Ran) -> None:
    """Those who lied are gone and unpaid, nobody else is; how long that took goes to the output."""
    found = ran.convicted_in()
    print(f"{name}: rounds {sorted(found.values())}, stood out {sorted(ran.named_in().values())}, loss {ran.loss:.4f}")
    assert ran.banned == ran.hostile
    assert ran.paid(ran.hostile) == 0
    honest = set(ran.records[-1].voters) - ran.hostile
    assert ran.paid(honest) > 0


@pytest.mark.parametrize("way", WAYS)
def test_whoever_lies_about_its_work_is_convicted_and_nobody_else(tmp_path: Path, cache: Path, way: str) -> None:
    check(way, run(tmp_path, cache, nodes=8, hostile=2, rounds=20, arm=WAYS[way]))


@pytest.mark.parametrize(("way", "forge"), [("zero update", zero), ("noise", noise), ("sign flip", scaled(-1))])
def test_a_quarter_of_sixteen_that_vouch_for_each_other(
    tmp_path: Path, cache: Path, way: str, forge: Callable[..., object]
) -> None:
    check(f"{way}, 16 nodes", run(tmp_path, cache, **BIG, arm=armed(forge=forge), judge=vouch))


def test_auditors_that_slander_are_convicted_of_it(tmp_path: Path, cache: Path) -> None:
    check("slander", run(tmp_path, cache, nodes=8, hostile=2, rounds=20, arm=armed(), judge=slander))


@pytest.mark.parametrize("judge", [vouch, wave_through])
def test_auditors_that_pass_a_cheat_go_down_with_it(
    tmp_path: Path, cache: Path, judge: Callable[[frozenset[str]], VerdictPolicy]
) -> None:
    check(judge.__name__, run(tmp_path, cache, nodes=8, hostile=2, rounds=20, arm=WAYS["other data"], judge=judge))


@pytest.mark.parametrize("judge", [wave_through, shrug])
def test_auditors_that_do_not_look_are_found_out_where_all_work_is_honest(
    tmp_path: Path, cache: Path, judge: Callable[[frozenset[str]], VerdictPolicy]
) -> None:
    check(judge.__name__, run(tmp_path, cache, nodes=8, hostile=2, rounds=30, arm=armed(), judge=judge))


def test_a_node_that_withholds_its_work_forfeits_it_and_is_banned_in_the_end(tmp_path: Path, cache: Path) -> None:
    ran = run(tmp_path, cache, nodes=8, hostile=2, rounds=20, arm=hands_nothing_over)
    lost = [one for one in ran.closed if one.outcome == "unserved"]
    assert lost
    assert {one.accused for one in lost} <= ran.hostile
    assert ran.banned <= ran.hostile
    assert ran.credits is not None
    for one in lost:
        assert ran.credits.account(one.accused).forfeited > 0


def test_no_honest_node_is_ever_convicted(tmp_path: Path, cache: Path) -> None:
    """Of those that stand out by chance, none fails an audit."""
    rounds = NODE_ROUNDS // 8
    ran = run(tmp_path, cache, nodes=8, hostile=0, rounds=rounds)
    outcomes = [one.outcome for one in ran.closed]
    stood_out = sum(len(record.audit_state.suspects) for record in ran.records)
    print(f"{8 * rounds} honest node-rounds: {len(outcomes)} audits, {stood_out} stood out")
    assert set(outcomes) <= {"passed"}
    assert len(outcomes) > 0.05 * 8 * rounds
    assert not ran.banned


def test_a_cheat_that_was_honest_at_first_keeps_only_what_was_final(tmp_path: Path, cache: Path) -> None:
    def arm(cheat: Cheat) -> None:
        armed(forge=zero)(cheat)

    ran = run(tmp_path, cache, nodes=8, hostile=2, rounds=20, arm=arm, from_round=8)
    assert ran.banned == ran.hostile
    assert all(round_number > 8 for round_number in ran.convicted_in().values())
    assert ran.paid(ran.hostile) == 0, "all of it was still pending"

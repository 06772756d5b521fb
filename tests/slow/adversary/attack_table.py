"""Print a table of what becomes of each attack over some seeds.

``python -m tests.slow.adversary.attack_table [--rounds N] [ATTACK …]``
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import torch

from psyche.audit.simulated_audits import VerdictPolicy, honest
from tests.slow.adversary.malicious_auditors import always_unsure, collude, fail_honest, pass_all
from tests.slow.adversary.malicious_nodes import ATTACKS, Cheat, with_attack
from tests.slow.adversary.simulated_run import RunResult, run

SEEDS = (11, 12, 13)
NODES, HOSTILE = 8, 2
AUDITOR_ATTACKS: dict[str, tuple[Callable[[Cheat], None], Callable[[frozenset[str]], VerdictPolicy]]] = {
    "auditors fail honest work": (with_attack(), fail_honest),
    "auditors collude, other data": (ATTACKS["other data"], collude),
    "auditors pass every node, other data": (ATTACKS["other data"], pass_all),
    "auditors pass every node unseen": (with_attack(), pass_all),
    "auditors report every node as undecided": (with_attack(), always_unsure),
}


def runs(name: str, rounds: int, cache: Path) -> list[RunResult]:
    attack, policy = AUDITOR_ATTACKS.get(name, (ATTACKS.get(name), lambda hostile: honest))
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            hostile, nodes = (
                (HOSTILE, NODES) if attack else (0, NODES - HOSTILE if name == "only the honest nodes" else NODES)
            )
            found.append(
                run(
                    Path(folder),
                    cache,
                    nodes=nodes,
                    hostile=hostile,
                    rounds=rounds,
                    attack=attack,
                    policy=policy,
                    seed=seed,
                )
            )
    return found


def row(name: str, results: list[RunResult]) -> str:
    """Format one row.

    Over all malicious nodes of all seeds: when they were reported as outliers and convicted, what they were paid, the
    loss.
    """
    malicious = [(result, node) for result in results for node in result.hostile]
    outliers = [result.first_outlier().get(node) for result, node in malicious]
    convicted = [round_number for result, node in malicious if (round_number := result.convicted_in().get(node))]
    wrongly = sum(len(result.banned - result.hostile) for result in results)
    named = f"{sum(one is not None for one in outliers)} of {len(malicious)}"
    when = f"{median(convicted):g} / {max(convicted)}" if convicted else "–"
    paid, losses = sum(result.paid(result.hostile) for result in results), [result.loss for result in results]
    cells = (named, f"{len(convicted)} of {len(malicious)}", when, wrongly, paid, f"{mean(losses):.4f}")
    return f"| {name} | " + " | ".join(map(str, cells)) + " | " + " ".join(f"{one:.3f}" for one in losses) + " |"


def main() -> None:
    known = ["all nodes honest", "only the honest nodes", *ATTACKS, *AUDITOR_ATTACKS]
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("attack", nargs="*", default=known, help=f"default: all of {', '.join(known)}")
    given = options.parse_args()
    torch.set_num_threads(1)
    print("| attack | outlier | convicted | after rounds (median / most) | honest convicted | paid | loss | by seed |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for name in given.attack:
            print(row(name, runs(name, given.rounds, Path(cache))), flush=True)


if __name__ == "__main__":
    main()

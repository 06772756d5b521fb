"""``python -m tests.slow.adversary.table [--rounds N] [WAY …]``: what becomes of each way to lie, over some seeds, as a
table."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median

import torch

from psyche.audit.simulated_audits import VerdictPolicy, honest
from tests.slow.adversary.cheats import WAYS, Cheat, armed
from tests.slow.adversary.liars import shrug, slander, vouch, wave_through
from tests.slow.adversary.simulated import Ran, run

SEEDS = (11, 12, 13)
NODES, HOSTILE = 8, 2
LIARS: dict[str, tuple[Callable[[Cheat], None], Callable[[frozenset[str]], VerdictPolicy]]] = {
    "auditors fail honest work": (armed(), slander),
    "auditors vouch for each other, other data": (WAYS["other data"], vouch),
    "auditors pass everybody, other data": (WAYS["other data"], wave_through),
    "auditors pass everybody unseen": (armed(), wave_through),
    "auditors are unsure of everybody unseen": (armed(), shrug),
}


def runs(name: str, rounds: int, cache: Path) -> list[Ran]:
    arm, judge = LIARS.get(name, (WAYS.get(name), lambda hostile: honest))
    found = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            hostile, nodes = (HOSTILE, NODES) if arm else (0, NODES - HOSTILE if name == "only the honest" else NODES)
            found.append(
                run(Path(folder), cache, nodes=nodes, hostile=hostile, rounds=rounds, arm=arm, judge=judge, seed=seed)
            )
    return found


def row(name: str, all_of: list[Ran]) -> str:
    """Rounds until a liar stood out and was convicted, over all liars of all seeds; what they were paid; the loss."""
    liars = [(ran, node) for ran in all_of for node in ran.hostile]
    stood_out = [ran.named_in().get(node) for ran, node in liars]
    convicted = [round_number for ran, node in liars if (round_number := ran.convicted_in().get(node))]
    wrongly = sum(len(ran.banned - ran.hostile) for ran in all_of)
    named = f"{sum(one is not None for one in stood_out)} of {len(liars)}"
    when = f"{median(convicted):g} / {max(convicted)}" if convicted else "–"
    paid, losses = sum(ran.paid(ran.hostile) for ran in all_of), [ran.loss for ran in all_of]
    cells = (named, f"{len(convicted)} of {len(liars)}", when, wrongly, paid, f"{mean(losses):.4f}")
    return f"| {name} | " + " | ".join(map(str, cells)) + " | " + " ".join(f"{one:.3f}" for one in losses) + " |"


def main() -> None:
    known = ["everybody honest", "only the honest", *WAYS, *LIARS]
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("way", nargs="*", default=known, help=f"all, or of {', '.join(known)}")
    given = options.parse_args()
    torch.set_num_threads(1)
    print("| way | stood out | convicted | after rounds (median / most) | honest convicted | paid | loss | by seed |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as cache:
        for name in given.way:
            print(row(name, runs(name, given.rounds, Path(cache))), flush=True)


if __name__ == "__main__":
    main()

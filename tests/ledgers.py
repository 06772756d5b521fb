"""Ledger files to read and tamper with, and ``psyche ledger``."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner, Result

from psyche.cli.ledger_commands import app
from psyche.ledger.store import NAME, Ledger
from tests.chains import RULES, Link, chain

CHAIN = chain(6)
OTHER = chain(6, left_out=lambda round_number: 2)
EACH = RULES.inner_steps * RULES.tokens_per_step
"""Tokens of an accepted contribution."""


def fill(path: Path, links: list[Link] = CHAIN) -> Path:
    with Ledger.open(path, RULES.run_id) as ledger:
        for one in links:
            ledger.append(one.certificate, one.record, one.root)
    return path


def change(path: Path, statement: str, *values: object) -> int:
    """Execute a statement on the file and return the number of changed rows."""
    with sqlite3.connect(path) as forger:
        changed = forger.execute(statement, values).rowcount
    forger.close()
    return changed


def psyche_ledger(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check_one_chain(run: Path, names: Sequence[str], roots: Sequence[str]) -> None:
    """Check that the ledgers of a finished run are valid and hold the same records and ``roots``."""
    chains = []
    for name in names:
        result = psyche_ledger("verify", run / name)
        assert result.exit_code == 0, result.exception
        assert result.stdout.startswith(f"valid: {len(roots)} certified rounds up to round {len(roots)}")
        with Ledger.read(run / name / NAME) as ledger:
            chains.append([ledger.hash_of(round_number) for round_number in ledger.rounds()])
            assert [one.state_root.hex() for one in ledger.entries() if one.state_root] == list(roots)
    assert len(chains[0]) == len(roots)
    assert all(one == chains[0] for one in chains)

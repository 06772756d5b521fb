"""Files that a bench writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from psyche.durable import disk_errors, write_durably


def require_folder(path: Path | None) -> None:
    """Make the folder that ``path`` will be written to, before a quarter of an hour is spent rather than after.

    Raises ``PsycheError`` where that cannot be.
    """
    if path is not None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Rows as a list of flat dicts, for people and programs. Raises ``PsycheError``."""
    with disk_errors(path):
        write_durably(path, msgspec.json.format(msgspec.json.encode(rows)) + b"\n")

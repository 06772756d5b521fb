"""The command line as a whole."""

from __future__ import annotations

import subprocess
import sys


def test_who_only_asks_for_help_waits_for_nothing_that_commands_import() -> None:
    heavy = {"asyncio", "hivemind", "msgspec", "numpy", "pydantic", "torch", "transformers", "wandb", "yaml"}
    code = f"import sys, psyche.cli; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

"""The bench is in a checkout and not in the wheel, and ``psyche bench`` says so."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from typer.testing import CliRunner

from psyche.cli.bench_commands import app

REPOSITORY = Path(__file__).parents[2]


def test_the_wheel_leaves_out_the_bench() -> None:
    wheel = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["scikit-build"]["wheel"]
    assert wheel["packages"] == ["psyche"]
    assert wheel["exclude"] == ["psyche/bench/**"]


def test_without_the_bench_the_command_says_in_one_sentence_what_to_do() -> None:
    program = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "psyche.bench" else find(name, *more)
from psyche.cli import main
sys.argv = ["psyche", "bench", "codec"]
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("psyche: the bench needs a checkout of the repository: ")
    assert done.stderr.count("\n") == 1


def test_in_a_checkout_the_command_lists_its_measurements() -> None:
    listed = CliRunner().invoke(app, [])
    assert listed.exit_code == 0
    for command in ("convergence", "codec", "data", "exchange", "utilisation", "join", "engine", "mixed"):
        assert command in listed.output


def test_the_command_line_imports_no_measurement_before_it_is_asked_for() -> None:
    program = "import sys, psyche.cli; print([name for name in sys.modules if name.startswith('psyche.bench')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""scripts/join.sh: says what it would do, does it once, and then just joins."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INVITE = "psyche1abc"


def join_sh(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it in a home of its own."""
    return subprocess.run(
        ["sh", str(ROOT / "scripts" / "join.sh"), *arguments],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **environment},
    )  # fmt: skip


def target(home: Path, **environment: str) -> str:
    """What the stamp of a finished installation says."""
    said = join_sh(home, "--dry-run", INVITE, **environment).stdout
    match = re.search(r"would write: \S+ \((.*)\)\n", said)
    assert match, said
    return match[1]


def prepare(home: Path, stamp: str) -> None:
    """An installation whose ``psyche`` only says how it was called."""
    binaries = home / ".psyche" / "venv" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "psyche").write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    (binaries / "psyche").chmod(0o755)
    (home / ".psyche" / "installed").write_text(f"{stamp}\n")


def test_a_dry_run_shows_each_step_and_changes_nothing(tmp_path: Path) -> None:
    result = join_sh(tmp_path, "--dry-run", INVITE, "--threads", "2")
    assert result.returncode == 0, result.stderr
    steps = [line for line in result.stdout.splitlines() if line.startswith("  would")]
    for number, part in enumerate(["mkdir -p", "rm -f", "-m venv", str(ROOT), "would write"]):
        assert part in steps[number]
    assert steps[-1].endswith(f"psyche join {INVITE} --threads 2")
    assert list(tmp_path.iterdir()) == []


def test_a_second_start_only_joins_with_the_same_options(tmp_path: Path) -> None:
    prepare(tmp_path, target(tmp_path))
    result = join_sh(tmp_path, INVITE, "--directory", "a b")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(f"join|{INVITE}|--directory|a b|")
    assert "installed: psyche" in result.stdout


def test_another_version_is_installed_again(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("psyche", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, source / name)
    home = tmp_path / "home"
    prepare(home, target(home, PSYCHE_SOURCE=str(source)))
    assert "installed: psyche" in join_sh(home, "--dry-run", INVITE, PSYCHE_SOURCE=str(source)).stdout
    (source / "psyche" / "errors.py").write_text("# changed\n")
    assert "would write" in join_sh(home, "--dry-run", INVITE, PSYCHE_SOURCE=str(source)).stdout


def test_a_missing_python_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    result = join_sh(tmp_path, INVITE, PYTHON="no-such-python")
    assert result.returncode == 1
    assert "apt-get install" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("gpus", "extra"), [(0, ""), (1, "[cuda]"), (2, "[cuda,deepspeed]")])
def test_installed_extras_follow_the_gpus(tmp_path: Path, gpus: int, extra: str) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    listed = "".join(f"GPU {number}: NVIDIA H100 80GB HBM3 (UUID: GPU-{number})\n" for number in range(gpus))
    (programs / "nvidia-smi").write_text(f"#!/bin/sh\n[ {gpus} -gt 0 ] || exit 9\nprintf '{listed}'\n")
    (programs / "nvidia-smi").chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    said = join_sh(tmp_path / "home", "--dry-run", INVITE, PATH=path)
    assert re.search(rf" {re.escape(str(ROOT) + extra)}\n", said.stdout), said.stdout + said.stderr


def test_an_argument_that_is_not_an_invite_is_rejected(tmp_path: Path) -> None:
    assert "is not an invite" in join_sh(tmp_path, "garbage").stderr
    assert join_sh(tmp_path).returncode == 2
    assert "--dry-run" in join_sh(tmp_path, "--help").stdout


@pytest.mark.slow
def test_it_installs_and_joins(tmp_path: Path) -> None:
    """Needs the package index that pip is set up for, and 3 GB."""
    for said in ("installing into", "installed: psyche"):
        result = join_sh(tmp_path, INVITE)
        assert said in result.stdout, result.stdout + result.stderr
        assert "psyche: the invite is cut off or mistyped" in result.stderr

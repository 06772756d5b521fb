"""``psyche data``: three commands, one configuration file."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from psyche.cli.data_commands import app
from psyche.config import Data
from psyche.data import prepare, staging
from psyche.durable import write_durably
from psyche.errors import PsycheError


@pytest.fixture
def config(data: Data, tmp_path: Path) -> Path:
    tree = {
        "run": {"name": "t", "model": {"settings": {"vocab_size": 400}}, "data": data.model_dump(mode="json")},
        "node": {"cache": str(tmp_path / "cache")},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_prepare_verify_info(config: Path) -> None:
    runner = CliRunner()
    prepared = runner.invoke(app, ["prepare", str(config)], catch_exceptions=False)
    assert prepared.exit_code == 0
    facts = dict(line.split(maxsplit=1) for line in prepared.stdout.splitlines())
    assert set(facts) == {"store", "root", "train", "heldout", "tokens"}
    for stage in ("reading text for the tokenizer: ", "training the tokenizer:", "encoding: ", "shuffling:"):
        assert stage in prepared.stderr

    assert runner.invoke(app, ["info", str(config)]).stdout == prepared.stdout
    verified = runner.invoke(app, ["verify", str(config)])
    assert verified.exit_code == 0
    assert verified.stdout.splitlines()[-1].split() == ["verified", facts["root"]]

    (Path(facts["store"]) / "train-00000.bin").write_bytes(b"other")
    broken = runner.invoke(app, ["verify", str(config)])
    assert isinstance(broken.exception, PsycheError)
    assert "train-00000.bin" in str(broken.exception)


def test_a_stop_says_that_it_goes_on(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at = 3

    def write(path: Path, content: object) -> None:
        nonlocal stop_at
        stop_at -= 1
        if not stop_at:
            raise KeyboardInterrupt
        write_durably(path, content)  # type: ignore[arg-type]

    runner = CliRunner()
    with monkeypatch.context() as patch:
        patch.setattr(staging, "write_durably", write)
        patch.setattr(prepare, "JOURNAL_BYTES", 4096)
        stopped = runner.invoke(app, ["prepare", str(config)])
    assert stopped.exit_code == 130
    assert "psyche: interrupted; run the same command to resume" in stopped.stderr
    resumed = runner.invoke(app, ["prepare", str(config)], catch_exceptions=False)
    assert "tokenizer" not in resumed.stderr
    assert resumed.exit_code == 0


def test_a_terminal_shows_a_bar_and_stdout_the_result(config: Path) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "psyche", "data", "prepare", str(config)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as child:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # what the kernel says when the other end is closed
            while part := os.read(ours, 4096):
                shown += part
        assert child.stdout is not None
        out = child.stdout.read()
    os.close(ours)
    assert child.returncode == 0, shown
    assert out.startswith("store ")
    assert "━".encode() in shown


def test_info_before_prepare(config: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(config)])
    assert isinstance(result.exception, PsycheError)
    assert "run `psyche data prepare` first" in str(result.exception)


def test_importing_the_command_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'tokenizers', 'rich.progress'}"
    code = f"import sys, psyche.cli.data_commands; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

"""``psyche data``: three commands, one configuration file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from psyche.cli.data import app
from psyche.config import Data
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
    assert "encoding documents" in prepared.stderr

    assert runner.invoke(app, ["info", str(config)]).stdout == prepared.stdout
    verified = runner.invoke(app, ["verify", str(config)])
    assert verified.exit_code == 0
    assert verified.stdout.splitlines()[-1].split() == ["sound", facts["root"]]

    (Path(facts["store"]) / "train-00000.bin").write_bytes(b"other")
    broken = runner.invoke(app, ["verify", str(config)])
    assert isinstance(broken.exception, PsycheError)
    assert "train-00000.bin" in str(broken.exception)


def test_info_before_prepare(config: Path) -> None:
    result = CliRunner().invoke(app, ["info", str(config)])
    assert isinstance(result.exception, PsycheError)
    assert "run `psyche data prepare` first" in str(result.exception)


def test_importing_the_command_is_cheap() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'numpy', 'tokenizers', 'rich.progress'}"
    code = f"import sys, psyche.cli.data; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

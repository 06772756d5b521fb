"""The command line as a whole: what it prints, how fast, and that every command named anywhere exists."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from psyche import __version__
from psyche.cli import app

ROOT = Path(__file__).parents[1]
GROUP: Any = typer.main.get_command(app)

SOURCES = sorted(
    path
    for pattern in (
        "README.md",
        "Makefile",
        "psyche/**/*.py",
        "**/README.md",
        "configs/*.yaml",
        "scripts/*",
        "pyproject.toml",
    )
    for path in ROOT.glob(pattern)
    if path.is_file() and not {".venv", "runs", "build"} & set(path.relative_to(ROOT).parts)
)
CODE = re.compile(
    r"(?<!`)(`{1,2})(?!`)([^`]+)\1(?!`)|^[#$ @]+(?:\.venv/bin/|\$\(BIN\)/)?(psyche [a-z].*)$", re.MULTILINE
)
"""Code in prose, and lines that are a command."""
OTHERS = {
    "--constraint", "--yes", "--upload-pack", "--upgrade", "--target", "--no-deps", "--quiet", "--format",
    "--hypothesis-profile", "--listen", "--force-reinstall",
}  # fmt: skip
"""Options of other programs."""
SYSTEMS = {"gather", "sharded"}
"""Follow ``psyche`` in tables of measurements, where they name an exchange and not a command."""


def commands(group: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below ``group``, with the words that call it."""
    for name, command in group.commands.items():
        yield (*words, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*words, name))


COMMANDS = dict(commands(GROUP))


def options(command: Any) -> set[str]:
    found = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return {name for name in found if name.startswith("-")} | {"--help"}


def mentions(text: str) -> Iterator[str]:
    """Calls of ``psyche`` in a text, each on one line."""
    for match in CODE.finditer(text):
        code = " ".join((match[2] or match[3]).split())
        yield from re.findall(r"(?:^|[\s/])psyche ([a-z-].*?)(?=$|[|;)&]|\spsyche\s)", code)
    for words in COMMANDS:
        yield from re.findall(rf"\bpsyche ({' '.join(words)}(?: --[a-z-]+)*)\b", text)


def fault(call: str) -> str:
    """What is wrong with a call of ``psyche``; empty if nothing is."""
    words = call.split()
    if words[0] in SYSTEMS:
        return ""
    if words[0].startswith("--"):
        return "" if words[0] in options(GROUP) else f"psyche has no option {words[0]}"
    command, taken = COMMANDS.get((words[0],)), 1
    if hasattr(command, "commands") and len(words) > 1 and not words[1].startswith("-"):
        command, taken = COMMANDS.get((words[0], words[1])), 2
    if command is None:
        return f"there is no command psyche {' '.join(words[:taken])}"
    named = re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(words[taken:]))
    wrong = [name for name in named if name not in options(command)]
    return f"psyche {' '.join(words[:taken])} has no option {', '.join(wrong)}" if wrong else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_named_exists(path: Path) -> None:
    found = {call: fault(call) for call in mentions(path.read_text(encoding="utf-8"))}
    assert not {call: text for call, text in found.items() if text}


def test_every_option_named_in_a_message_exists() -> None:
    known = {name for command in COMMANDS.values() for name in options(command)} | options(GROUP) | OTHERS
    unknown = {}
    for path in SOURCES:
        if path.suffix in (".py", ".yaml") and "bench" not in path.parts and "scripts" not in path.parts:
            named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", path.read_text(encoding="utf-8"))) - known
            unknown |= {str(path.relative_to(ROOT)): named} if named else {}
    assert not unknown


def test_a_wrong_mention_is_found() -> None:
    assert fault("join INVITE --thread 3") == "psyche join has no option --thread"
    assert fault("report runs/demo").startswith("there is no command psyche report")
    assert fault("ledger shw") == "there is no command psyche ledger shw"
    assert list(mentions("run `psyche leave --now`, or\n  $ psyche join INVITE\n"))[:2] == [
        "leave --now",
        "join INVITE",
    ]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_option_has_a_help_text(words: tuple[str, ...]) -> None:
    command = COMMANDS[words]
    assert command.help
    assert command.help.rstrip().endswith(".")
    for parameter in command.params:
        assert getattr(parameter, "help", None), parameter.name


def test_version_names_what_a_bug_report_needs() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert re.fullmatch(rf"psyche {re.escape(__version__)}, Python 3\.\d+\.\d+, torch \S+, .* codecs.*\n", done.output)


def test_help_does_not_import_what_only_commands_need() -> None:
    heavy = {"asyncio", "hivemind", "msgspec", "numpy", "pydantic", "torch", "transformers", "wandb", "yaml"}
    code = f"import sys, psyche.cli; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"

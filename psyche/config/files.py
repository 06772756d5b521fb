"""Configuration files: YAML with two parts, ``run:`` and ``node:``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from psyche.config.base import Strict, validated
from psyche.config.node import Node
from psyche.config.run import Run
from psyche.errors import ConfigError


class Config(Strict):
    """One configuration file."""

    run: Run
    node: Node = Node()


def load_config(path: Path) -> Config:
    """Read and check a configuration file. Raises :class:`ConfigError` naming field and reason."""
    return validated(Config, _read_yaml(path), str(path))


def load_node(path: Path | None) -> Node:
    """The ``node:`` part of a file (other parts are ignored by a joiner), or the defaults."""
    if path is None:
        return Node()
    tree = _read_yaml(path)
    return validated(Node, tree.get("node") or {}, f"{path}: node")


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats: PyYAML follows 1.1, where ``4e-4`` is text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must be a mapping with the keys run: and node:")
    return tree

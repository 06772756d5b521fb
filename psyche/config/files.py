"""Read configuration files: YAML with two sections, ``run:`` and ``node:``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from psyche.config.base import Strict, validated
from psyche.config.node_config import Node
from psyche.config.run_config import Run
from psyche.errors import ConfigError


class Config(Strict):
    """One configuration file."""

    run: Run
    """What is equal on all nodes."""
    node: Node = Node()
    """What concerns one machine."""


def load_config(path: Path) -> Config:
    """Read and validate a configuration file. Raises :class:`ConfigError`, which names each wrong field."""
    return validated(Config, _read_yaml(path), str(path))


def load_node(path: Path | None) -> Node:
    """Read the ``node:`` section of a file and ignore the rest; without a file return the defaults."""
    if path is None:
        return Node()
    tree = _read_yaml(path)
    return validated(Node, tree.get("node") or {}, f"{path}: node")


class _Loader(yaml.SafeLoader):
    """Reads floats as YAML 1.2 does; in YAML 1.1, which PyYAML follows, ``4e-4`` is a string."""


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

"""Configuration of runs and nodes.

A configuration file has two sections. ``run:`` holds everything that must be equal on all nodes; launching it makes the
run manifest (:class:`Manifest`), whose hash is the run id. ``node:`` concerns one machine and never leaves it. An
unknown key is an error that names its path. ``configs/README.md`` documents every key.
"""

from psyche.config.base import error_text
from psyche.config.data_config import (
    BpeTokenizer,
    Data,
    Filter,
    HubSource,
    MixturePart,
    MixtureSource,
    NamedTokenizer,
    Source,
    StdlibSource,
    TextSource,
)
from psyche.config.files import Config, load_config, load_node
from psyche.config.manifest import MANIFEST, Manifest, Resolved
from psyche.config.node_config import DeepSpeed, Node, PrivateData, Wandb, override_node
from psyche.config.run_config import (
    CodecSpec,
    Deadlines,
    ExchangeSpec,
    Federated,
    Inner,
    InnerOptimizer,
    Model,
    Outer,
    Overlap,
    Rounds,
    Run,
)

__all__ = [
    "MANIFEST",
    "BpeTokenizer",
    "CodecSpec",
    "Config",
    "Data",
    "Deadlines",
    "DeepSpeed",
    "ExchangeSpec",
    "Federated",
    "Filter",
    "HubSource",
    "Inner",
    "InnerOptimizer",
    "Manifest",
    "MixturePart",
    "MixtureSource",
    "Model",
    "NamedTokenizer",
    "Node",
    "Outer",
    "Overlap",
    "PrivateData",
    "Resolved",
    "Rounds",
    "Run",
    "Source",
    "StdlibSource",
    "TextSource",
    "Wandb",
    "error_text",
    "load_config",
    "load_node",
    "override_node",
]

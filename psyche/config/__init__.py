"""Configuration: what a researcher writes, what every node must agree on, and what a node decides alone.

A configuration file has two parts. ``run:`` fixes everything that must be equal on all nodes; launched, it
becomes the *run manifest* (:class:`Manifest`), whose hash is the run id. ``node:`` is one machine's own
business and never leaves it. Every key is live: an unknown one is an error that names its path.
"""

from psyche.config.base import explain
from psyche.config.data import (
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
from psyche.config.model import Model
from psyche.config.node import DeepSpeed, Node, PrivateData, Wandb, override_node
from psyche.config.run import (
    CodecSpec,
    Deadlines,
    ExchangeSpec,
    Federated,
    Inner,
    InnerOptimizer,
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
    "explain",
    "load_config",
    "load_node",
    "override_node",
]

"""psyche: LLM pretraining over permissionless, low-bandwidth nodes."""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psyche.diloco.simulate import simulate as simulate

__version__ = "0.1.0"
__all__ = ["__version__", "simulate"]

if os.environ.get("PSYCHE_NATIVE") == "0":  # use PyTorch for everything, as on a machine without a C++ compiler
    sys.modules["psyche._native"] = None  # type: ignore[assignment]  # importing it fails


def __getattr__(name: str) -> Any:
    """Import the Python interface when it is used: it needs torch, which takes seconds to import."""
    if name == "simulate":
        from psyche.diloco.simulate import simulate

        return simulate
    raise AttributeError(f"module 'psyche' has no attribute {name!r}")

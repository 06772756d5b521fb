"""psyche: LLM pretraining over permissionless, low-bandwidth nodes."""

import os
import sys

__version__ = "0.1.0"

if os.environ.get("PSYCHE_NATIVE") == "0":  # PyTorch computes everything, to the same bits, as without a C++ compiler
    sys.modules["psyche._native"] = None  # type: ignore[assignment]  # importing it fails

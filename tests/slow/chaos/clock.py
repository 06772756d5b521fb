"""A wall clock per process that can be set: a small preloaded library, compiled here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.cpp")
VARIABLE = "PSYCHE_TEST_CLOCK"


def compiler() -> str | None:
    """Return the C++ compiler, or None."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++") if name and (found := shutil.which(name))), None
    )


def build(directory: Path) -> Path:
    """Compile the library to preload and return its path."""
    tool, library = compiler(), directory / "clock.so"
    assert tool is not None, "there is no C++ compiler"
    subprocess.run([tool, "-std=c++17", "-O2", "-fPIC", "-shared", str(SOURCE), "-o", str(library), "-ldl"], check=True)
    return library


class Clock:
    """The wall-clock offset of one process.

    libp2p's daemon is a Go program that asks the kernel directly, so it is not affected.
    """

    def __init__(self, path: Path, library: Path) -> None:
        self.path = path
        self.environment = {"LD_PRELOAD": str(library), VARIABLE: str(path)}
        path.write_bytes(bytes(8))

    def set(self, seconds: float) -> None:
        """Set the offset from the machine's clock, in seconds."""
        with self.path.open("r+b", buffering=0) as file:
            file.write(round(seconds * 1e9).to_bytes(8, "little", signed=True))

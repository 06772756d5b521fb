"""A wall clock for each process, which can be set: a small library that is preloaded, compiled here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("clock.cpp")
VARIABLE = "PSYCHE_TEST_CLOCK"


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return next(
        (found for name in (os.environ.get("CXX"), "c++", "g++") if name and (found := shutil.which(name))), None
    )


def build(directory: Path) -> Path:
    """The library to preload."""
    tool, library = compiler(), directory / "clock.so"
    assert tool is not None, "there is no C++ compiler"
    subprocess.run([tool, "-std=c++17", "-O2", "-fPIC", "-shared", str(SOURCE), "-o", str(library), "-ldl"], check=True)
    return library


class Clock:
    """How far a process's wall clock is off. libp2p's daemon, a Go program, asks the kernel and is not fooled."""

    def __init__(self, path: Path, library: Path) -> None:
        self.path = path
        self.environment = {"LD_PRELOAD": str(library), VARIABLE: str(path)}
        path.write_bytes(bytes(8))

    def set(self, seconds: float) -> None:
        """Be ``seconds`` ahead of the machine's clock from now on; 0 is right."""
        with self.path.open("r+b", buffering=0) as file:
            file.write(round(seconds * 1e9).to_bytes(8, "little", signed=True))

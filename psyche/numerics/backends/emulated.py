"""CUDA kernels on a CPU, for tests: g++ compiles them against kernels/emulator, which runs each CUDA thread as a fibre.

It is slow, but runs the kernels' own source and detects errors that a GPU hides (see cuda_emulator.h).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from pathlib import Path

import torch

from psyche.numerics.backends.cuda_compile import cache_directory, cache_key, kernels_directory
from psyche.numerics.backends.launcher import THREADS, Argument, as_ctype

FORWARDS, BACKWARDS = 0, 1
"""Orders in which fibres run. Any other number is the seed of a shuffled order."""

_FLAGS = (
    *("-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-strict-aliasing", "-Wno-unknown-pragmas"),
)
_SANITIZED = ("-O1", "-fsanitize=address,alignment,bounds,shift", "-fno-sanitize-recover=all")


class EmulationError(RuntimeError):
    """A kernel did something invalid, such as a barrier that not all threads reach or a misaligned wide access."""


class EmulatedLauncher:
    """Runs kernels synchronously on CPU tensors."""

    device = torch.device("cpu")
    detail = "emulated on the CPU"

    def __init__(self, library: Path, order: int = FORWARDS) -> None:
        self.order = order
        self._emulate = ctypes.CDLL(str(library)).psyche_emulate

    def launch(self, kernel: str, blocks: int, *arguments: Argument) -> None:
        """Run a kernel. Raises :class:`EmulationError`."""
        values = [as_ctype(argument) for argument in arguments]
        addresses = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        error = ctypes.create_string_buffer(512)
        failed = self._emulate(
            kernel.encode(),
            ctypes.c_uint(blocks),
            ctypes.c_uint(THREADS),
            addresses,
            ctypes.c_int(len(values)),
            ctypes.c_uint64(self.order),
            error,
            ctypes.c_size_t(len(error)),
        )
        if failed:
            raise EmulationError(f"{kernel}: {error.value.decode()}")


def build(kernels: Path | None = None, *, sanitized: bool = False, cache: Path | None = None) -> Path:
    """Compile the emulator's shared library, unless ``cache`` has it. ``kernels`` is a directory like ``kernels/``.

    Raises ``FileNotFoundError`` without a C++ compiler, ``RuntimeError`` with the compiler's output.
    """
    kernels = kernels or kernels_directory()
    directories = [kernels / name for name in ("include", "cuda", "emulator")]
    sources = [path for directory in directories for path in sorted(directory.iterdir()) if path.is_file()]
    compiler = os.environ.get("CXX", "g++")
    flags = _FLAGS + (_SANITIZED if sanitized else ())
    contents = [part for path in sources for part in (path.name.encode(), path.read_bytes())]
    key = cache_key(compiler.encode(), " ".join(flags).encode(), *contents)
    library = (cache or cache_directory()) / f"emulator-{key}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        built = Path(scratch) / "emulator.so"
        include = [f"-I{directory}" for directory in directories]
        inputs = [str(kernels / "emulator" / name) for name in ("emulator.cpp", "kernels.cpp")]
        command = [compiler, *flags, *include, *inputs, "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{compiler} failed:\n{result.stderr}")
        built.replace(library)
    return library

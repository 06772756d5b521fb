"""What the check needs of other packages, and what it can do without some of them. Imports none of them."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

KERNELS, TIMES, TRAINING = "kernels", "times", "training"
PARTS: Mapping[str, str] = {
    KERNELS: "kernels against the definition",
    TIMES: "kernel times",
    TRAINING: "training speed",
}
"""In the order in which they run."""

EVERYTHING = tuple(PARTS)
NEEDED: Mapping[str, tuple[str, Sequence[str]]] = {
    "torch": ("torch>=2.8", EVERYTHING),
    "numpy": ("numpy>=2", EVERYTHING),
    "cuda.core": ("cuda-core>=1.2", (KERNELS, TIMES)),
    "cuda.bindings": ("cuda-bindings>=13,<14", (KERNELS, TIMES)),
    "transformers": ("transformers", (TRAINING,)),
}
"""Modules: what to install for each, and the parts that are left out without it."""

EMULATED_WITHOUT = ("cuda.core", "cuda.bindings")
"""The emulator runs kernels without these; only the compiler for a GPU is not tried then."""

NVRTC = "nvidia-cuda-nvrtc>=13,<14"
"""Compiles the kernels. Not among the modules above, since a CUDA toolkit has it, too."""

VERSIONS = ("numpy", "transformers", "safetensors", "triton", "cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc")


def missing_modules() -> list[str]:
    """Those of ``NEEDED`` that are not installed."""
    return [module for module in NEEDED if not _installed(module)]


def parts_without(modules: Iterable[str], *, emulate: bool) -> set[str]:
    """The parts that are left out where ``modules`` are missing."""
    needed = [module for module in modules if not (emulate and module in EMULATED_WITHOUT)]
    return {part for module in needed for part in NEEDED[module][1]}


def advice(modules: Sequence[str], *, emulate: bool) -> list[str]:
    """A line for each missing module, and the command that adds them all."""
    lines = []
    for module in modules:
        parts = ", ".join(PARTS[part] for part in NEEDED[module][1])
        if emulate and module in EMULATED_WITHOUT:
            parts = "compiling the kernels for a GPU"
        lines.append(f"{module} is not installed; left out without it: {parts}")
    if lines:
        wanted = [NEEDED[module][0] for module in modules] + [NVRTC] * bool(set(modules) & set(EMULATED_WITHOUT))
        lines.append("to add what is missing: python -m pip install " + " ".join(f"'{one}'" for one in wanted))
    return lines


def versions() -> dict[str, str]:
    """Of Python and the packages that results depend on; those not installed are left out."""
    found = {"Python": platform.python_version()}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False

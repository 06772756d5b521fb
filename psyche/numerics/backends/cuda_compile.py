"""Compilation of the CUDA kernels to a cubin for one architecture, with NVRTC, at most once.

:func:`cubin` takes the first of: a cubin packed with the sources (scripts/pack_cubins.py), one of an earlier run in the
cache, a new compilation. NVRTC needs no GPU, driver or CUDA toolkit; ``pip install psyche[cuda]`` includes it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
"""Compute capabilities that tests compile and scripts/pack_cubins.py packs: Turing, Ampere, Ada, Hopper, Blackwell."""

OPTIONS: Mapping[str, Any] = {"std": "c++17", "fma": False, "ftz": False, "prec_div": True, "prec_sqrt": True}
"""For ``cuda.core.ProgramOptions``: no FMA contraction, no flush to zero, IEEE division and square root."""


class CompilationFailed(RuntimeError):
    """NVRTC rejected the sources; the message is its log."""


def kernels_directory() -> Path:
    """Find the directory ``kernels``: beside the package in a checkout, inside it in a wheel.

    Raises ``FileNotFoundError`` where neither exists.
    """
    package = Path(__file__).resolve().parents[2]
    for directory in (package.parent / "kernels", package / "kernels"):
        if (directory / "include" / "psyche_numerics.h").is_file():
            return directory
    raise FileNotFoundError(f"no kernels beside or inside {package}")


def cache_key(*parts: bytes) -> str:
    """Hash ``parts`` to 32 hex digits, with the standard library: kernels are also built where BLAKE3 is missing."""
    return sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()[:32]


def cache_directory() -> Path:
    """Return the cache of kernels compiled at first use: ``psyche/kernels`` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psyche" / "kernels"


def source_key(architecture: str, kernels: Path) -> str:
    """Hash sources, options and architecture to 32 hex digits."""
    parts = [part for path in _sources(kernels) for part in (path.name.encode(), path.read_bytes())]
    return cache_key(architecture.encode(), repr(sorted(OPTIONS.items())).encode(), *parts)


def packed_name(architecture: str, kernels: Path) -> str:
    """Return the file name of the cubin of these sources in :func:`packed_directory`."""
    return f"sm_{architecture}-{source_key(architecture, kernels)}.cubin"


def packed_directory(kernels: Path) -> Path:
    """Return the directory of packed cubins: beside the sources, so that a wheel includes them."""
    return kernels / "cuda" / "cubins"


def cubin(architecture: str, *, kernels: Path | None = None, cache: Path | None = None) -> bytes:
    """Load or compile all kernels for one architecture (``90`` is sm_90), for ``cuda.core.ObjectCode.from_cubin``.

    Raises :class:`CompilationFailed`, or ``ImportError`` where no cubin is packed and cuda.core or NVRTC is missing.
    """
    kernels = kernels or kernels_directory()
    packed = _read(packed_directory(kernels) / packed_name(architecture, kernels))
    if packed is not None:
        return packed
    version = "{}.{}".format(*_nvrtc_version())
    name = f"sm_{architecture}-{source_key(architecture, kernels)}-nvrtc{version}.cubin"
    entry = (cache or cache_directory()) / name
    found = _read(entry)
    if found is not None:
        return found
    compiled = compile_for(architecture, kernels)
    try:
        write(entry, compiled)
    except OSError as error:
        _log.warning("cannot cache compiled kernels in %s, so every start compiles them again: %s", entry.parent, error)
    return compiled


def compile_for(architecture: str, kernels: Path) -> bytes:
    """Compile all kernels, which takes seconds. Raises :class:`CompilationFailed`."""
    from cuda.core import Program, ProgramOptions

    include = [str(kernels / "include"), str(kernels / "cuda")]
    options = ProgramOptions(name="psyche", arch=f"sm_{architecture}", include_path=include, **OPTIONS)
    text = "".join(f'#include "{path.name}"\n' for path in _sources(kernels) if path.suffix == ".cu")
    try:
        return bytes(Program(text, "c++", options).compile("cubin").code)
    except Exception as error:  # cuda.core's NVRTCError is not public; its message is the compiler's log
        raise CompilationFailed(f"sm_{architecture}: {error}") from error


def write(entry: Path, compiled: bytes) -> None:
    """Write a cubin after its SHA-256, so that a damaged file is detected. Atomic."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as file:
        file.write(sha256(compiled).digest() + compiled)
    os.replace(file.name, entry)


def _read(entry: Path) -> bytes | None:
    """Read what :func:`write` wrote; ``None`` where the file is missing or damaged."""
    try:
        content = entry.read_bytes()
    except OSError:
        return None
    found, compiled = content[:32], content[32:]
    return compiled if found == sha256(compiled).digest() else None


def _sources(kernels: Path) -> list[Path]:
    return sorted([*(kernels / "cuda").glob("*.cu*"), kernels / "include" / "psyche_numerics.h"])


def _nvrtc_version() -> tuple[int, int]:
    from cuda.bindings import nvrtc

    status, major, minor = nvrtc.nvrtcVersion()
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ImportError(f"NVRTC does not work: {status}")
    return int(major), int(minor)

"""From kernel sources to a cubin for one architecture, with NVRTC, at most once.

Looked for in this order: a cubin packed with the sources (scripts/pack_cubins.py), one of an earlier run in the
cache, the compiler. NVRTC needs no GPU, no driver and no CUDA toolkit; it comes with ``pip install psyche[cuda]``.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from psyche.numerics.backends.sources import cache_key, kernels_directory

_log = logging.getLogger(__name__)

ARCHITECTURES = ("75", "80", "86", "89", "90", "120")
"""Compute capabilities that are compiled in tests and packed: Turing, Ampere, Ada, Hopper, Blackwell."""

OPTIONS: Mapping[str, Any] = {"std": "c++17", "fma": False, "ftz": False, "prec_div": True, "prec_sqrt": True}
"""``cuda.core.ProgramOptions``. No contraction, no flush to zero, IEEE division: DESIGN §5."""


class CompilationFailed(RuntimeError):
    """NVRTC refused the sources; the message is its log."""


def cache_directory() -> Path:
    """Where what is compiled at first use is kept: ``psyche/kernels`` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "psyche" / "kernels"


def source_key(architecture: str, kernels: Path) -> str:
    """32 hex digits that differ wherever sources, options or architecture do."""
    parts = [part for path in _sources(kernels) for part in (path.name.encode(), path.read_bytes())]
    return cache_key(architecture.encode(), repr(sorted(OPTIONS.items())).encode(), *parts)


def packed_name(architecture: str, kernels: Path) -> str:
    """The file that holds the cubin of these sources, in :func:`packed_directory`."""
    return f"sm_{architecture}-{source_key(architecture, kernels)}.cubin"


def packed_directory(kernels: Path) -> Path:
    """Beside the sources, so that a wheel that has them has the cubins, too."""
    return kernels / "cuda" / "cubins"


def cubin(architecture: str, *, kernels: Path | None = None, cache: Path | None = None) -> bytes:
    """All kernels for one architecture (``90`` is sm_90), as ``cuda.core.ObjectCode.from_cubin`` takes them.

    Raises :class:`CompilationFailed`, and ``ImportError`` where nothing is packed and cuda.core or NVRTC is missing.
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
        _log.warning("compiled kernels cannot be kept in %s, and are compiled at each start: %s", entry.parent, error)
    return compiled


def compile_for(architecture: str, kernels: Path) -> bytes:
    """Compile now. Takes seconds. Raises :class:`CompilationFailed`."""
    from cuda.core import Program, ProgramOptions

    include = [str(kernels / "include"), str(kernels / "cuda")]
    options = ProgramOptions(name="psyche", arch=f"sm_{architecture}", include_path=include, **OPTIONS)
    text = "".join(f'#include "{path.name}"\n' for path in _sources(kernels) if path.suffix == ".cu")
    try:
        return bytes(Program(text, "c++", options).compile("cubin").code)
    except Exception as error:  # cuda.core's NVRTCError is not public; it says what the compiler said
        raise CompilationFailed(f"sm_{architecture}: {error}") from error


def write(entry: Path, compiled: bytes) -> None:
    """Keep a cubin behind its digest, so that a damaged file is known as such. Atomic."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=entry.parent, delete=False) as file:
        file.write(sha256(compiled).digest() + compiled)
    os.replace(file.name, entry)


def _read(entry: Path) -> bytes | None:
    """What :func:`write` wrote; ``None`` where there is nothing, or not all of it."""
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

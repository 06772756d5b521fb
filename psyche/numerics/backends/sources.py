"""Where the native sources are, and what names a build of them."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path


def kernels_directory() -> Path:
    """The directory ``kernels``: beside the package in a checkout, inside it in a wheel.

    Raises ``FileNotFoundError`` where an installation has neither.
    """
    package = Path(__file__).resolve().parents[2]
    for directory in (package.parent / "kernels", package / "kernels"):
        if (directory / "include" / "psyche_numerics.h").is_file():
            return directory
    raise FileNotFoundError(f"no kernels beside or inside {package}")


def cache_key(*parts: bytes) -> str:
    """32 hex digits that differ wherever one of ``parts`` does. From the standard library: kernels are built where
    BLAKE3 is not installed, too."""
    return sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).hexdigest()[:32]

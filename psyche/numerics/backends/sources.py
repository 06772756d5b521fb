"""Where the native sources are."""

from __future__ import annotations

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

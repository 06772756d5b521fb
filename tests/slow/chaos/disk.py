"""A small disk for each process, which can be filled up."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

FILLER = "filler"


class Disk:
    """A tmpfs of ``size`` bytes, mounted at ``path``. Unmounted by :meth:`close`."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "psyche-test", str(path)],
            check=True,
            capture_output=True,
        )

    def fill(self) -> None:
        """Use all free space."""
        with contextlib.suppress(OSError), (self.path / FILLER).open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    def free(self) -> None:
        """Free the space that :meth:`fill` used."""
        (self.path / FILLER).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount; the contents are lost."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=False, capture_output=True)

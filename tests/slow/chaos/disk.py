"""A small disk for each process, which can be filled up."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path

FILLER = "filler"


class Disk:
    """A file system of its own at ``path``, in memory; ``size`` bytes. Unmounted by :meth:`close`."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "psyche-test", str(path)],
            check=True,
            capture_output=True,
        )

    def fill(self) -> None:
        """Take all the space that is left."""
        with contextlib.suppress(OSError), (self.path / FILLER).open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))

    def free(self) -> None:
        """Give it back."""
        (self.path / FILLER).unlink(missing_ok=True)

    def close(self) -> None:
        """Unmount it; what is on it is gone."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=False, capture_output=True)

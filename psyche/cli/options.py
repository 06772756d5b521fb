"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Port = Annotated[
    int | None,
    typer.Option(
        help="TCP port to listen at; by default that of last time, at first a free one.",
        min=1,
        max=65535,
        show_default=False,
    ),
]
Directory = Annotated[
    Path | None,
    typer.Option(help="Where this process keeps its key, log and checkpoints.", show_default=False),
]

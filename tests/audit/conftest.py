from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.audit.audited import Make, court


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the text is prepared once for all."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(tmp_path: Path, cache: Path) -> Make:
    """Makes a run of three nodes."""
    return partial(court, tmp_path, cache)

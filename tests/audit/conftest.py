from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.audit.audited import Make, audited_run


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory in which the text is prepared once for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make(tmp_path: Path, cache: Path) -> Make:
    """Factory of runs of three nodes."""
    return partial(audited_run, tmp_path, cache)

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings

from psyche.numerics.backends import emulated

torch.set_num_threads(1)  # tests share the machine, and the bits must not depend on it

# No deadline: how long an example takes says how busy the machine is, and nothing about psyche. `make test` runs the
# same examples every time, so that no change fails by chance on a property that it did not touch. `make test-hostile`
# draws many new ones, and prints the line that repeats a failing one.
settings.register_profile(
    "psyche", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True, max_examples=50
)
settings.register_profile(
    "thorough", settings.get_profile("psyche"), derandomize=False, print_blob=True, max_examples=500
)
settings.load_profile("psyche")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run modules, and the tests of each, in this order")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --shuffle, order the tests by the seed alone: all workers need the same order."""
    seed = config.getoption("--shuffle")
    if seed is not None:
        order = random.Random(seed)
        modules = sorted({item.nodeid.split("::")[0] for item in items})
        order.shuffle(modules)
        position = {module: number for number, module in enumerate(modules)}
        order.shuffle(items)
        items.sort(key=lambda item: position[item.nodeid.split("::")[0]])  # stable: shuffled within


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Start every test from the same random numbers, whichever ran before it in its process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of a run share, for results that are expensive to make; hold a lock meanwhile."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def emulator_library(shared: Path) -> Path:
    """The kernels in this checkout, compiled for the emulator."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler to build the emulator with")
    with FileLock(shared / "emulator.lock"):
        return emulated.build()

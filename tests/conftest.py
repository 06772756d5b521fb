import os
import shutil
from pathlib import Path

import pytest
import torch

from psyche.numerics.backends import emulated

torch.set_num_threads(1)  # tests share the machine, and the bits must not depend on it


@pytest.fixture(scope="session")
def emulator_library() -> Path:
    """The kernels in this checkout, compiled for the emulator."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler to build the emulator with")
    return emulated.build()

"""The emulator finds what it is for, and a kernel that rounds otherwise does not pass for the definition."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from psyche.numerics.backends import emulated
from psyche.numerics.backends.base import TorchBackend
from psyche.numerics.backends.cuda import CudaBackend
from psyche.numerics.backends.cuda_compile import kernels_directory
from psyche.numerics.backends.emulated import BACKWARDS, FORWARDS, EmulatedLauncher, EmulationError
from psyche.numerics.codecs.registry import codec as definition
from psyche.numerics.outer import OuterSettings
from tests.numerics.samples import CHUNK, bits

FAULTS = {
    # No barrier before the packed words are written out. (Without one of the others, ranks go out of range, too.)
    "topk2.cu": [("  pack_indices(shared);\n  __syncthreads();\n", "  pack_indices(shared);\n")],
    "int2.cu": [("  if (4 * at >= count / INT2_BLOCK) return;\n", "")],
    "int4.cu": [("(body + count / 2)[at];", "(body + count / 2 + 4)[at];")],
    "fp32.cu": [
        ("  if (at >= count) return;\n  const Four values",
         "  if (threadIdx.x < 64) __syncthreads();\n  const Four values"),
    ],
    "psyche_numerics.h": [
        ("weighted_sum(float sum, float weight, float value) { return add(sum, mul(value, weight)); }",
         "weighted_sum(float sum, float weight, float value) { return __builtin_fmaf(value, weight, sum); }"),
        ("  theta = sub(theta, mul(add(mul(momentum, mu), gradient), lr));",
         "  theta = __builtin_fmaf(-lr, add(mul(momentum, mu), gradient), theta);"),
        # Ties away from zero instead of to even.
        ("return nearest_int(clamped(quotient, -127.0f, 127.0f));",
         "return (i32)(quotient < 0 ? quotient - 0.5f : quotient + 0.5f);"),
    ],
}  # fmt: skip
"""In a copy of the sources, each in a kernel of its own."""


@pytest.fixture(scope="session")
def faulty_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("faulty") / "kernels"
    shutil.copytree(kernels_directory(), copy)
    for name, changes in FAULTS.items():
        (path,) = copy.glob(f"*/{name}")
        text = path.read_text()
        for right, wrong in changes:
            assert text.count(right) == 1, f"{name} has changed: {right}"
            text = text.replace(right, wrong)
        path.write_text(text)
    return copy


@pytest.fixture(scope="session")
def faulty(emulator_library: Path, faulty_sources: Path, shared: Path) -> Path:
    with FileLock(shared / "faulty.lock"):
        return emulated.build(faulty_sources, cache=shared)


def noise(seed: int = 0) -> Tensor:
    return torch.randn(CHUNK, generator=torch.Generator().manual_seed(seed))


def test_a_missing_barrier_shows_in_some_order(emulator_library: Path, faulty: Path) -> None:
    expected = definition("topk2").encode(noise(), torch.zeros(CHUNK), None, 1.0)

    def payloads(library: Path) -> set[bytes]:
        found = set()
        for order in (FORWARDS, BACKWARDS, 2, 3):
            used = CudaBackend(EmulatedLauncher(library, order)).codec("topk2")
            found.add(used.encode(noise(), torch.zeros(CHUNK), None, 1.0))
        return found

    assert payloads(emulator_library) == {expected}
    assert payloads(faulty) != {expected}


def test_a_barrier_that_not_all_threads_reach_is_an_error(faulty: Path) -> None:
    used = CudaBackend(EmulatedLauncher(faulty)).codec("fp32")
    with pytest.raises(EmulationError, match=r"thread 0 waits at a barrier in line \d+, thread 64 has ended"):
        used.check(definition("fp32").encode(noise(), noise(1), None, 1.0), CHUNK)


def test_a_misaligned_wide_access_is_an_error(faulty: Path) -> None:
    used = CudaBackend(EmulatedLauncher(faulty)).codec("int4")
    with pytest.raises(EmulationError, match="not aligned to 16 bytes"):
        used.check(definition("int4").encode(noise(), noise(1), None, 1.0), CHUNK)


def test_a_launch_that_does_not_fit_the_kernel_is_an_error(emulator_library: Path) -> None:
    launcher = EmulatedLauncher(emulator_library)
    with pytest.raises(EmulationError, match="there is no kernel int7_check"):
        launcher.launch("int7_check", 1)
    with pytest.raises(EmulationError, match="wrong number of arguments"):
        launcher.launch("int8_check", 1, None)


# --------------------------------------------------------------- would the tests of equality notice?


def test_a_tie_rounded_away_from_zero_is_noticed(emulator_library: Path, faulty: Path) -> None:
    sent = torch.zeros(CHUNK)
    sent[:2] = torch.tensor([127.0, 0.5])  # scale 1: a tie
    expected = definition("int8").encode(sent, torch.zeros(CHUNK), None, 1.0)
    for library, same in ((emulator_library, True), (faulty, False)):
        used = CudaBackend(EmulatedLauncher(library)).codec("int8")
        assert (used.encode(sent, torch.zeros(CHUNK), None, 1.0) == expected) is same


@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "int2", "topk2"])
def test_a_fused_multiply_and_add_in_decoding_is_noticed(emulator_library: Path, faulty: Path, name: str) -> None:
    payload = definition(name).encode(noise(), torch.zeros(CHUNK), None, 1.0)
    expected = noise(1)
    definition(name).decode_add(payload, 0.3333333432674408, expected)
    for library, same in ((emulator_library, True), (faulty, False)):
        out = noise(1)
        malformed = torch.zeros(1, dtype=torch.int32)
        body = torch.frombuffer(bytearray(payload), dtype=torch.uint8)[32:].clone()
        kernel = "topk2_64" if name == "topk2" else name
        blocks = {"fp32": 4, "topk2": 1}.get(name, 2)
        launcher = EmulatedLauncher(library)
        launcher.launch(f"{kernel}_decode_add", blocks, body, 0.3333333432674408, out, CHUNK, malformed)
        assert bool((bits(out) == bits(expected)).all()) is same


def test_a_fused_multiply_and_add_in_the_outer_step_is_noticed(emulator_library: Path, faulty: Path) -> None:
    expected, momentum = noise(1), noise(2)
    TorchBackend().outer_step(expected, momentum.clone(), noise(3), OuterSettings(0.7, 0.9))
    for library, same in ((emulator_library, True), (faulty, False)):
        theta = noise(1)
        CudaBackend(EmulatedLauncher(library)).outer_step(theta, momentum.clone(), noise(3), OuterSettings(0.7, 0.9))
        assert bool((bits(theta) == bits(expected)).all()) is same


# ------------------------------------------------------------------------------------ out of bounds


def under_asan(library: Path) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX", "g++")
    find = [[compiler, f"-print-file-name=lib{name}.so"] for name in ("asan", "ubsan", "stdc++")]
    runtimes = [subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip() for ask in find]
    if not Path(runtimes[0]).is_absolute():
        pytest.skip("the compiler has no ASan")
    environment = {**os.environ, "LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-m", "tests.numerics.under_asan", str(library)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


def test_no_kernel_leaves_its_tensors(emulator_library: Path) -> None:
    done = under_asan(emulated.build(sanitized=True))
    assert done.returncode == 0, done.stderr
    assert "nothing out of bounds" in done.stdout


def test_an_access_out_of_bounds_is_found(emulator_library: Path, faulty_sources: Path, tmp_path: Path) -> None:
    copy = tmp_path / "kernels"
    shutil.copytree(kernels_directory(), copy)
    shutil.copy(faulty_sources / "cuda" / "int2.cu", copy / "cuda")  # the only fault: threads beyond the last level
    # Most of compiling is the sparse kernels', which would come after int2's; only they have shared memory.
    listed = copy / "emulator" / "kernels.cpp"
    text = listed.read_text().replace('#include "topk2.cu"', "__attribute__((used)) __shared__ int nothing;")
    listed.write_text("".join(line for line in text.splitlines(True) if "topk2" not in line))
    done = under_asan(emulated.build(copy, sanitized=True, cache=tmp_path))
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "int2_check" in done.stderr

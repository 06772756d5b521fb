"""The kernels compile for every card we name, without one, to code that keeps its promises; and at most once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from filelock import FileLock

from psyche.numerics.backends import cuda_compile
from psyche.numerics.backends.cuda_compile import (
    ARCHITECTURES,
    CompilationFailed,
    cubin,
    kernels_directory,
    packed_directory,
    packed_name,
    write,
)
from tests.numerics.sass import instructions, local_memory

DENSE = ("fp32", "int8", "int4", "int4_32", "int2")
SPARSE = tuple(f"topk2_{kept}" for kept in (64, 256, 512))
KERNELS = {f"{codec}_{part}" for codec in DENSE + SPARSE for part in ("encode", "decode_add", "check")}
KERNELS |= {"outer_step", "header_write", "header_check"}

DIVISIONS = {"int8_encode": 9, "int4_encode": 8, "int4_32_encode": 8}
"""IEEE divisions in the source of each kernel that divides: one for each of a lane's values, and int8's scale."""
FMA_OF_A_DIVISION, FMA_OF_THE_SLOW_PATH = 6, 4
"""A correctly rounded quotient is an approximate reciprocal, refined with fused multiply-adds that cannot change the
result; quotients that over- or underflow on the way take a shared slow path."""

FAST = ("75", "90", "120")
"""The oldest, one that most have, and the newest; the slow tests compile for the others, too."""

every_architecture = pytest.mark.parametrize(
    "architecture", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)


@pytest.fixture(scope="session")
def cache(shared: Path) -> Path:
    pytest.importorskip("cuda.core", reason="cuda-core is not installed")
    pytest.importorskip("cuda.bindings.nvrtc", reason="cuda-bindings is not installed")
    (shared / "cubins").mkdir(exist_ok=True)
    return shared / "cubins"


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels, without what may be packed beside them in this checkout."""
    copy = tmp_path_factory.mktemp("sources") / "kernels"
    shutil.copytree(kernels_directory(), copy, ignore=shutil.ignore_patterns("cubins"))
    return copy


def compiled(architecture: str, sources: Path, cache: Path) -> Path:
    """The cubin as a bare file, for NVIDIA's tools. Compiled once for all workers."""
    bare = cache / f"{architecture}.cubin"
    with FileLock(f"{bare}.lock"):
        if not bare.exists():
            bare.write_bytes(cubin(architecture, kernels=sources, cache=cache))
    return bare


def number_of(found: Counter[str], *names: str, width: str | None = None) -> int:
    """Instructions of these names, with the modifier ``width`` where that is given."""
    split = ((name.split("."), n) for name, n in found.items())
    return sum(n for parts, n in split if parts[0] in names and (width is None or width in parts))


# --------------------------------------------------------------------------------- what the machine code is


@every_architecture
def test_no_kernel_spills(architecture: str, sources: Path, cache: Path) -> None:
    bare = compiled(architecture, sources, cache)
    used = local_memory(bare)
    assert set(used) == KERNELS
    assert set(used.values()) == {0}
    for kernel, found in instructions(bare).items():
        assert number_of(found, "LDL", "STL") == 0, kernel


@every_architecture
def test_streams_of_fp32_move_16_bytes_at_a_time(architecture: str, sources: Path, cache: Path) -> None:
    found = instructions(compiled(architecture, sources, cache))
    for kernel, streams in {
        **{f"{codec}_encode": (3 * 2, 2) for codec in DENSE if codec != "fp32"},  # base, local, e; e: two rows each
        **{f"{codec}_decode_add": (2, 2) for codec in DENSE if codec != "fp32"},
        **{f"{codec}_encode": (3 * 4, 4) for codec in SPARSE},
        "fp32_encode": (3, 2),
        "fp32_decode_add": (2, 1),
        "outer_step": (3, 3),
    }.items():
        loads, stores = streams
        assert number_of(found[kernel], "LDG", width="128") >= loads, kernel
        assert number_of(found[kernel], "STG", width="128") == stores, kernel
    # Nothing else is read than codes, planes and scales: no fp32 stream fell apart into words.
    for codec, words in {"int8": 2 + 2, "int4": 2 + 2 + 1, "int4_32": 2 + 2 + 1, "int2": 2 * 2 + 2, "fp32": 1}.items():
        loads = found[f"{codec}_decode_add"]
        assert number_of(loads, "LDG") - number_of(loads, "LDG", width="128") <= words, codec
    for codec in DENSE:
        loads = found[f"{codec}_encode"]
        assert number_of(loads, "LDG") == number_of(loads, "LDG", width="128"), codec
    for codec in ("fp32", "int8", "int4", "int4_32", "int2"):
        checked = found[f"{codec}_check"]
        assert number_of(checked, "LDG") == number_of(checked, "LDG", width="128") > 0, codec


@every_architecture
def test_what_must_be_the_same_everywhere_is_never_fused_or_flushed(
    architecture: str, sources: Path, cache: Path
) -> None:
    """After a payload is made, every node computes the same: no FMA, no flush to zero, no approximation."""
    found = instructions(compiled(architecture, sources, cache))
    for kernel in sorted(KERNELS):
        if kernel.endswith("_encode"):
            continue
        assert number_of(found[kernel], "FFMA", "UFFMA", "MUFU") == 0, kernel
        assert number_of(found[kernel], "FADD", "FMUL", "UFADD", "UFMUL", width="FTZ") == 0, kernel
    for kernel in ("outer_step", *(f"{codec}_decode_add" for codec in DENSE + SPARSE)):
        assert number_of(found[kernel], "FMUL", "FADD") >= 2, kernel


@every_architecture
def test_encoding_fuses_only_inside_divisions(architecture: str, sources: Path, cache: Path) -> None:
    found = instructions(compiled(architecture, sources, cache))
    for codec in DENSE + SPARSE:
        kernel = f"{codec}_encode"
        divisions = DIVISIONS.get(kernel, 0)
        allowed = divisions * FMA_OF_A_DIVISION + (FMA_OF_THE_SLOW_PATH if divisions else 0)
        assert number_of(found[kernel], "FFMA", "UFFMA") <= allowed, kernel
        assert number_of(found[kernel], "FADD", "FMUL") >= 8, kernel  # Δ, at least, is made with separate operations


# ---------------------------------------------------------------------------------------- at most once


def never(*_: object) -> bytes:
    raise AssertionError("compiled again")


def test_a_compiled_kernel_is_kept(sources: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiled("90", sources, cache).read_bytes()
    monkeypatch.setattr(cuda_compile, "compile_for", never)
    assert cubin("90", kernels=sources, cache=cache) == first
    with pytest.raises(AssertionError, match="compiled again"):
        cubin("90", kernels=sources, cache=tmp_path)
    with pytest.raises(AssertionError, match="compiled again"):
        cubin("80", kernels=sources, cache=tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_a_damaged_entry_is_compiled_again(
    sources: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    good = compiled("90", sources, cache).read_bytes()
    monkeypatch.setattr(cuda_compile, "compile_for", lambda *_: good)
    assert cubin("90", kernels=sources, cache=tmp_path) == good
    (entry,) = tmp_path.iterdir()
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes({"truncated": content[: len(content) // 2], "flipped": content, "empty": b""}[damage])
    assert cubin("90", kernels=sources, cache=tmp_path) == good
    monkeypatch.setattr(cuda_compile, "compile_for", never)
    assert cubin("90", kernels=sources, cache=tmp_path) == good


def test_a_packed_cubin_is_preferred_until_a_source_changes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And needs neither cuda.core nor NVRTC."""
    kernels = tmp_path / "kernels"
    shutil.copytree(sources, kernels)
    write(packed_directory(kernels) / packed_name("86", kernels), b"packed")
    monkeypatch.setattr(cuda_compile, "_nvrtc_version", never)
    assert cubin("86", kernels=kernels, cache=tmp_path) == b"packed"
    source = kernels / "cuda" / "int8.cu"
    source.write_text(source.read_text() + "\n")
    with pytest.raises(AssertionError, match="compiled again"):
        cubin("86", kernels=kernels, cache=tmp_path)


def test_a_cache_that_cannot_be_written_costs_time_only(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_compile, "compile_for", lambda *_: b"fresh")
    assert cubin("90", kernels=sources, cache=Path("/dev/null/nowhere")) == b"fresh"


def test_what_the_compiler_says_is_reported(sources: Path, cache: Path, tmp_path: Path) -> None:
    kernels = tmp_path / "kernels"
    shutil.copytree(sources, kernels)
    (kernels / "cuda" / "int8.cu").write_text("this is not C++;\n")
    with pytest.raises(CompilationFailed, match=r"int8\.cu\(1\): error"):
        cubin("90", kernels=kernels, cache=tmp_path)


@pytest.mark.slow
def test_packed_cubins_are_what_would_be_compiled(
    sources: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[2] / "scripts" / "pack_cubins.py"
    outdated = tmp_path / "sm_90-0123.cubin"
    outdated.touch()
    subprocess.run([sys.executable, str(script), "--into", str(tmp_path), "90"], check=True)
    assert not outdated.exists()
    shutil.copytree(sources, tmp_path / "kernels")
    (packed,) = tmp_path.glob("*.cubin")
    assert packed.name == packed_name("90", tmp_path / "kernels")
    packed_directory(tmp_path / "kernels").mkdir()
    packed.rename(packed_directory(tmp_path / "kernels") / packed.name)
    expected = cubin("90", kernels=sources, cache=cache)
    monkeypatch.setattr(cuda_compile, "_nvrtc_version", never)
    assert cubin("90", kernels=tmp_path / "kernels", cache=tmp_path) == expected

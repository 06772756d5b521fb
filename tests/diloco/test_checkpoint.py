"""Checkpoints: a damaged or foreign one is skipped with a warning, whatever happened to the disk or the process."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from psyche.diloco.checkpoint import Checkpoint, load_latest, save
from psyche.errors import PsycheError
from psyche.protocol.acceptor import Chain

RUN, OTHER_RUN = b"r" * 32, b"o" * 32
SIZE = 4096


def checkpoint(rounds: int, *, run_id: bytes = RUN, size: int = SIZE, residual: bool = True) -> Checkpoint:
    generator = torch.Generator().manual_seed(rounds)
    return Checkpoint(
        run_id=run_id,
        chain=Chain(rounds, rounds.to_bytes(32, "big"), bytes([rounds % 256]) * 32, rounds * 7),
        outer=torch.randn(2, size, generator=generator),
        residual=torch.randn(size, generator=generator) if residual else None,
        inner={"step/a": torch.tensor(3.0), "exp_avg/a": torch.randn(5, 7, generator=generator).T},
        certificates=tuple(bytes([n % 256]) * n for n in range(rounds)),
    )


def same(one: Checkpoint | None, other: Checkpoint) -> bool:
    assert one is not None
    assert (one.run_id, one.chain, one.certificates) == (other.run_id, other.chain, other.certificates)
    assert (one.residual is None) == (other.residual is None)
    assert one.residual is None or torch.equal(one.residual, other.residual)
    assert one.inner.keys() == other.inner.keys()
    return torch.equal(one.outer, other.outer) and all(torch.equal(one.inner[k], other.inner[k]) for k in one.inner)


def newest(directory: Path, run_id: bytes = RUN) -> tuple[Checkpoint | None, list[str]]:
    warnings: list[str] = []
    return load_latest(directory, run_id, warnings.append), warnings


def finished(directory: Path) -> list[str]:
    return sorted(path.name[:14] for path in directory.iterdir() if path.name.startswith("round-"))


@pytest.mark.parametrize("residual", [True, False])
def test_round_trip(tmp_path: Path, residual: bool) -> None:
    given = checkpoint(4, residual=residual)
    path = save(given, tmp_path / "deep" / "directory", keep=3)
    assert path.is_file()
    found, warnings = newest(path.parent)
    assert same(found, given)
    assert warnings == []


def test_loading_without_checkpoints_returns_none(tmp_path: Path) -> None:
    assert newest(tmp_path) == (None, [])
    assert newest(tmp_path / "absent") == (None, [])


def test_the_newest_is_loaded_and_old_ones_are_deleted(tmp_path: Path) -> None:
    for rounds in (1, 2, 9, 10, 100):
        save(checkpoint(rounds), tmp_path, keep=3)
    assert finished(tmp_path) == ["round-00000009", "round-00000010", "round-00000100"]
    assert same(newest(tmp_path)[0], checkpoint(100))


def test_saving_the_same_twice_is_one_file(tmp_path: Path) -> None:
    assert save(checkpoint(1), tmp_path, keep=2) == save(checkpoint(1), tmp_path, keep=2)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_flipped_bit_anywhere_is_detected(tmp_path: Path) -> None:
    save(checkpoint(1, size=16), tmp_path, keep=5)
    path = save(checkpoint(2, size=16), tmp_path, keep=5)
    content = path.read_bytes()
    for position in {*range(0, len(content), 13), 0, 7, 8, len(content) - 1}:
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        found, warnings = newest(tmp_path)
        assert same(found, checkpoint(1, size=16))
        assert len(warnings) == 1
        assert path.name in warnings[0]
        assert "corrupt" in warnings[0]
    path.write_bytes(content)
    assert same(newest(tmp_path)[0], checkpoint(2, size=16))


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 1000, -1])
def test_a_truncated_file_is_skipped(tmp_path: Path, kept: int) -> None:
    save(checkpoint(1), tmp_path, keep=5)
    path = save(checkpoint(2), tmp_path, keep=5)
    os.truncate(path, kept if kept >= 0 else path.stat().st_size - 1)
    found, warnings = newest(tmp_path)
    assert same(found, checkpoint(1))
    assert path.name in warnings[0]


def test_when_all_are_corrupt_each_is_named_and_none_is_loaded(tmp_path: Path) -> None:
    paths = [save(checkpoint(rounds), tmp_path, keep=5) for rounds in (1, 2, 3)]
    for path in paths:
        os.truncate(path, 50)
    found, warnings = newest(tmp_path)
    assert found is None
    assert [path.name in warning for path, warning in zip(reversed(paths), warnings, strict=True)] == [True] * 3


def test_the_checkpoint_of_another_run_is_skipped(tmp_path: Path) -> None:
    save(checkpoint(1), tmp_path, keep=5)
    save(checkpoint(2, run_id=OTHER_RUN), tmp_path, keep=5)
    found, warnings = newest(tmp_path)
    assert same(found, checkpoint(1))
    assert "another run" in warnings[0]
    assert newest(tmp_path, b"x" * 32)[0] is None


def test_other_files_are_left_alone(tmp_path: Path) -> None:
    save(checkpoint(1), tmp_path, keep=1)
    (tmp_path / "round-1.safetensors").write_bytes(b"mine")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    (tmp_path / f"round-00000009-{'0' * 16}.safetensors").mkdir()
    found, warnings = newest(tmp_path)
    assert same(found, checkpoint(1))
    assert len(warnings) == 1
    save(checkpoint(2), tmp_path, keep=1)
    assert (tmp_path / "notes.txt").exists()
    assert (tmp_path / "round-1.safetensors").exists()


def test_a_file_with_a_valid_name_but_invalid_content_is_skipped(tmp_path: Path) -> None:
    from blake3 import blake3

    for number, content in enumerate((b"", b"\x08\0\0\0\0\0\0\0{}      ", os.urandom(500)), start=5):
        name = f"round-{number:08d}-{blake3(content).hexdigest()[:16]}.safetensors"
        (tmp_path / name).write_bytes(content)
    save(checkpoint(1), tmp_path, keep=9)
    found, warnings = newest(tmp_path)
    assert same(found, checkpoint(1))
    assert len(warnings) == 3


@pytest.mark.parametrize("keep", [1, 2])
def test_corrupt_or_foreign_files_of_later_rounds_do_not_displace_valid_ones(tmp_path: Path, keep: int) -> None:
    """A node fell back to round 1 because rounds 5 and 6 are corrupt: what it saves next must survive."""
    save(checkpoint(1), tmp_path, keep=9)
    for rounds in (5, 6):
        os.truncate(save(checkpoint(rounds), tmp_path, keep=9), 100)
    path = save(checkpoint(2), tmp_path, keep=keep)
    assert path.exists()
    assert same(newest(tmp_path)[0], checkpoint(2))


# ---------------------------------------------------------------------------- disks that let us down


def test_an_unwritable_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PsycheError, match="cannot write a checkpoint"):
        save(checkpoint(1), tmp_path / "file", keep=3)
    with pytest.raises(PsycheError, match="cannot write a checkpoint"):
        save(checkpoint(1), tmp_path / "file" / "below", keep=3)


LIMITED = """
import resource, sys
from pathlib import Path
from psyche.errors import PsycheError
from psyche.diloco.checkpoint import save
from tests.diloco.test_checkpoint import checkpoint
save(checkpoint(1), Path(sys.argv[1]), keep=3)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(checkpoint(2, size=100_000), Path(sys.argv[1]), keep=3)
except PsycheError as error:
    sys.exit(str(error))
"""


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )


def test_a_file_size_limit_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    process = child(LIMITED, str(tmp_path))
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith("cannot write a checkpoint"), errors
    assert "Traceback" not in errors
    assert same(newest(tmp_path)[0], checkpoint(1))
    assert len(list(tmp_path.iterdir())) == 1, "nothing half-written is left"


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(place), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"mounting needs privileges: {os.strerror(ctypes.get_errno())}")
    try:
        yield place
    finally:
        libc.umount2(bytes(place), 2)


def test_a_full_disk_leaves_the_older_checkpoint(tiny_disk: Path) -> None:
    save(checkpoint(1), tiny_disk, keep=3)
    with pytest.raises(PsycheError, match="free some space"):
        save(checkpoint(2, size=200_000), tiny_disk, keep=3)
    assert same(newest(tiny_disk)[0], checkpoint(1))
    assert finished(tiny_disk) == ["round-00000001"]
    assert len(list(tiny_disk.iterdir())) == 1
    save(checkpoint(3), tiny_disk, keep=3)
    assert same(newest(tiny_disk)[0], checkpoint(3))


SAVING = """
import sys
from pathlib import Path
from psyche.diloco.checkpoint import save
from tests.diloco.test_checkpoint import checkpoint
for rounds in range(1, 200):
    print(rounds, flush=True)
    save(checkpoint(rounds, size=300_000), Path(sys.argv[1]), keep=2)
"""


@pytest.mark.parametrize("after", [2, 5])
def test_a_process_killed_while_saving_leaves_a_directory_that_loads(tmp_path: Path, after: int) -> None:
    process = child(SAVING, str(tmp_path))
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= after:
            break
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    found, warnings = newest(tmp_path)
    assert warnings == []
    assert found is not None
    assert found.chain.rounds >= after - 1
    assert same(found, checkpoint(found.chain.rounds, size=300_000))


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    process = child(SAVING, str(tmp_path))
    assert process.stdout is not None
    assert int(process.stdout.readline()) == 1
    while process.poll() is None and not any(path.name.startswith(".") for path in tmp_path.iterdir()):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    save(checkpoint(201), tmp_path, keep=2)
    assert all(path.name.startswith("round-") for path in tmp_path.iterdir())

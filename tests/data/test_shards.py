"""The shuffle: a permutation of the sequences, in shards of one size, whatever was there before."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.data.index import Shard
from psyche.data.shards import PIECE_BYTES, Staged, order, require_room, write_shards
from psyche.errors import PsycheError

WIDTH = 8


def stage(directory: Path, sequences: int, dtype: str = "<u2") -> tuple[Staged, np.ndarray]:
    """Staged random sequences; the file is longer than it should be, as after a crash."""
    rows = np.random.default_rng(sequences).integers(0, 2**16, (sequences, WIDTH)).astype(dtype)
    (directory / "staged").write_bytes(rows.tobytes() + b"more")
    return Staged(directory / "staged", sequences, WIDTH, dtype), rows


def read(directory: Path, shards: tuple[Shard, ...], dtype: str = "<u2") -> np.ndarray:
    content = b"".join((directory / shard.file).read_bytes() for shard in shards)
    return np.frombuffer(content, dtype).reshape(-1, WIDTH)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 250), st.integers(1, 1000), st.sampled_from(["<u2", "<u4"]))
def test_the_shards_are_a_permutation_of_what_was_staged(sequences: int, shard_bytes: int, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        staged, rows = stage(directory, sequences, dtype)
        counts: list[int] = []
        shards = write_shards(directory, "train", staged, shard_bytes, counts.append)
        found = read(directory, shards, dtype)
        assert sorted(map(bytes, found)) == sorted(map(bytes, rows))
        assert np.array_equal(found, rows[order("train", range(sequences), sequences)])
        assert len({shard.sequences for shard in shards[:-1]}) <= 1
        assert all(shards[0].sequences >= shard.sequences for shard in shards)
        assert counts == [shard.sequences for shard in shards]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sequences_are_spread_over_the_whole_corpus(split: str) -> None:
    """Neighbours do not stay neighbours, and each tenth of the corpus is found in each tenth of the order."""
    count = 20_000
    places = order(split, range(count), count)
    assert sorted(places.tolist()) == list(range(count))
    assert (np.abs(np.diff(places)) == 1).mean() < 0.001
    tenths = np.histogram2d(np.arange(count), places, bins=10)[0]
    assert 150 < tenths.min() <= tenths.max() < 250


def test_the_splits_have_orders_of_their_own() -> None:
    assert not np.array_equal(order("train", range(1000), 1000), order("heldout", range(1000), 1000))


def test_more_than_is_read_at_once(tmp_path: Path) -> None:
    staged, rows = stage(tmp_path, 3 * PIECE_BYTES // (2 * WIDTH) + 5)
    shards = write_shards(tmp_path, "train", staged, 1 << 30, lambda _: None)
    assert np.array_equal(read(tmp_path, shards), rows[order("train", range(len(rows)), len(rows))])


def test_shards_that_are_there_are_kept_and_a_torn_one_is_not(tmp_path: Path) -> None:
    staged, _ = stage(tmp_path, 100)
    first = write_shards(tmp_path, "train", staged, 320, lambda _: None)
    inode = (tmp_path / first[0].file).stat().st_ino
    (tmp_path / first[2].file).write_bytes(b"torn")
    (tmp_path / first[4].file).unlink()
    assert write_shards(tmp_path, "train", staged, 320, lambda _: None) == first
    assert (tmp_path / first[0].file).stat().st_ino == inode


def test_a_disk_without_room_is_named_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged, _ = stage(tmp_path, 100)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1599))
    with pytest.raises(PsycheError, match=r"needs 1,600 more bytes in .*, 1,599 are free .*node\.cache"):
        write_shards(tmp_path, "train", staged, 320, lambda _: None)
    require_room(tmp_path, 1599)

"""Fetched shards: never more than the limit, never one that is in use, and one fetcher at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from psyche.data.cache import CacheFull, ShardCache
from psyche.data.index import Shard
from psyche.data.token_store import BadShard, Split, TokenStore
from psyche.numerics.digest import blob_root
from tests.data.test_token_store import LENGTH, flip_bit, write_store


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    """Ten shards of 320 bytes, in the directory ``whole``."""
    write_store(tmp_path / "whole")
    return TokenStore.open(tmp_path / "whole")


def cached(tmp_path: Path, shards: int = 3) -> ShardCache:
    return ShardCache(tmp_path / "cache", shards * 320)


def put(cache: ShardCache, store: TokenStore, number: int, used: int = 0) -> Shard:
    """Fetch a shard, last used at ``used``."""
    shard = store.train.shards[number]
    incoming = cache.claim(shard)
    assert incoming is not None
    with incoming:
        os.pwrite(incoming.descriptor, store.path_of(shard).read_bytes(), 0)
        incoming.keep()
    os.utime(cache.path_of(shard), (used, used))
    return shard


def partial(cache: ShardCache, store: TokenStore) -> Split:
    """The training split of a node that has nothing but its cache."""
    return Split(store.index, store.index.train, [cache.path_of])


def here(cache: ShardCache, store: TokenStore) -> list[int]:
    return [n for n, shard in enumerate(store.train.shards) if cache.path_of(shard).exists()]


def test_a_split_reads_what_is_here_and_names_what_is_not(tmp_path: Path, store: TokenStore) -> None:
    cache = cached(tmp_path)
    put(cache, store, 4)
    split = partial(cache, store)
    assert split.batch(range(40, 50)).tolist() == store.train.batch(range(40, 50)).tolist()
    assert len(split) == 100
    assert split.copies(4)
    assert not split.copies(5)
    with pytest.raises(BadShard, match="is missing") as caught:
        split.batch([49, 50])
    assert caught.value.corrupt == ()


def test_what_was_used_longest_ago_makes_way(tmp_path: Path, store: TokenStore) -> None:
    cache = cached(tmp_path)
    for number, used in ((0, 3), (1, 1), (2, 2)):
        put(cache, store, number, used)
    put(cache, store, 3, 4)
    assert here(cache, store) == [0, 2, 3]
    cache.used(store.train.shards[2])
    put(cache, store, 4)
    assert here(cache, store) == [2, 3, 4]
    assert cache.room() == 0


def test_an_open_shard_stays_until_it_is_closed_even_that_of_another_process(tmp_path: Path, store: TokenStore) -> None:
    cache = cached(tmp_path)
    for number in range(3):
        put(cache, store, number, number)
    ours, theirs = partial(cache, store), partial(cache, store)
    ours.open(0)
    theirs.open(0)
    ours.open(1)
    put(cache, store, 3)
    assert here(cache, store) == [0, 1, 3]
    ours.open(3)
    with pytest.raises(CacheFull, match=r"node\.data_cache"):
        cache.claim(store.train.shards[4])
    assert not list(cache.directory.glob("*.part")), "what could not be begun leaves nothing behind"
    ours.close_all_but([3])
    put(cache, store, 4)
    assert here(cache, store) == [0, 3, 4], "the other still has the first one open"


def test_who_reads_a_shard_that_is_closed_meanwhile_goes_on(tmp_path: Path, store: TokenStore) -> None:
    cache = cached(tmp_path, 1)
    put(cache, store, 0)
    split = partial(cache, store)
    tokens = split.open(0)
    cache.drop(store.train.shards[0])
    split.close_all_but([])
    assert tokens.tolist() == store.train.open(0).tolist()


def test_a_shard_is_fetched_by_one_at_a_time_and_a_part_counts(tmp_path: Path, store: TokenStore) -> None:
    cache, shard = cached(tmp_path), store.train.shards[0]
    incoming = cache.claim(shard)
    assert incoming is not None
    assert cache.claim(shard) is None
    assert cache.room() == 2 * 320
    assert not cache.path_of(shard).exists()
    incoming.close()
    assert cache.room() == 3 * 320
    put(cache, store, 0)


def test_a_part_that_a_killed_process_left_is_taken_over_and_others_make_way(tmp_path: Path, store: TokenStore) -> None:
    cache = cached(tmp_path, 2)
    code = (
        "import os, signal, sys; from pathlib import Path; from psyche.data.cache import ShardCache;"
        "from psyche.data.index import Shard;"
        "cache = ShardCache(Path(sys.argv[1]), 640);"
        "kept = [cache.claim(Shard('x', 10, 320, root * 64)) for root in 'ab'];"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(cache.directory)], check=False, timeout=60)
    assert len(list(cache.directory.glob("*.part"))) == 2
    incoming = cache.claim(Shard("x", 10, 320, "a" * 64))
    assert incoming is not None
    incoming.close()
    put(cache, store, 0)
    put(cache, store, 1)
    assert here(cache, store) == [0, 1]


def test_a_corrupt_copy_is_passed_over_for_a_good_one_and_named_where_there_is_none(
    tmp_path: Path, store: TokenStore
) -> None:
    cache = cached(tmp_path)
    shard = put(cache, store, 0)
    flip_bit(cache.path_of(shard))
    split = Split(store.index, store.index.train, [cache.path_of, store.path_of])
    assert split.open(0).shape == (10, LENGTH)
    with pytest.raises(BadShard, match="is corrupt") as caught:
        partial(cache, store).open(0)
    assert caught.value.corrupt == (cache.path_of(shard),)


def test_names_are_roots(tmp_path: Path, store: TokenStore) -> None:
    cache = cached(tmp_path)
    shard = put(cache, store, 7)
    assert blob_root((cache.directory / shard.root).read_bytes()).hex() == shard.root


# -------------------------------------------------------------------------- a file system without locks


@pytest.fixture(params=[errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def lockless(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, operation: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("lockless")
def test_without_locks_two_that_fetch_the_same_do_not_spoil_it_for_each_other(
    tmp_path: Path, store: TokenStore
) -> None:
    cache, shard = cached(tmp_path), store.train.shards[0]
    content = store.path_of(shard).read_bytes()
    first, second = cache.claim(shard), cache.claim(shard)
    assert first is not None
    assert second is not None
    assert not cache.locks
    with first, second:
        os.pwrite(first.descriptor, content, 0)
        os.pwrite(second.descriptor, content[:100], 0)
        first.keep()
        tokens = partial(cache, store).open(0)
        third = cache.claim(shard)
        assert third is not None, "nor does who comes later cut off what is being read"
        third.close()
        os.pwrite(second.descriptor, content, 0)
        second.keep()
    assert tokens.tolist() == store.train.open(0).tolist()
    assert [path.name for path in cache.directory.iterdir()] == [shard.root]


@pytest.mark.usefixtures("lockless")
def test_without_locks_a_part_that_grows_is_left_alone_and_an_old_one_makes_way(
    tmp_path: Path, store: TokenStore
) -> None:
    cache = cached(tmp_path, 2)
    incoming = cache.claim(store.train.shards[0])
    assert incoming is not None
    put(cache, store, 1, 1)
    put(cache, store, 2, 2)
    assert here(cache, store) == [2], "it counts, and stays"
    os.utime(incoming.descriptor, (0, 0))
    put(cache, store, 3, 3)
    assert here(cache, store) == [2, 3]
    incoming.close()


def test_with_locks_it_knows_that_it_has_them(tmp_path: Path, store: TokenStore) -> None:
    cache = cached(tmp_path)
    put(cache, store, 0)
    assert cache.locks

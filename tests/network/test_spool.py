"""Blobs on disk: missing chunks are not returned, closed blobs are gone, and a full disk is reported."""

import errno
import os
from pathlib import Path

import pytest

from psyche.errors import PsycheError
from psyche.network.spool import Spool
from psyche.numerics.digest import index_chunks, payload_root

PARTS = [b"one", b"", b"three and more", bytes(10_000)]


def test_a_stored_blob_is_readable_and_has_no_file_name(tmp_path: Path) -> None:
    blob = Spool(tmp_path / "new").put(PARTS)
    assert blob.complete
    assert blob.index.root == payload_root(PARTS)
    assert [blob[number] for number in range(len(PARTS))] == PARTS
    assert os.listdir(tmp_path / "new") == [], "the file must vanish with the process"


def test_chunks_arrive_in_any_order_and_only_those_are_readable(tmp_path: Path) -> None:
    blob = Spool(tmp_path).create(index_chunks(PARTS))
    blob.write(2, PARTS[2])
    assert blob.present(2)
    assert not blob.present(0)
    assert not blob.complete
    assert blob[2] == PARTS[2]
    with pytest.raises(LookupError, match="chunk 0 is not here"):
        blob[0]
    for number in (-1, len(PARTS)):
        with pytest.raises(IndexError):
            blob[number]


def test_a_closed_blob_can_be_neither_read_nor_written(tmp_path: Path) -> None:
    blob = Spool(tmp_path).create(index_chunks(PARTS))
    blob.write(0, PARTS[0])
    blob.close()
    with (tmp_path / "another").open("wb+") as file:  # it gets the freed descriptor
        blob.write(2, PARTS[2])
        blob.close()
        assert not blob.present(2)
        assert os.fstat(file.fileno()).st_size == 0
    with pytest.raises(LookupError):
        blob[0]


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: whole(descriptor, data[:7], offset))
    blob = Spool(tmp_path).put(PARTS)
    assert [blob[number] for number in range(len(PARTS))] == PARTS


def test_a_full_disk_marks_no_chunk_as_present_and_names_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, left = os.pwrite, [5]

    def fills_up(descriptor: int, data: memoryview, offset: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = whole(descriptor, data[: left[0]], offset)
        left[0] -= count
        return count

    monkeypatch.setattr(os, "pwrite", fills_up)
    blob = Spool(tmp_path).create(index_chunks(PARTS))
    blob.write(0, PARTS[0])
    with pytest.raises(PsycheError, match="No space left on device; free some disk space or choose another"):
        blob.write(2, PARTS[2])
    assert blob.present(0)
    assert not blob.present(2)


def test_an_unwritable_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PsycheError, match=f"cannot make a file in {tmp_path}/file/below"):
        Spool(tmp_path / "file" / "below").create(index_chunks(PARTS))

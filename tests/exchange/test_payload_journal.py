"""What outer steps took is on disk before it is needed, and what the disk spoils is not believed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.errors import PsycheError
from psyche.exchange.payload_journal import PayloadJournal
from psyche.network.spool import Blob, Spool


def silent(text: str) -> None:
    pytest.fail(text)


def blob(directory: Path, *parts: bytes) -> Blob:
    return Spool(directory).put(parts)


def content(found: Blob | None) -> list[bytes]:
    assert found is not None
    return [found[number] for number in range(found.index.chunks)]


def test_a_blob_is_there_after_its_spool_is_gone_and_the_process_starts_again(tmp_path: Path) -> None:
    given = blob(tmp_path, b"one", b"two and more")
    root = given.index.root
    journal = PayloadJournal(tmp_path / "journal", silent)
    assert journal.blob(root) is None
    assert journal.put(3, given)
    assert not journal.put(4, given), "it is there already"
    given.close()
    for one in (journal, PayloadJournal(tmp_path / "journal", silent)):
        assert content(one.blob(root)) == [b"one", b"two and more"]
        assert one.reader(root)(1) == b"two and more"
        assert root in one


def test_old_rounds_are_dropped(tmp_path: Path) -> None:
    journal = PayloadJournal(tmp_path, silent)
    roots = []
    for round_number in range(1, 6):
        made = blob(tmp_path, bytes([round_number]))
        roots.append(made.index.root)
        journal.put(round_number, made)
    assert journal.before(4) == roots[:3]
    for root in roots[:3]:
        journal.drop(root)
    assert [journal.blob(root) is not None for root in roots] == [False] * 3 + [True] * 2
    assert {index.root for index in PayloadJournal(tmp_path, silent).blobs} == set(roots[3:])


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_a_file_that_was_changed_or_cut_off_is_not_believed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("journal")
    journal = PayloadJournal(directory, silent)
    made = blob(directory, b"some chunk", b"another")
    journal.put(1, made)
    (path,) = directory.glob("*.blob")
    whole = path.read_bytes()
    if data.draw(st.booleans()):
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        at = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :])
    warnings: list[str] = []
    again = PayloadJournal(directory, warnings.append)
    assert again.blob(made.index.root) is None
    assert made.index.root not in again, "it is forgotten, and so it can be kept anew"
    assert again.put(2, blob(directory, b"some chunk", b"another"))
    assert content(again.blob(made.index.root)) == [b"some chunk", b"another"]


def test_a_killed_writer_leaves_whole_blobs_or_none(tmp_path: Path) -> None:
    writer = (
        "import sys; from pathlib import Path; from psyche.network.spool import Spool; "
        "from psyche.exchange.payload_journal import PayloadJournal\n"
        "where = Path(sys.argv[1]); journal = PayloadJournal(where / 'journal', print); spool = Spool(where)\n"
        "for round in range(10**6):\n"
        "    blob = spool.put([round.to_bytes(8, 'little') * 1000, b'x' * 5000])\n"
        "    journal.put(round, blob); print(blob.index.root.hex(), flush=True); blob.close()\n"
    )
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", writer, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        said = [process.stdout.readline().split()[-1] for _ in range(40)]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        journal = PayloadJournal(tmp_path / "journal", silent)
        there = {index.root for index in journal.blobs}
        assert {bytes.fromhex(root.decode()) for root in said} <= there
        assert all(journal.blob(root) is not None for root in there)
        for root in journal.before(10**7):
            journal.drop(root)


def test_a_file_system_that_cannot_name_nameless_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError

    monkeypatch.setattr(os, "link", refuse)
    made = blob(tmp_path, b"one", b"two")
    journal = PayloadJournal(tmp_path / "journal", silent)
    journal.put(1, made)
    assert content(PayloadJournal(tmp_path / "journal", silent).blob(made.index.root)) == [b"one", b"two"]


def test_a_full_disk_is_named_with_the_option_that_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    made, journal = blob(tmp_path, b"one"), PayloadJournal(tmp_path / "journal", silent)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        PsycheError, match=r"no space left .* free disk space .*, or choose another directory with --directory"
    ):
        journal.put(1, made)
    assert made.index.root not in journal

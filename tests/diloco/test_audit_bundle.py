"""Audit bundles: stored as long as needed, complete or not at all, and never blocking training."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from psyche.diloco.audit_bundle import MAX_BUNDLE_BYTES, AuditBundle, AuditBundleStore, BlobUnavailable
from psyche.diloco.trace import Trace, TracePoint, trace_point_steps
from psyche.numerics.digest import CHUNK, blob_root
from psyche.protocol.wire import MalformedMessage, decode

POINT = TracePoint(0, b"p" * 32, b"o" * 32)
BLOB = bytes(range(256)) * (CHUNK // 200)


def full(bundles: AuditBundleStore, round_number: int) -> bytes:
    bundles.begin(round_number)
    root = bundles.store(round_number, BLOB)
    bundles.finish(round_number, AuditBundle((POINT,)))
    bundles.bundle(round_number)  # which waits until it is written
    return root


def test_stored_blobs_are_served_after_a_restart(tmp_path: Path) -> None:
    root = full(AuditBundleStore(tmp_path), 3)
    assert root == blob_root(BLOB)
    bundles = AuditBundleStore(tmp_path)
    assert bundles.rounds == [3]
    assert bundles.bundle(3) == AuditBundle((POINT,))
    assert bundles.read(3, root, len(BLOB)) == BLOB
    ((served, load, read),) = bundles.blobs(3)
    index = load()
    assert served == index.root == root
    assert b"".join(read(number) for number in range(index.chunks)) == BLOB
    for wrong in ((4, root, len(BLOB)), (3, b"x" * 32, len(BLOB)), (3, root, len(BLOB) - 1)):
        with pytest.raises(BlobUnavailable):
            bundles.read(*wrong)


def test_a_truncated_blob_is_not_served(tmp_path: Path) -> None:
    bundles = AuditBundleStore(tmp_path)
    root = full(bundles, 1)
    (path,) = tmp_path.glob("*/" + root.hex())
    path.write_bytes(BLOB[:-1])
    with pytest.raises(BlobUnavailable):
        bundles.read(1, root, len(BLOB))
    ((_, load, _),) = bundles.blobs(1)
    with pytest.raises(LookupError):
        load()


def test_old_rounds_are_deleted_except_audited_ones(tmp_path: Path) -> None:
    bundles = AuditBundleStore(tmp_path)
    for round_number in range(1, 6):
        full(bundles, round_number)
    assert len({path.stat().st_ino for path in tmp_path.glob("*/" + blob_root(BLOB).hex())}) == 1, "kept once"
    bundles.forget(5, keep={2})
    assert bundles.rounds == [2, 5]
    assert bundles.read(5, blob_root(BLOB), len(BLOB)) == BLOB


def test_an_unfinished_round_is_deleted(tmp_path: Path) -> None:
    bundles = AuditBundleStore(tmp_path)
    bundles.begin(1)
    bundles.store(1, BLOB)
    assert bundles.bundle(1) is None
    assert AuditBundleStore(tmp_path).rounds == []
    assert not list(tmp_path.iterdir())


def test_a_full_disk_loses_the_bundle_but_not_the_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    bundles = AuditBundleStore(tmp_path, said.append)
    earlier = full(bundles, 1)

    def refused(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(AuditBundleStore, "_write", refused)
        assert full(bundles, 2) == earlier, "the root is that of the blob all the same"
        assert bundles.store(2, b"more") == blob_root(b"more")
    assert bundles.rounds == [1]
    assert len(said) == 1
    assert "No space left" in said[0]
    full(bundles, 3)
    assert bundles.rounds == [1, 3], "there is room again"


def test_bundles_are_bounded_and_canonical() -> None:
    most = AuditBundle(tuple(TracePoint(2**62, b"p" * 32, b"o" * 32) for _ in range(4096)))
    assert len(most.encode()) <= MAX_BUNDLE_BYTES
    assert decode(AuditBundle, most.encode()) == most
    bad = [
        b"",
        b"\x90",
        AuditBundle((POINT,)).encode() + b"\0",
        AuditBundle((POINT,) * 4097).encode(),
        AuditBundle(()).encode(),
    ]
    for data in bad:
        with pytest.raises(MalformedMessage):
            decode(AuditBundle, data)


def test_trace_points_are_the_start_every_interval_and_the_end() -> None:
    assert trace_point_steps(0, 30, None) == [0, 30]
    assert trace_point_steps(0, 30, 10) == [0, 10, 20, 30]
    assert trace_point_steps(3, 7, 3) == [3, 6, 7]
    assert trace_point_steps(4, 4, 2) == [4]
    assert trace_point_steps(0, 1, 5) == [0, 1]


def test_the_trace_root_depends_on_the_points_and_their_order() -> None:
    traces = [Trace(), Trace(), Trace()]
    for trace, order in zip(traces, ((b"a", b"b"), (b"b", b"a"), (b"a", b"b")), strict=True):
        for step, blob in enumerate(order):
            trace.record_point(step, blob, b"optimizer")
    assert traces[0].root == traces[2].root != traces[1].root
    assert traces[0].points[0].parameters == blob_root(b"a")

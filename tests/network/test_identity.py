"""Identities: signatures are verified from the author's PeerID alone; key files are complete and private."""

import os
from collections.abc import Callable
from pathlib import Path

import base58
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.errors import PsycheError
from psyche.network.identity import BadSignature, Identity, WrongContext, open_envelope, verify

ALICE = Identity(bytes(range(32)), Path("alice.key"))
BOB = Identity(bytes(range(1, 33)), Path("bob.key"))
RUN = bytes(32)


@given(st.binary(max_size=200), st.data())
def test_a_signature_is_valid_only_for_its_key_and_bytes(data: bytes, draw: st.DataObject) -> None:
    signature = ALICE.sign(data)
    assert verify(ALICE.peer_id, data, signature)
    assert not verify(BOB.peer_id, data, signature)
    assert not verify(ALICE.peer_id, data + b"x", signature)
    broken = bytearray(signature)
    broken[draw.draw(st.integers(0, 63))] ^= draw.draw(st.integers(1, 255))
    assert not verify(ALICE.peer_id, data, bytes(broken))
    assert not verify(ALICE.peer_id, data, signature[:-1])


ORDER = 2**252 + 27742317777372353535851937790883648493
"""Order of the base point (RFC 8032, §5.1)."""
FORGERIES: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda good: bytes(64),
    "R is the identity, s is 0": lambda good: b"\1" + bytes(63),
    "R is not a point": lambda good: b"\2" + bytes(31) + good[32:],
    "R is not canonical": lambda good: (2**255 - 18).to_bytes(32, "little") + good[32:],
    "s is not canonical": lambda good: good[:32] + (int.from_bytes(good[32:], "little") + ORDER).to_bytes(32, "little"),
    "a byte too many": lambda good: good + b"\0",
    "empty": lambda good: b"",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_malformed_signature_is_rejected(name: str) -> None:
    assert not verify(ALICE.peer_id, b"data", FORGERIES[name](ALICE.sign(b"data")))


@given(st.text(max_size=80) | st.from_regex(r"\A12D3Koo[1-9A-HJ-NP-Za-km-z]{45}\Z"))
def test_a_signature_is_invalid_under_other_names(name: str) -> None:
    assert not verify(name, b"data", ALICE.sign(b"data"))


def test_a_peer_id_has_only_one_valid_form() -> None:
    signature = ALICE.sign(b"data")
    raw = base58.b58decode(ALICE.peer_id)
    secp256k1 = base58.b58encode(raw[:3] + b"\x02" + raw[4:]).decode()
    for name in (" " + ALICE.peer_id, ALICE.peer_id + "\n", "1" + ALICE.peer_id, secp256k1, "Qm" + "a" * 44, ""):
        assert not verify(name, b"data", signature)


def test_an_envelope_is_valid_only_in_its_own_context() -> None:
    envelope = ALICE.seal("commit", RUN, 7, b"body")
    open_envelope(envelope, domain="commit", run_id=RUN, round_number=7)
    open_envelope(envelope, domain="commit", run_id=RUN)
    with pytest.raises(WrongContext, match="domain"):
        open_envelope(envelope, domain="vote", run_id=RUN)
    with pytest.raises(WrongContext, match="run"):
        open_envelope(envelope, domain="commit", run_id=bytes(31) + b"x")
    with pytest.raises(WrongContext, match="round 7, expected 8"):
        open_envelope(envelope, domain="commit", run_id=RUN, round_number=8)
    changes = {"round": 8, "body": b"other", "author": BOB.peer_id, "domain": "vote", "run_id": bytes(31) + b"x"}
    for name, value in changes.items():
        forged = msgspec.structs.replace(envelope, **{name: value})
        with pytest.raises(BadSignature):
            open_envelope(forged, domain=forged.domain, run_id=forged.run_id)


def test_secret_digests_depend_on_the_key_and_every_part() -> None:
    assert ALICE.secret_digest(b"a", b"b") == Identity(bytes(range(32)), Path("copy")).secret_digest(b"a", b"b")
    others = [BOB.secret_digest(b"a", b"b"), ALICE.secret_digest(b"ab"), ALICE.secret_digest(b"a", b"c")]
    assert len({ALICE.secret_digest(b"a", b"b"), *others}) == 4


def test_a_key_file_is_created_once_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "node.key"
    first = Identity.load_or_create(path)
    assert first.peer_id.startswith("12D3Koo")
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_create(path).peer_id == first.peer_id
    assert [entry.name for entry in path.parent.iterdir()] == ["node.key"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b + b"x", lambda b: b[:40] + bytes(28)])
def test_a_damaged_key_file_is_refused(tmp_path: Path, damage: object) -> None:
    path = tmp_path / "node.key"
    Identity.load_or_create(path)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(PsycheError, match="damaged; restore it"):
        Identity.load_or_create(path)


def test_a_key_file_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    Identity.load_or_create(path)
    os.chmod(path, 0o644)
    with pytest.raises(PsycheError, match="chmod 600"):
        Identity.load_or_create(path)


def test_an_unwritable_key_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PsycheError, match="cannot use the identity file"):
        Identity.load_or_create(tmp_path / "file" / "node.key")

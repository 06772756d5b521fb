"""Envelopes: one canonical form, and no input breaks the decoder."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.protocol.wire import Envelope, MalformedMessage, decode_envelope, encode_envelope, signing_bytes

AUTHOR = "12D3KooWFSX9rPxi5p8zYYzETNrXG8a7d7bHTxcQW3SGSkKiB9Qh"
ENVELOPE = Envelope("commit", bytes(32), 7, AUTHOR, b"body", bytes(64))

trees = st.recursive(st.integers(-(2**63), 2**63) | st.binary() | st.text(), st.lists)
envelopes = st.builds(
    Envelope,
    domain=st.from_regex(r"\A[a-z0-9][a-z0-9/._-]{0,31}\Z"),
    run_id=st.binary(min_size=32, max_size=32),
    round=st.integers(0, 2**63 - 1),
    author=st.just(AUTHOR),
    body=st.binary(max_size=300),
    signature=st.binary(min_size=64, max_size=64),
)


@given(envelopes)
def test_envelopes_round_trip_through_their_encoding(envelope: Envelope) -> None:
    assert decode_envelope(encode_envelope(envelope)) == envelope


@given(st.binary(max_size=400) | trees.map(msgspec.msgpack.encode))
def test_any_bytes_are_an_envelope_or_malformed(data: bytes) -> None:
    with contextlib.suppress(MalformedMessage):
        assert encode_envelope(decode_envelope(data)) == data


@given(envelopes, st.data())
def test_a_changed_byte_is_another_envelope_or_malformed(envelope: Envelope, data: st.DataObject) -> None:
    raw = bytearray(encode_envelope(envelope))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(MalformedMessage):
        assert decode_envelope(bytes(raw)) != envelope


def test_bytes_are_bounded_before_they_are_decoded() -> None:
    with pytest.raises(MalformedMessage, match="over the limit"):
        decode_envelope(bytes(101), max_bytes=100)


@pytest.mark.parametrize(
    "fields",
    [
        ("commit", bytes(31), 7, AUTHOR, b"", bytes(64)),
        ("commit", bytes(32), -1, AUTHOR, b"", bytes(64)),
        ("commit", bytes(32), 2**63, AUTHOR, b"", bytes(64)),
        ("commit", bytes(32), 7, AUTHOR + "\n", b"", bytes(64)),
        ("commit", bytes(32), 7, AUTHOR, b"", bytes(63)),
        ("commit", bytes(32), 7, AUTHOR, b"", bytes(64), 1),
        ("commit", bytes(32), 7, AUTHOR, b""),
        ("c" * 33, bytes(32), 7, AUTHOR, b"", bytes(64)),
        ("commit\n", bytes(32), 7, AUTHOR, b"", bytes(64)),
        ("commit", bytes(32), 7.0, AUTHOR, b"", bytes(64)),
        ("commit", bytes(32), True, AUTHOR, b"", bytes(64)),
    ],
)
def test_fields_out_of_bounds_are_refused(fields: tuple[object, ...]) -> None:
    with pytest.raises(MalformedMessage):
        decode_envelope(msgspec.msgpack.encode(fields))


def test_non_canonical_encodings_are_refused() -> None:
    canonical = encode_envelope(ENVELOPE)
    at = canonical.index(bytes(32) + b"\x07") + 32
    longer = canonical[:at] + b"\xcc\x07" + canonical[at + 1 :]
    with pytest.raises(MalformedMessage, match="canonical"):
        decode_envelope(longer)
    with pytest.raises(MalformedMessage):
        decode_envelope(canonical + b"\x00")


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(MalformedMessage):
        decode_envelope(b"\x91" * 100_000)


def test_everything_but_the_signature_is_signed() -> None:
    changed = [
        msgspec.structs.replace(ENVELOPE, domain="vote"),
        msgspec.structs.replace(ENVELOPE, run_id=bytes(31) + b"1"),
        msgspec.structs.replace(ENVELOPE, round=8),
        msgspec.structs.replace(ENVELOPE, author=AUTHOR[:-1] + "i"),
        msgspec.structs.replace(ENVELOPE, body=b"bodx"),
    ]
    assert len({signing_bytes(e) for e in [ENVELOPE, *changed]}) == 6
    assert signing_bytes(msgspec.structs.replace(ENVELOPE, signature=b"1" * 64)) == signing_bytes(ENVELOPE)

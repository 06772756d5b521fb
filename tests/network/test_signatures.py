"""Signatures that are checked together hold exactly where each of them does; and the curve, against big integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.network import signatures
from psyche.network.identity import BadSignature, Identity, WrongContext, verify
from psyche.network.signatures import ORDER, Batch
from psyche.protocol.wire import Envelope, signing_bytes

pytestmark = pytest.mark.skipif(not signatures.available(), reason="the C++ extension is not there")

OWNERS = [Identity(bytes([number]) * 32, Path("unused")) for number in range(1, 6)]
RUN = b"r" * 32


def sealed(number: int) -> Envelope:
    return OWNERS[number % len(OWNERS)].seal("vote", RUN, number, bytes([number % 251]) * (number % 40))


def batch(envelopes: list[Envelope]) -> Batch:
    made = Batch()
    for one in envelopes:
        made.open_envelope(one, domain="vote", run_id=RUN)
    return made


@given(st.lists(st.integers(0, 1000), max_size=40))
@settings(deadline=None, max_examples=30)
def test_valid_ones_hold(numbers: list[int]) -> None:
    assert batch([sealed(number) for number in numbers]).holds()


def test_very_many_hold_and_one_bad_one_is_missed_by_none() -> None:
    many = [sealed(number) for number in range(2000)]
    assert batch(many).holds()
    many[1234] = msgspec.structs.replace(many[1234], round=1)
    assert not batch(many).holds()


def swapped_s(envelope: Envelope) -> Envelope:
    """s + L: the same equation, in another form."""
    s = int.from_bytes(envelope.signature[32:], "little") + ORDER
    return msgspec.structs.replace(envelope, signature=envelope.signature[:32] + s.to_bytes(32, "little"))


FORGERIES: dict[str, Callable[[Envelope], Envelope]] = {
    "another body": lambda one: msgspec.structs.replace(one, body=one.body + b"!"),
    "another author": lambda one: msgspec.structs.replace(one, author=OWNERS[-1].peer_id),
    "another form of s": swapped_s,
    "nothing": lambda one: msgspec.structs.replace(one, signature=bytes(64)),
    "the identity and 0": lambda one: msgspec.structs.replace(one, signature=b"\1" + bytes(63)),
    "no point": lambda one: msgspec.structs.replace(one, signature=b"\2" + bytes(31) + one.signature[32:]),
    "y of p + 1": lambda one: msgspec.structs.replace(
        one, signature=(2**255 - 18).to_bytes(32, "little") + one.signature[32:]
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_forgeries(name: str) -> None:
    good = [sealed(number) for number in range(5)]
    forged = FORGERIES[name](good[0])
    assert not verify(forged.author, signing_bytes(forged), forged.signature)
    assert not batch([*good[1:], forged]).holds()


@given(st.integers(0, 4), st.integers(0, 511))
@settings(deadline=None, max_examples=60)
def test_a_changed_bit_of_a_signature(number: int, bit: int) -> None:
    good = [sealed(each) for each in range(5)]
    changed = bytearray(good[number].signature)
    changed[bit // 8] ^= 1 << bit % 8
    good[number] = msgspec.structs.replace(good[number], signature=bytes(changed))
    assert not batch(good).holds()


def test_errors_of_two_do_not_cancel_out() -> None:
    """s + 1 and s − 1: only numbers drawn at random tell them from none."""
    one, other = sealed(1), sealed(6)
    moved = []
    for envelope, by in ((one, 1), (other, -1)):
        s = (int.from_bytes(envelope.signature[32:], "little") + by) % ORDER
        moved.append(msgspec.structs.replace(envelope, signature=envelope.signature[:32] + s.to_bytes(32, "little")))
    assert not batch(moved).holds()


def test_context_and_names_are_checked_at_once() -> None:
    with pytest.raises(WrongContext):
        batch([msgspec.structs.replace(sealed(1), domain="seal")])
    with pytest.raises(BadSignature):
        batch([msgspec.structs.replace(sealed(1), author="12D3Koo" + "W" * 45)])


# ------------------------------------------------------------------------------------------ the curve

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P


def add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    (x1, y1), (x2, y2) = one, other
    both = D * x1 * x2 * y1 * y2 % P
    x = (x1 * y2 + x2 * y1) * pow(1 + both, -1, P) % P
    return x, (y1 * y2 + x1 * x2) * pow(1 - both, -1, P) % P


def times(scalar: int, point: tuple[int, int]) -> tuple[int, int]:
    found = (0, 1)
    while scalar:
        found = add(found, point) if scalar & 1 else found
        point, scalar = add(point, point), scalar >> 1
    return found


def encoded(point: tuple[int, int]) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def decoded(y: int) -> tuple[int, int] | None:
    """The point of that y with an even x."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    if (x * x - square) % P:
        return None
    return (P - x if x & 1 else x), y


B = decoded(4 * pow(5, -1, P) % P)
assert B is not None
TORSION = [decoded(0), decoded(P - 1), decoded(1)]
"""Of order 4, of order 2, and the identity."""


def scalar(value: int) -> bytes:
    return value.to_bytes(32, "little")


@given(st.lists(st.tuples(st.integers(0, ORDER - 1), st.integers(0, 2**256 - 1)), max_size=6))
@settings(deadline=None, max_examples=25)
def test_sums_are_those_of_big_integers(terms: list[tuple[int, int]]) -> None:
    """Multiples of B, and what they lack to nothing."""
    points = b"".join(encoded(times(point, B)) for point, _ in terms)
    total = sum(point * factor for point, factor in terms)
    scalars = b"".join(scalar(factor) for _, factor in terms)
    assert signatures.vanishes(points + encoded(B), scalars + scalar(-total % ORDER))
    assert not signatures.vanishes(points + encoded(B), scalars + scalar((1 - total) % ORDER))


def test_points_of_small_order_vanish() -> None:
    for point in TORSION:
        assert point is not None
        assert signatures.vanishes(encoded(point), scalar(1))
        assert not signatures.vanishes(encoded(add(point, B)), scalar(1))
        assert signatures.vanishes(encoded(add(point, B)) + encoded(B), scalar(1) + scalar(ORDER - 1))


@given(st.integers(0, P - 1))
@settings(deadline=None, max_examples=60)
def test_what_is_a_point_and_what_is_none(y: int) -> None:
    point = decoded(y)
    found = signatures.vanishes(scalar(y), scalar(0))
    assert found == (point is not None)
    if point is not None and point[0]:
        minus = (P - point[0], point[1])
        assert signatures.vanishes(encoded(point) + encoded(minus), scalar(7) + scalar(7))


@pytest.mark.parametrize("bad", [P, P + 1, 2**255 - 1, 1 | 1 << 255, (P - 1) | 1 << 255])
def test_a_point_has_one_encoding(bad: int) -> None:
    assert not signatures.vanishes(scalar(bad), scalar(0))


def test_sizes() -> None:
    assert signatures.vanishes(b"", b"")
    for points, scalars in ((b"1", b"1"), (bytes(32), b""), (b"", bytes(32))):
        with pytest.raises(ValueError, match="32 bytes"):
            signatures.vanishes(points, scalars)

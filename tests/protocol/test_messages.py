"""Decoding of untrusted bytes: a valid message, or ``MalformedMessage`` and nothing else."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche.protocol import audit_messages as verdicts
from psyche.protocol import messages
from psyche.protocol.audit_messages import EMPTY, DeclinedAudit, Finding, SealedVerdict, Verdict
from psyche.protocol.messages import (
    Accepted,
    Attestation,
    Certificate,
    Commitment,
    Excluded,
    ExclusionReason,
    Have,
    Heartbeat,
    Hello,
    Leave,
    Member,
    Metrics,
    Plan,
    Promise,
    Proposal,
    Reconfiguration,
    Record,
    ReductionReport,
    ReductionStatus,
    Result,
    RunStatus,
    Seal,
    SigningRefused,
    Standing,
    Vote,
)
from psyche.protocol.wire import (
    MAX_ENVELOPE,
    Body,
    Envelope,
    MalformedMessage,
    decode,
    decode_envelope,
    encode_envelope,
    signing_bytes,
)
from tests.protocol.one_leader import contribution, nodes

A, B, C = nodes(3)
PLAN = Plan(3, 7, b"p" * 32, b"b" * 32, b"s" * 32, 12345, "gather", 0, tuple(Member(node, 5, 1) for node in (A, B, C)))
RECORD = Record(
    plan=PLAN,
    accepted=(Accepted(A, contribution(A, PLAN)), Accepted(C, contribution(C, PLAN))),
    excluded=(Excluded(B, ExclusionReason.NO_COMMITMENT),),
    reconfiguration=0,
    electorate=(A, B, C),
    voting_weights=(3, 1, 2),
    standing=(Standing(A, 3, 3, 2, 0, 40, 7), Standing(B, 1, 2, 0, 0, 20, 0)),
    audit_state=EMPTY,
    commitments=(),
    reducer_order=(),
    results=(),
    dissenters=(),
)
CERTIFICATE = Certificate(b"proposal", (b"vote", b"other vote"), (b"seal",))
EXAMPLES: list[Body] = [
    contribution(A, PLAN),
    RECORD,
    CERTIFICATE,
    Hello(3, b"h" * 32, b"s" * 32, "CPU, 1 threads", b"claim", CERTIFICATE),
    Hello(0, b"h" * 32, b"s" * 32, "", None, None),
    Commitment(b"c" * 32, 3),
    Have((A, B)),
    ReductionReport(4, (Result(1, b"r" * 32),)),
    Vote(9, b"r" * 32),
    Attestation(b"s" * 32, (A,)),
    SealedVerdict(A, 3, b"v" * 32),
    DeclinedAudit(A, 3),
    Verdict(A, 3, Finding("unserved", 0, 0, 0), b"n" * 32),
    Verdict(A, 3, Finding("measured", 4000, 1, -250, 900, (-(10**9), 0, 7)), b"n" * 32),
    Leave("it was stopped"),
    Metrics({"train_loss": 1.5, "tokens": 1000, "momentum_norm": math.inf}),
    Proposal(8, RECORD, (b"r",)),
    Reconfiguration(b"p" * 32, 2, (A, C)),
    Seal(b"p" * 32, 2, b"r" * 32),
    Heartbeat(0, 7),
    Heartbeat(7, 7, True),
    SigningRefused("a record was sealed", 0, b"r" * 32),
    Promise(8, 2, b"proposal", PLAN, (b"c",), (b"d",)),
    Promise(8, 2, None, None, (), ()),
    RunStatus(
        4,
        7,
        b"claim",
        "training",
        2,
        b"s" * 32,
        PLAN,
        30.5,
        True,
        (b"c",),
        (b"d",),
        ReductionStatus(3, (A, B), (C,), (1,), (A,)),
        b"p",
        CERTIFICATE,
        (b"attestation",),
        "waiting",
    ),
    RunStatus(0, 1, b"claim", "waiting", 0, b"s" * 32, None, 0.0, False, (), (), None, None, None, (), ""),
]
ENVELOPE = Envelope("vote", b"r" * 32, 3, A, b"body", b"s" * 64)
KINDS = sorted({type(example) for example in EXAMPLES}, key=lambda kind: kind.__name__)
LIMITS = settings(max_examples=80, deadline=None)
MUTATIONS = settings(max_examples=40, deadline=None)
ids = [type(example).__name__ for example in EXAMPLES]


def test_every_message_has_an_example_and_a_domain_of_its_own() -> None:
    def below(kind: type[Body]) -> list[type[Body]]:
        return [one for child in kind.__subclasses__() for one in [child, *below(child)]]

    modules = {messages.__name__, verdicts.__name__}
    bodies = [kind for kind in below(Body) if kind.__module__ in modules]
    assert set(bodies) == set(KINDS)
    assert len({kind.DOMAIN for kind in bodies}) == len(bodies)


@pytest.mark.parametrize("example", EXAMPLES, ids=ids)
def test_every_message_round_trips_through_its_encoding(example: Body) -> None:
    data = example.encode()
    assert decode(type(example), data) == example
    assert decode(type(example), data).encode() == data


@pytest.mark.parametrize("sketch", [(0,) * 65, (10**9 + 1,)], ids=["too long", "too large"])
def test_a_sketch_is_bounded(sketch: tuple[int, ...]) -> None:
    with pytest.raises(MalformedMessage):
        decode(Verdict, Verdict(A, 3, Finding("measured", 0, 0, 0, 0, sketch), b"n" * 32).encode())


@pytest.mark.parametrize("example", EXAMPLES, ids=ids)
def test_truncated_or_extended_messages_are_rejected(example: Body) -> None:
    data = example.encode()
    for length in {*range(min(len(data), 40)), *range(max(0, len(data) - 40), len(data)), len(data) // 2}:
        with pytest.raises(MalformedMessage):
            decode(type(example), data[:length])
    for more in (b"\x00", b"\xc0", data):
        with pytest.raises(MalformedMessage):
            decode(type(example), data + more)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@LIMITS
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_rejected_or_canonical(kind: type[Body], data: bytes) -> None:
    try:
        body = decode(kind, data)
    except MalformedMessage as error:
        reason = str(error)
    else:
        reason = ""
        assert body.encode() == data
    assert not reason or (kind.DOMAIN in reason and len(reason) < 400)


@pytest.mark.parametrize("example", EXAMPLES, ids=ids)
@MUTATIONS
@given(data=st.data())
def test_mutated_messages_are_rejected_or_canonical(example: Body, data: st.DataObject) -> None:
    """No two byte strings decode to the same message."""
    changed = bytearray(example.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(changed) - 1))
        match data.draw(st.sampled_from(("set", "delete", "insert"))):
            case "set":
                changed[at] = data.draw(st.integers(0, 255))
            case "delete":
                del changed[at]
            case _:
                changed.insert(at, data.draw(st.integers(0, 255)))
        if not changed:
            break
    try:
        body = decode(type(example), bytes(changed))
    except MalformedMessage:
        return
    assert body.encode() == bytes(changed)


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.binary(max_size=40) | st.text(),
    lambda inner: st.lists(inner, max_size=14) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=25,
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@MUTATIONS
@given(tree=st.lists(NESTED, max_size=14))
def test_well_formed_msgpack_of_another_structure_is_rejected(kind: type[Body], tree: list[object]) -> None:
    data = msgspec.msgpack.encode(tree)
    try:
        body = decode(kind, data)
    except MalformedMessage:
        return
    assert body.encode() == data


@pytest.mark.parametrize("kind", [*KINDS, Envelope], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "data",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of claimed 4 billion elements
        b"\xdf\xff\xff\xff\xff",  # a map of claimed 4 billion entries
        b"\xc6\xff\xff\xff\xff",  # 4 GiB of bytes
        b"\xdb\xff\xff\xff\xff",  # 4 GiB of text
        b"\xc9\xff\xff\xff\xff\x01",  # an extension of 4 GiB
        b"\x91" * 100_000,  # arrays in arrays
        b"\x81\xa1a" * 100_000,
        b"\x92\xdd\xff\xff\xff\xff",
        b"\x92\xc4\x01p\xdd\xff\xff\xff\xff",  # a certificate of 4 billion votes
        b"\x91\xdd\xff\xff\xff\xff",  # a holding of 4 billion nodes
        b"\x95\xdd\xff\xff\xff\xff",
    ],
)
def test_huge_claimed_lengths_are_rejected(kind: type, data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_envelope(data) if kind is Envelope else decode(kind, data)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (Commitment, [b"c" * 31, 1]),
        (Commitment, [b"c" * 33, 1]),
        (Commitment, ["c" * 32, 1]),
        (Commitment, [b"c" * 32]),
        (Commitment, [b"c" * 32, 0]),
        (Commitment, [b"c" * 32, 1, 1]),
        (Vote, [0, b"r" * 32]),
        (Vote, [-1, b"r" * 32]),
        (Vote, [2**62 + 1, b"r" * 32]),
        (Vote, [1.0, b"r" * 32]),
        (Vote, [True, b"r" * 32]),
        (Leave, ["x" * 201]),
        (Leave, [b"bytes"]),
        (Have, [["12D3Koo"]]),
        (Have, [[A + "\n"]]),
        (Have, [[A[:-1] + "0"]]),
        (Have, [["\u202e" + A[1:]]]),
        (Have, [[A] * 4097]),
        (Certificate, [b"p", [b""] * 4097]),
        (Certificate, [b"p" * (2**20 + 1), []]),
        (Hello, [0, b"h" * 32, b"s" * 32, "d" * 65, None]),
        (Record, [msgspec.to_builtins(PLAN), [], [], [], False]),
    ],
)
def test_bounds_are_part_of_the_format(kind: type[Body], fields: list[object]) -> None:
    with pytest.raises(MalformedMessage):
        decode(kind, msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        (Vote, b"\xdc\x00\x02" + Vote(9, b"r" * 32).encode()[1:]),  # a longer array header
        (Vote, b"\x92\xcc\x09" + Vote(9, b"r" * 32).encode()[2:]),  # a longer integer
        (Commitment, b"\x92\xc5\x00\x20" + b"c" * 32 + b"\x03"),  # a longer byte-string header
        (Leave, b"\x91\xd9\x02hi"),
    ],
)
def test_non_canonical_encodings_are_rejected(kind: type[Body], data: bytes) -> None:
    with pytest.raises(MalformedMessage, match="canonical"):
        decode(kind, data)


def test_commitments_bind_node_run_round_and_every_field() -> None:
    base = contribution(A, PLAN)
    seen = {base.commitment(A, b"r" * 32, 3)}
    seen |= {base.commitment(B, b"r" * 32, 3), base.commitment(A, b"q" * 32, 3), base.commitment(A, b"r" * 32, 4)}
    changes: dict[str, object] = dict.fromkeys(
        (
            name
            for name in base.__struct_fields__
            if name.endswith(("_root", "_digest", "_proof", "_in", "_out", "salt"))
        ),
        b"x" * 32,
    )
    changes |= {
        "payload_bytes": 1,
        "inner_steps": 4,
        "overlap_steps": 1,
        "tokens": 1,
        "private": True,
        "payout": b"p" * 20,
    }
    assert set(changes) == set(base.__struct_fields__)
    for name, value in changes.items():
        seen.add(contribution(A, PLAN, **{name: value}).commitment(A, b"r" * 32, 3))
    assert len(seen) == 4 + len(changes)


# ----------------------------------------------------------------------------------------- envelopes


def test_an_envelope_round_trips_through_its_encoding() -> None:
    data = encode_envelope(ENVELOPE)
    assert decode_envelope(data) == ENVELOPE


def test_oversize_envelopes_are_rejected_before_decoding() -> None:
    data = encode_envelope(msgspec.structs.replace(ENVELOPE, body=bytes(1000)))
    assert decode_envelope(data, len(data)).body == bytes(1000)
    with pytest.raises(MalformedMessage, match="over the limit"):
        decode_envelope(data, len(data) - 1)
    with pytest.raises(MalformedMessage, match="over the limit"):
        decode_envelope(bytes(MAX_ENVELOPE + 1))


@LIMITS
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_are_not_an_envelope(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode_envelope(data)


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(encode_envelope(ENVELOPE)) - 1), value=st.integers(0, 255))
def test_a_mutated_envelope_is_rejected_or_decodes_differently(at: int, value: int) -> None:
    data = bytearray(encode_envelope(ENVELOPE))
    data[at] = value
    try:
        found = decode_envelope(bytes(data))
    except MalformedMessage:
        return
    assert encode_envelope(found) == bytes(data)
    same = bytes(data) == encode_envelope(ENVELOPE)
    assert (found == ENVELOPE) is same


def test_the_signature_covers_everything_else() -> None:
    changes: dict[str, object] = {
        "domain": "votes",
        "run_id": b"q" * 32,
        "round": 4,
        "author": B,
        "body": b"bodi",
        "signature": b"t" * 64,
    }
    assert set(changes) == set(ENVELOPE.__struct_fields__)
    signed = {
        name: signing_bytes(msgspec.structs.replace(ENVELOPE, **{name: value})) for name, value in changes.items()
    }
    base = signing_bytes(ENVELOPE)
    assert signed.pop("signature") == base
    assert base not in signed.values()
    assert len(set(signed.values())) == len(signed)

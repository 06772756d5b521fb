"""What a payload is worth: bounds, symmetry, error feedback, and that nothing malformed is ever decoded."""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from psyche.numerics.codecs.base import HEADER_BYTES, Codec, MalformedPayload, NonFinite
from psyche.numerics.codecs.int4 import Int4
from psyche.numerics.codecs.registry import CODECS, codec
from tests.numerics.samples import BLOCK, CHUNK, LARGEST, TINIEST, bits, ranges

LIMITS = settings(max_examples=25, deadline=None)
BETAS = st.sampled_from((0.0, 0.5, 0.9, 1.0))
every_codec = pytest.mark.parametrize("name", CODECS)


def encoded(used: Codec, values: Tensor) -> bytes:
    return used.encode(values, torch.zeros_like(values), None, 1.0)


def decoded(used: Codec, payload: bytes, count: int) -> Tensor:
    out = torch.zeros(count)
    used.decode_add(payload, 1.0, out)
    return out


def parts(payload: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales of an int8 payload, read from the format's description alone."""
    body = payload[HEADER_BYTES:]
    return np.frombuffer(body, np.int8, count).reshape(-1, BLOCK), np.frombuffer(body, "<f4", offset=count)


def with_scale(payload: bytes, count: int, scale: float) -> bytes:
    return payload[: HEADER_BYTES + count] + struct.pack("<f", scale) + payload[HEADER_BYTES + count + 4 :]


# -------------------------------------------------------------------------------- encode and decode


@LIMITS
@given(values=ranges())
def test_fp32_loses_nothing(values: Tensor) -> None:
    used = codec("fp32")
    out = decoded(used, encoded(used, values), len(values))
    assert (bits(out) == bits(values + 0.0)).all()  # 0 + −0 is 0


@LIMITS
@given(values=ranges())
@example(values=torch.full((CHUNK,), LARGEST))
@example(values=torch.linspace(-LARGEST / 2, LARGEST / 2, CHUNK) * 2)
@example(values=torch.full((CHUNK,), TINIEST))
@example(values=torch.arange(CHUNK) * TINIEST)
@example(values=torch.zeros(CHUNK))
def test_int8_error_is_at_most_half_a_step(values: Tensor) -> None:
    used = codec("int8")
    payload = encoded(used, values)
    out = decoded(used, payload, len(values))
    assert torch.isfinite(out).all()
    codes, scales = parts(payload, len(values))
    blocks = values.numpy().astype(np.float64).reshape(-1, BLOCK)
    largest = np.abs(blocks).max(axis=1)
    # Ordinary blocks: half a step, and the roundings of scale, quotient and product. Where the step itself is
    # subnormal it is a whole number of the tiniest values, and up to half of one is lost for each of 127 levels.
    step = scales.astype(np.float64)
    bound = step * 0.5 + largest * 2.0**-22 + np.where(step < 2.0**-126, 64 * TINIEST, 0.0)
    error = np.abs(out.numpy().astype(np.float64).reshape(-1, BLOCK) - blocks).max(axis=1)
    assert (error <= bound).all()
    assert (np.abs(codes.astype(int)) <= 127).all()
    assert (step >= 0).all()


@LIMITS
@given(values=ranges())
def test_int8_scale_is_the_largest_magnitude_over_127(values: Tensor) -> None:
    _, scales = parts(encoded(codec("int8"), values), len(values))
    expected = np.abs(values.numpy()).reshape(-1, BLOCK).max(axis=1) / np.float32(127)
    assert (scales == expected).all()


@every_codec
@LIMITS
@given(values=ranges())
def test_odd(name: str, values: Tensor) -> None:
    used = codec(name)
    if isinstance(used, Int4):  # where +peak and −peak tie, the positive one takes the code −8, mirrored or not
        blocks = values.view(-1, used.block)
        blocks[blocks.amax(dim=1) == -blocks.amin(dim=1)] = 0
    ours, mirrored = (decoded(used, encoded(used, v), len(values)) for v in (values, -values))
    assert torch.equal(ours, -mirrored)


@every_codec
@LIMITS
@given(values=ranges())
def test_zeros_stay_zeros(name: str, values: Tensor) -> None:
    """Padding between tensors, and rows of an embedding that saw no token, must not begin to move."""
    used = codec(name)
    assert not decoded(used, encoded(used, values), len(values))[values == 0].any()


@every_codec
def test_a_wave_survives_encoding_again(name: str) -> None:
    """D∘Q is idempotent on what it produced itself, or contributions would decay on every hop."""
    used = codec(name)
    values = torch.sin(torch.arange(CHUNK, dtype=torch.float32))
    once = decoded(used, encoded(used, values), CHUNK)
    assert torch.equal(decoded(used, encoded(used, once), CHUNK), once)


@every_codec
@LIMITS
@given(local=ranges(exponents=(-149, 100)), beta=BETAS, seed=st.integers(0, 2**31))
def test_error_feedback_identity(name: str, local: Tensor, beta: float, seed: int) -> None:
    used = codec(name)
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(len(local), generator=generator)
    residual = torch.randn(len(local), generator=generator) * 1e-3
    b, w, e = base.numpy().copy(), local.numpy().copy(), residual.numpy().copy()
    payload = used.encode(base, local, residual, beta)
    wanted = e * np.float32(beta) + (b - w)
    kept = wanted - decoded(used, payload, len(local)).numpy()
    assert (bits(residual) == kept.view(np.uint32)).all()
    assert (base.numpy() == b).all()
    assert (local.numpy() == w).all()


@LIMITS
@given(values=ranges(exponents=(-149, 120)))
def test_error_feedback_of_one_range_is_bounded_by_what_was_lost(values: Tensor) -> None:
    """The residual stays within a step of the codec, however often the same Δ is sent."""
    used = codec("int8")
    residual, nothing = torch.zeros_like(values), torch.zeros_like(values)
    largest = values.abs().view(-1, BLOCK).amax(dim=1)
    for _ in range(4):
        used.encode(values, nothing, residual, 1.0)
        assert (residual.abs().view(-1, BLOCK).amax(dim=1) <= largest / 100 + 64 * TINIEST).all()


def test_without_a_residual_the_codec_remembers_nothing() -> None:
    used, values = codec("int8"), torch.linspace(-1, 1, CHUNK)
    assert encoded(used, values) == encoded(used, values)


@every_codec
@LIMITS
@given(values=ranges(exponents=(-149, 120)), seed=st.integers(0, 2**31), weight=st.floats(0, 1, width=32))
def test_decode_add_rounds_product_and_sum_once_each(name: str, values: Tensor, seed: int, weight: float) -> None:
    used = codec(name)
    payload = encoded(used, values)
    out = torch.randn(len(values), generator=torch.Generator().manual_seed(seed))
    d = decoded(used, payload, len(values)).numpy()
    # fp64 holds the product of two fp32 exactly, and no fp64 sum is made: two roundings to fp32, as defined.
    with np.errstate(under="ignore"):
        product = (d.astype(np.float64) * np.float64(weight)).astype(np.float32)
    expected = (out.numpy() + product).astype(np.float32)
    used.decode_add(payload, weight, out)
    assert (out.numpy() == expected).all()


def test_decode_add_is_not_a_fused_multiply_add() -> None:
    used = codec("fp32")
    d, weight = np.float32(1 + 2**-12), np.float32(1 + 2**-12)
    start = np.float32(-(1 + 2**-11))
    fused = np.float32(float(d) * float(weight) + float(start))  # exact in fp64: 2^-24
    separate = np.float32(np.float32(d * weight) + start)
    assert fused != separate
    out = torch.full((CHUNK,), float(start))
    used.decode_add(encoded(used, torch.full((CHUNK,), float(d))), float(weight), out)
    assert (out.numpy() == separate).all()


# ---------------------------------------------------------------------------------- sizes and bytes


@pytest.mark.parametrize("chunks", [0, 1, 3, 64])
def test_payload_sizes(chunks: int) -> None:
    count = chunks * CHUNK
    assert codec("fp32").payload_bytes(count) == HEADER_BYTES + count * 4
    assert codec("int8").payload_bytes(count) * 8 == HEADER_BYTES * 8 + count * 8.125
    assert codec("int4").payload_bytes(count) * 8 == HEADER_BYTES * 8 + count * 4.125
    assert codec("int4-32").payload_bytes(count) * 8 == HEADER_BYTES * 8 + count * 4.5
    assert codec("int2").payload_bytes(count) * 8 == HEADER_BYTES * 8 + count * 2.125
    assert codec("topk2").payload_bytes(count) == HEADER_BYTES + 84 * chunks
    for name in CODECS:
        size = len(encoded(codec(name), torch.ones(count)))
        most = codec(name).payload_bytes(count)
        assert size <= most if name.startswith("topk2e") else size == most


@pytest.mark.parametrize(("name", "most"), [("topk2", 0.22), ("topk2e", 0.16)])
def test_bits_a_parameter_at_64_of_4096(name: str, most: float) -> None:
    values = torch.randn(64 * CHUNK, generator=torch.Generator().manual_seed(0))
    bits_per_parameter = 8 * len(encoded(codec(name), values)) / len(values)
    assert bits_per_parameter <= most
    assert bits_per_parameter == pytest.approx(8 * codec(name).expected_bytes(len(values)) / len(values), rel=0.02)


def test_golden_bytes() -> None:
    """The format of every codec, fixed. A change here is a change of the wire format: it needs another name."""
    values = torch.arange(2 * CHUNK, dtype=torch.float32).sub_(4000).mul_(2.0**-11)
    values[100:400] = 0.0
    values[512] = 2.0**-140
    values[5000] = 1e30
    found = {name: blake3(encoded(codec(name), values)).hexdigest()[:32] for name in CODECS}
    assert found == {
        "fp32": "7cb7d976a1416a18b80849924be678d8",
        "int8": "9fe0e466aff67dde27377b73ae82f6ff",
        "int4": "5f362d8643f3dc667e3f2fd2125cd3f2",
        "int4-32": "d71ee97d095d1a19e1634de9a322cf7c",
        "int2": "2b46d0a72d16ca71c2648123d95875dc",
        "topk2": "20b0d2fb89c13cfec840974b7ba9849f",
        "topk2-256": "333961efa7b9fa717524e246bfcfad94",
        "topk2-512": "ec101f77934c31eb024fd8f1aa9e9677",
        "topk2e": "d9f0a583750ab9794c580f10f3eaa507",
        "topk2e-256": "ecdde4c514a4436e33333c590faf1156",
        "topk2e-512": "e190058648adcb8e837c203a4e10d6ea",
    }


# ------------------------------------------------------------------------------ what must be refused


def refused(used: Codec, payload: bytes, count: int) -> None:
    """Refused by all that read a payload, before anything is written."""
    out = torch.full((count,), 3.5)
    for read in (
        lambda: used.decode_add(payload, 0.5, out),
        lambda: used.check(payload, count),
        lambda: used.squared_norm(payload, count),
    ):
        with pytest.raises(MalformedPayload, match=r"\w"):
            read()
    assert (out == 3.5).all()


@every_codec
def test_every_truncation_and_extension_is_refused(name: str) -> None:
    used = codec(name)
    payload = encoded(used, torch.linspace(-1, 1, CHUNK))
    lengths = {*range(64), *range(len(payload) - 64, len(payload)), *range(0, len(payload), 397)}
    for length in sorted(length for length in lengths if length < len(payload)):
        refused(used, payload[:length], CHUNK)
    for more in (1, 3, 4, 256, len(payload)):
        refused(used, payload + bytes(more), CHUNK)


@every_codec
def test_every_bit_flip_in_the_header_is_refused(name: str) -> None:
    used = codec(name)
    payload = encoded(used, torch.linspace(-1, 1, CHUNK))
    for bit in range(HEADER_BYTES * 8):
        changed = bytearray(payload)
        changed[bit // 8] ^= 1 << bit % 8
        refused(used, bytes(changed), CHUNK)


def test_the_header_of_another_codec_or_count_is_refused() -> None:
    fp32, int8 = codec("fp32"), codec("int8")
    values = torch.linspace(-1, 1, CHUNK)
    of_fp32, of_int8 = encoded(fp32, values), encoded(int8, values)
    refused(int8, of_fp32, CHUNK)
    refused(fp32, of_int8, CHUNK)
    refused(int8, of_fp32[:HEADER_BYTES] + of_int8[HEADER_BYTES:], CHUNK)
    refused(fp32, of_int8[:HEADER_BYTES] + of_fp32[HEADER_BYTES:], CHUNK)
    for used, payload in ((fp32, of_fp32), (int8, of_int8)):
        refused(used, payload, 2 * CHUNK)
        twice = encoded(used, torch.cat([values, values]))
        refused(used, twice[:HEADER_BYTES] + payload[HEADER_BYTES:], CHUNK)


OVERFLOWING = float(np.nextafter(np.float32(LARGEST / 127), np.float32(np.inf)) * np.float32(1.001))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), -1.0, -TINIEST, LARGEST, OVERFLOWING])
def test_int8_scales_that_are_refused(scale: float) -> None:
    used = codec("int8")
    refused(used, with_scale(encoded(used, torch.linspace(-1, 1, CHUNK)), CHUNK, scale), CHUNK)


@pytest.mark.parametrize("position", [0, 255, 256, CHUNK - 1])
def test_int8_code_minus_128_is_refused(position: int) -> None:
    used = codec("int8")
    payload = bytearray(encoded(used, torch.linspace(-1, 1, CHUNK)))
    payload[HEADER_BYTES + position] = 0x80
    refused(used, bytes(payload), CHUNK)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 17, CHUNK - 1])
def test_fp32_values_that_are_refused(value: float, position: int) -> None:
    used = codec("fp32")
    payload = bytearray(encoded(used, torch.linspace(-1, 1, CHUNK)))
    struct.pack_into("<f", payload, HEADER_BYTES + 4 * position, value)
    refused(used, bytes(payload), CHUNK)


@every_codec
@LIMITS
@given(data=st.data())
def test_whatever_is_accepted_decodes_to_finite_values(name: str, data: st.DataObject) -> None:
    used = codec(name)
    payload = bytearray(encoded(used, torch.linspace(-1, 1, CHUNK)))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    out = torch.zeros(CHUNK)
    try:
        used.decode_add(bytes(payload), 1.0, out)
    except MalformedPayload:
        assert not out.any()
    else:
        assert torch.isfinite(out).all()
        assert np.isfinite(used.squared_norm(bytes(payload), CHUNK))


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [[0], [4095], [4096], [300, 8000], [8191]])
@pytest.mark.parametrize("place", ["base", "local"])
def test_non_finite_input_names_its_first_position(name: str, bad: float, where: list[int], place: str) -> None:
    used = codec(name)
    tensors = {"base": torch.ones(2 * CHUNK), "local": torch.zeros(2 * CHUNK)}
    tensors[place][where] = bad
    residual = torch.linspace(-1, 1, 2 * CHUNK) if used.error_feedback else None
    with pytest.raises(NonFinite) as error:
        used.encode(tensors["base"], tensors["local"], residual, 1.0)
    assert error.value.position == where[0]
    assert str(where[0]) in str(error.value)


@every_codec
def test_a_difference_that_overflows_is_non_finite(name: str) -> None:
    base, local = torch.zeros(CHUNK), torch.zeros(CHUNK)
    base[77], local[77] = LARGEST, -LARGEST
    with pytest.raises(NonFinite) as error:
        codec(name).encode(base, local, None, 1.0)
    assert error.value.position == 77


# --------------------------------------------------------------------------------------------- norms


NORM_BLOCK = {"int4": 128, "int4-32": 32, "int2": 256}
"""Values whose squares are summed exactly before fp64 rounds; a chunk, for the sparse codecs."""


@every_codec
@settings(max_examples=15, deadline=None)
@given(values=ranges(exponents=(-60, 60), max_chunks=1))
def test_squared_norm_is_exact_to_fp64_rounding(name: str, values: Tensor) -> None:
    used = codec(name)
    payload = encoded(used, values)
    if name == "int8":
        codes, scales = parts(payload, len(values))
        terms = [
            sum(int(c) ** 2 for c in block) * Fraction(float(s)) ** 2 for block, s in zip(codes, scales, strict=True)
        ]
    elif name == "fp32":
        terms = [Fraction(float(v)) ** 2 for v in values.numpy()]
    else:
        blocks = decoded(used, payload, len(values)).view(-1, NORM_BLOCK.get(name, CHUNK))
        terms = [sum(Fraction(float(v)) ** 2 for v in block) for block in blocks]
    exact = sum(terms)
    found = used.squared_norm(payload, len(values))
    assert abs(Fraction(found) - exact) <= exact * Fraction(len(terms) + 2, 2**53)
    # Sequential in block order, each term and each sum rounded once to fp64: the same number on every machine.
    total = 0.0
    for term in terms:
        total += float(term)
    assert found == total


def test_squared_norm_adds_in_block_order() -> None:
    """Terms whose sum depends on the order: pairwise or reversed addition gives another value."""
    used = codec("fp32")
    values = torch.full((CHUNK,), 2.0**-27)  # its square is half an ulp of 1: lost behind 1, not before it
    values[0] = 1.0
    assert used.squared_norm(encoded(used, values), CHUNK) == 1.0
    assert used.squared_norm(encoded(used, values.flip(0)), CHUNK) == 1.0 + (CHUNK - 1) * 2.0**-54 + 2.0**-54


@every_codec
def test_squared_norm_of_the_largest_values_is_finite(name: str) -> None:
    used = codec(name)
    payload = encoded(used, torch.full((CHUNK,), LARGEST))
    sent = torch.count_nonzero(decoded(used, payload, CHUNK)).item()
    assert used.squared_norm(payload, CHUNK) == pytest.approx(sent * LARGEST**2, rel=0.02)
    assert used.squared_norm(encoded(used, torch.zeros(CHUNK)), CHUNK) == 0.0

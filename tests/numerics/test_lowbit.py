"""The low-bit codecs by their own rules: which values are kept, which levels they get, what no encoder writes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psyche.numerics.codecs import bf16
from psyche.numerics.codecs.base import HEADER_BYTES, MalformedPayload
from psyche.numerics.codecs.rangecoder import BitModel, CorruptStream, RangeDecoder, RangeEncoder
from psyche.numerics.codecs.registry import codec
from psyche.numerics.codecs.topk2 import SparseChunks, TopK2, largest
from psyche.numerics.codecs.topk2e import CODED, TopK2e
from psyche.numerics.codecs.two_levels import two_levels
from tests.numerics.samples import CHUNK, LARGEST, TINIEST, ranges

LIMITS = settings(max_examples=25, deadline=None)
KEPT = (64, 256, 512)
KEPTS = st.sampled_from(KEPT)


def relative_error(name: str, values: Tensor) -> float:
    used, residual = codec(name), torch.zeros_like(values)
    used.encode(values, torch.zeros_like(values), residual, 1.0)
    return float(residual.norm() / values.norm())


# --------------------------------------------------------------------------------------------- bf16


@LIMITS
@given(values=ranges(max_chunks=1))
def test_bf16_is_pytorchs_own_rounding_but_for_infinities_and_the_sign_of_zero(values: Tensor) -> None:
    found = bf16.rounded(values)
    expected = values.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    expected = torch.where((expected & 0x7FFF) >= bf16.INFINITE, bf16.LARGEST | expected & bf16.SIGN, expected)
    assert torch.equal(found, torch.where(expected == bf16.SIGN, 0, expected))
    assert torch.equal(bf16.rounded(bf16.widened(found)), found)


# --------------------------------------------------------------------------------------------- int4


def test_int4_golden() -> None:
    """One block by hand: the peak is −8, so the scale is bf16(−8/−8) = 1."""
    values = torch.zeros(CHUNK)
    values[:8] = torch.tensor([-8.0, 7.4, 7.6, -0.5, 0.5, 1.5, -1.5, 3.0])
    payload = codec("int4").encode(values, torch.zeros(CHUNK), None, 1.0)
    codes = [-8, 7, 7, 0, 0, 2, -2, 3]  # halves go to even; 7.6 has no code of its own
    expected = bytes((low & 15) | (high & 15) << 4 for low, high in zip(codes[::2], codes[1::2], strict=True))
    assert payload[HEADER_BYTES : HEADER_BYTES + 4] == expected
    assert payload[HEADER_BYTES + CHUNK // 2 :][:4] == b"\x80\x3f\x00\x00"


@pytest.mark.parametrize("name", ["int4", "int4-32"])
@LIMITS
@given(values=ranges(exponents=(-100, 127)))
def test_int4_loses_at_most_half_a_step_or_what_is_beyond_the_last_code(name: str, values: Tensor) -> None:
    block = 128 if name == "int4" else 32
    residual = torch.zeros_like(values)
    codec(name).encode(values, torch.zeros_like(values), residual, 1.0)
    peaks = values.view(-1, block).abs().amax(dim=1, keepdim=True).double()
    # A step is an eighth of the peak; on the side opposite to it the last code is 7. bf16 rounds by 2^-8 at most.
    assert (residual.view(-1, block).abs().double() <= peaks * (1 / 8 + 2.0**-8) + 8 * TINIEST * 2.0**16).all()


def test_low_bit_codecs_lose_less_the_more_they_spend() -> None:
    values = torch.randn(16 * CHUNK, generator=torch.Generator().manual_seed(1))
    errors = [relative_error(name, values) for name in ("int8", "int4-32", "int4", "int2", "topk2-256", "topk2")]
    assert errors == sorted(errors)
    assert errors[1] < 0.09  # absmax over 7 at this block size: .097
    assert errors[2] < 0.105  # .117
    assert errors[3] < 0.345  # the best two levels of a Gaussian: .343


@pytest.mark.parametrize("bits", [0x8000, 0x7F80, 0x7FC0, 0xFF80, 0x7E00, 0xFE00])
def test_int4_scales_that_are_refused(bits: int) -> None:
    payload = bytearray(codec("int4").encode(torch.linspace(-1, 1, CHUNK), torch.zeros(CHUNK), None, 1.0))
    payload[-2:] = bits.to_bytes(2, "little")
    with pytest.raises(MalformedPayload, match="scale"):
        codec("int4").check(bytes(payload), CHUNK)


# ------------------------------------------------------------------------------------------- levels


@LIMITS
@given(values=ranges(exponents=(-100, 120), max_chunks=1), n=st.sampled_from((32, 64, 256, 512)))
def test_levels_lie_within_the_magnitudes_and_split_them(values: Tensor, n: int) -> None:
    rows = values.view(-1, n)
    levels, high = two_levels(rows)
    level = bf16.widened(levels)
    magnitudes = rows.abs()
    assert (level[:, 0] <= level[:, 1]).all()
    assert (level[:, 1] <= magnitudes.amax(dim=1) * (1 + 2.0**-8)).all()
    lowest_above = torch.where(high, magnitudes, torch.inf).amin(dim=1)
    highest_below = torch.where(high, 0.0, magnitudes).amax(dim=1)
    assert (highest_below <= lowest_above).all()
    has_zero = (rows == 0).any(dim=1)
    assert not level[has_zero, 0].any()
    assert not high[rows == 0].any()


@pytest.mark.parametrize("n", [32, 64])
def test_levels_are_close_to_the_best_two(n: int) -> None:
    rows = torch.randn(256, n, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    levels, high = two_levels(rows)
    level = bf16.widened(levels).double()
    magnitudes = rows.abs().double()
    found = (magnitudes - torch.where(high, level[:, 1:], level[:, :1])).square().sum(dim=1)
    ordered = magnitudes.sort(dim=1).values
    splits = [
        sum((part - part.mean(dim=1, keepdim=True)).square().sum(dim=1) for part in (ordered[:, :at], ordered[:, at:]))
        for at in range(1, n)
    ]
    assert found.sum() <= 1.03 * torch.stack(splits).amin(dim=0).sum()  # a single row may end in a worse optimum


def test_levels_of_the_smallest_and_largest_values() -> None:
    for value in (TINIEST, 3 * TINIEST, 2.0**-126, 1.0, LARGEST):
        levels, high = two_levels(torch.full((1, 64), value))
        expected = min(int(bf16.rounded(torch.tensor([value]))[0]), bf16.LARGEST)
        assert levels.tolist() == [[expected, expected]]
        assert not high.any()


def test_an_empty_upper_group_does_not_divide_by_zero() -> None:
    levels, high = two_levels(torch.tensor([[0.0] * 63 + [1.0], [0.0] * 64]))
    assert levels.tolist() == [[0, 0x3F80], [0, 0]]
    assert high.sum().item() == 1


# -------------------------------------------------------------------------------------------- topk2


@LIMITS
@given(data=st.data(), kept=KEPTS)
def test_the_largest_are_kept_and_of_equal_ones_the_first(data: st.DataObject, kept: int) -> None:
    seed = data.draw(st.integers(0, 2**31))
    kinds = data.draw(st.integers(1, 60))  # few different magnitudes: ties everywhere
    generator = np.random.default_rng(seed)
    row = generator.integers(-kinds, kinds + 1, CHUNK).astype(np.float32)
    found = largest(torch.from_numpy(row).view(1, -1), kept)[0].tolist()
    assert found == sorted(sorted(range(CHUNK), key=lambda i: (-abs(row[i]), i))[:kept])


@LIMITS
@given(values=ranges(exponents=(-100, 120)), kept=KEPTS)
def test_what_is_not_kept_stays_in_the_residual_untouched(values: Tensor, kept: int) -> None:
    used, residual, out = TopK2(kept), torch.zeros_like(values), torch.zeros_like(values)
    payload = used.encode(values, torch.zeros_like(values), residual, 0.95)
    used.decode_add(payload, 1.0, out)
    positions = used.unpack(used.check(payload, len(values))).positions()
    assert len(positions) == kept * (len(values) // CHUNK)
    rest = torch.ones(len(values), dtype=torch.bool)
    rest[positions] = False
    assert torch.equal(residual[rest], values[rest])
    assert not out[rest].any()


@LIMITS
@given(kept=KEPTS, seed=st.integers(0, 2**31), chunks=st.integers(1, 3))
def test_pack_and_unpack_are_inverse(kept: int, seed: int, chunks: int) -> None:
    said = some_kept(np.random.default_rng(seed), kept, chunks)
    body = TopK2(kept).pack(said)
    assert len(body) == chunks * TopK2(kept).chunk_bytes
    for one, other in zip(said, TopK2(kept).unpack(body), strict=True):
        assert (one == other).all()


def some_kept(generator: np.random.Generator, kept: int, chunks: int) -> SparseChunks:
    """A valid payload's content, unlike any that training makes: clustered, at both ends, with any levels."""
    indices = []
    for _ in range(chunks):
        pool = generator.choice([kept, kept + 7, CHUNK])
        start = generator.choice([0, CHUNK - pool])
        indices.append(np.sort(generator.choice(pool, kept, replace=False)) + start)
    return SparseChunks(
        np.sort(generator.integers(0, bf16.INFINITE, (chunks, 2)).astype(np.uint16), axis=1),
        np.stack(indices),
        generator.random((chunks, kept)) < 0.5,
        generator.random((chunks, kept)) < generator.random(),
    )


def flip(payload: bytes, *bits: int) -> bytes:
    """``payload`` with bits of its body flipped."""
    changed = bytearray(payload)
    for bit in bits:
        changed[HEADER_BYTES + bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize("kept", KEPT)
def test_indices_that_no_encoder_writes_are_refused(kept: int) -> None:
    used = TopK2(kept)
    first = SparseChunks(
        np.full((1, 2), 0x3F80, np.uint16),
        np.arange(kept)[None] * (CHUNK // kept),  # one in each bucket: bits 0, 2, 4, … of the high parts
        np.zeros((1, kept), bool),
        np.zeros((1, kept), bool),
    )
    payload = used.header(CHUNK) + used.pack(first)
    used.check(payload, CHUNK)
    upper, lower = 32, 32 + 2 * kept
    with pytest.raises(MalformedPayload, match="number"):
        used.check(flip(payload, upper), CHUNK)  # one too few
    with pytest.raises(MalformedPayload, match="number"):
        used.check(flip(payload, upper + 1), CHUNK)  # one too many
    with pytest.raises(MalformedPayload, match="range"):
        used.check(flip(payload, upper + 2 * kept - 2, upper + 2 * kept - 1), CHUNK)  # beyond the last bucket
    with pytest.raises(MalformedPayload, match="repeated"):
        used.check(flip(payload, upper + 1, upper + 2), CHUNK)  # index 1 moves into the bucket of index 0
    moved = flip(payload, upper + 1, upper + 2, lower + used.low_bits)  # and is then made different
    used.check(moved, CHUNK)


@pytest.mark.parametrize("name", ["int2", "topk2"])
@pytest.mark.parametrize("levels", [(0x8000, 0), (0, 0x8000), (0, 0x7F80), (0, 0x7FC0), (2, 1), (0xBF80, 0x3F80)])
def test_levels_that_are_refused(name: str, levels: tuple[int, int]) -> None:
    payload = bytearray(codec(name).encode(torch.linspace(-1, 1, CHUNK), torch.zeros(CHUNK), None, 1.0))
    at = HEADER_BYTES if name == "topk2" else len(payload) - 4
    payload[at : at + 4] = b"".join(level.to_bytes(2, "little") for level in levels)
    with pytest.raises(MalformedPayload, match="level"):
        codec(name).check(bytes(payload), CHUNK)


# ------------------------------------------------------------------------------------------- topk2e


@LIMITS
@given(kept=KEPTS, seed=st.integers(0, 2**31), chunks=st.integers(1, 4))
def test_entropy_coding_is_lossless_and_never_larger_than_its_bound(kept: int, seed: int, chunks: int) -> None:
    used = TopK2e(kept)
    body = used.format.pack(some_kept(np.random.default_rng(seed), kept, chunks))
    payload = used.header(chunks * CHUNK) + used.compress(memoryview(body))
    assert len(payload) <= used.payload_bytes(chunks * CHUNK)
    assert used.expand(payload, chunks * CHUNK) == used.format.header(chunks * CHUNK) + body


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=90), kept=st.sampled_from((32, 64)))
def test_any_stream_is_refused_or_says_something_valid(data: bytes, kept: int) -> None:
    used, out = TopK2e(kept), torch.zeros(CHUNK)
    payload = used.header(CHUNK) + bytes([CODED, 0]) + data
    try:
        used.decode_add(payload, 1.0, out)
    except MalformedPayload:
        assert not out.any()
    else:
        assert torch.isfinite(out).all()
        used.format.check(used.expand(payload, CHUNK), CHUNK)


def test_a_short_stream_cannot_ask_for_more_than_its_range() -> None:
    """Fourteen bytes of zeros, which decode to ever the likeliest symbol, end where the range does."""
    used = TopK2e(64)
    with pytest.raises(MalformedPayload):
        used.expand(used.header(1024 * CHUNK) + bytes([CODED, *bytes(14)]), 1024 * CHUNK)


@LIMITS
@given(data=st.data())
def test_range_coder_returns_what_was_put_in(data: st.DataObject) -> None:
    kinds = st.sampled_from(("bit", "tree", "raw"))
    symbols = [
        (kind, data.draw(st.integers(0, {"bit": 1, "tree": 255, "raw": 4095}[kind])))
        for kind in data.draw(st.lists(kinds, max_size=300))
    ]
    coder, bit, tree = RangeEncoder(), BitModel(1), BitModel(256)
    for kind, value in symbols:
        if kind == "bit":
            coder.bit(bit, 0, value)
        elif kind == "tree":
            coder.tree(tree, 0, value, 8)
        else:
            coder.raw(value, 12)
    stream = coder.finish()
    decoder, bit, tree = RangeDecoder(memoryview(stream)), BitModel(1), BitModel(256)
    for kind, value in symbols:
        found = {"bit": lambda: decoder.bit(bit, 0), "tree": lambda: decoder.tree(tree, 0, 8)}.get(
            kind, lambda: decoder.raw(12)
        )()
        assert found == value
    decoder.finish()


def test_range_coder_carries_through_bytes_of_255() -> None:
    """Ever the less likely bit keeps ``low`` near the top, where a carry ripples through waiting bytes."""
    for pattern in product((0, 1), repeat=6):
        coder, model = RangeEncoder(), BitModel(1)
        bits = [1] * 40 + list(pattern) * 30
        for bit in bits:
            coder.bit(model, 0, bit)
        decoder, model = RangeDecoder(memoryview(coder.finish())), BitModel(1)
        assert [decoder.bit(model, 0) for _ in bits] == bits


@pytest.mark.parametrize("stream", [b"", b"\0\0\0\0", b"\1\0\0\0\0", b"\0\xff\xff\xff\xff"])
def test_streams_that_do_not_begin_like_one(stream: bytes) -> None:
    with pytest.raises(CorruptStream):
        RangeDecoder(memoryview(stream))


def test_scaled_levels_are_rounded_once() -> None:
    """Subnormal levels: the fixed-point mean times a power of two, rounded once to fp32 and once to bf16."""
    generator = np.random.default_rng(3)
    for exponent in range(-149, -120):
        row = torch.from_numpy((generator.uniform(0.5, 1, (1, 64)) * 2.0**exponent).astype(np.float32))
        levels, high = two_levels(row)
        for level, members in zip(levels[0], (~high, high), strict=True):
            if members.any():
                mean = float(row[members].double().mean())
                off = abs(float(bf16.widened(level.view(1))) - mean)
                assert off <= max(mean * 2.0**-7, 2.0**-133)

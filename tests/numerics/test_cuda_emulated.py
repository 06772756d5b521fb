"""The CUDA kernels' own source, run by the emulator: the same bits as the definition, in whatever order threads run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from psyche.numerics.aggregate import weighted_sum
from psyche.numerics.backends.base import Backend, TorchBackend
from psyche.numerics.backends.cuda import FINITE, CudaBackend, CudaCodec
from psyche.numerics.backends.emulated import BACKWARDS, FORWARDS, EmulatedLauncher
from psyche.numerics.capped_shares import fp32_quotient
from psyche.numerics.codecs.base import HEADER_BYTES, Codec, MalformedPayload, NonFinite
from psyche.numerics.codecs.registry import CODECS
from psyche.numerics.codecs.registry import codec as definition
from psyche.numerics.outer import OuterSettings, OuterState
from tests.numerics.samples import CHUNK, LARGEST, TINIEST, bits, ranges

FAST = settings(max_examples=12, deadline=None)
THOROUGH = settings(max_examples=400, deadline=None)
BETAS = st.sampled_from((0.0, 0.5, 0.95, 1.0))
WEIGHTS = st.floats(0, 1, width=32)
ORDERS = st.sampled_from((FORWARDS, BACKWARDS)) | st.integers(2, 2**32)
FIXED = tuple(name for name in CODECS if not name.startswith("topk2e"))
"""Those with kernels of their own."""

every_codec = pytest.mark.parametrize("name", CODECS)
every_kernel = pytest.mark.parametrize("name", FIXED)


@st.composite
def tied(draw: st.DrawFn) -> Tensor:
    """Values of few magnitudes, so that the choice among equals decides; some chunks are all zero or all equal."""
    count = draw(st.integers(1, 3)) * CHUNK
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    magnitudes = draw(st.lists(st.sampled_from((0.0, TINIEST, 1.0, 1.5, 2.0**-130, 3e38)), min_size=1, max_size=4))
    values = generator.choice(np.asarray(magnitudes, np.float32), count) * generator.choice((-1, 1), count)
    if draw(st.booleans()):
        values[:CHUNK][generator.random(CHUNK) < 0.99] = 0.0
    return torch.from_numpy(values.astype(np.float32))


def values() -> st.SearchStrategy[Tensor]:
    return ranges(max_chunks=3) | tied()


def emulated(library: Path, name: str, order: int = FORWARDS) -> Codec:
    return CudaBackend(EmulatedLauncher(library, order)).codec(name)


def outcome(used: Codec, base: Tensor, local: Tensor, residual: Tensor | None, beta: float) -> bytes | int:
    """The payload, or where the first value that cannot be encoded is."""
    try:
        return used.encode(base, local, residual, beta)
    except NonFinite as error:
        return error.position


def encodes_as_defined(library: Path, name: str, data: st.DataObject) -> None:
    local = data.draw(values())
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    base = data.draw(st.sampled_from((0.0, 1e-3, 1.0))) * torch.randn(len(local), generator=generator)
    residual = data.draw(st.none() | values())
    if residual is not None:
        residual = residual.repeat(3)[: len(local)]
    beta = data.draw(BETAS)
    ours, theirs = (residual.clone() if residual is not None else None for _ in range(2))
    found = outcome(emulated(library, name, data.draw(ORDERS)), base, local, ours, beta)
    expected = outcome(definition(name), base, local, theirs, beta)
    assert found == expected
    if ours is not None and theirs is not None and isinstance(found, bytes):
        assert (bits(ours) == bits(theirs)).all()


def decodes_as_defined(library: Path, name: str, data: st.DataObject) -> None:
    sent, weight = data.draw(ranges(exponents=(-149, 120), max_chunks=3) | tied()), data.draw(WEIGHTS)
    payload = definition(name).encode(sent, torch.zeros_like(sent), None, 1.0)
    ours = torch.randn(len(sent), generator=torch.Generator().manual_seed(data.draw(st.integers(0, 2**31))))
    theirs = ours.clone()
    emulated(library, name, data.draw(ORDERS)).decode_add(payload, weight, ours)
    definition(name).decode_add(payload, weight, theirs)
    assert (bits(ours) == bits(theirs)).all()


def judges_as_defined(library: Path, name: str, data: st.DataObject) -> None:
    """A payload with a few bytes changed is accepted or refused alike; refused, nothing is written."""
    count = data.draw(st.sampled_from((1, 9))) * CHUNK
    payload = bytearray(definition(name).encode(torch.sin(torch.arange(float(count))), torch.zeros(count), None, 1.0))
    places = st.integers(0, len(payload) - 1) | st.integers(len(payload) - 64, len(payload) - 1)
    if name.startswith("topk2"):
        places = places | st.integers(HEADER_BYTES, HEADER_BYTES + definition(name).payload_bytes(CHUNK) // 2)
    special = st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)) | st.integers(0, 255)
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(places)] = data.draw(special)
    ours, theirs = torch.full((count,), 3.5), torch.full((count,), 3.5)
    used, verdicts = emulated(library, name, data.draw(ORDERS)), []
    for judge, out in ((used, ours), (definition(name), theirs)):
        try:
            judge.check(bytes(payload), count)
            judge.decode_add(bytes(payload), 0.75, out)
            verdicts.append("accepted")
        except MalformedPayload:
            verdicts.append("refused")
            with pytest.raises(MalformedPayload):
                judge.decode_add(bytes(payload), 0.75, out)
            assert (out == 3.5).all()
    assert verdicts[0] == verdicts[1]
    assert (bits(ours) == bits(theirs)).all()


# ------------------------------------------------------------------------------------ as the definition


@every_codec
@FAST
@given(data=st.data())
def test_encode_is_as_defined(emulator_library: Path, name: str, data: st.DataObject) -> None:
    encodes_as_defined(emulator_library, name, data)


@every_codec
@FAST
@given(data=st.data())
def test_decode_add_is_as_defined(emulator_library: Path, name: str, data: st.DataObject) -> None:
    decodes_as_defined(emulator_library, name, data)


@every_kernel
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_same_payloads_are_refused(emulator_library: Path, name: str, data: st.DataObject) -> None:
    judges_as_defined(emulator_library, name, data)


@pytest.mark.slow
@every_kernel
@pytest.mark.parametrize("property_of", [encodes_as_defined, decodes_as_defined, judges_as_defined])
def test_all_of_it_many_times(emulator_library: Path, name: str, property_of: object) -> None:
    @THOROUGH
    @given(data=st.data())
    def many(data: st.DataObject) -> None:
        assert callable(property_of)
        property_of(emulator_library, name, data)

    many()


@pytest.mark.parametrize("name", [name for name in FIXED if name.startswith("topk2")])
@pytest.mark.parametrize("sent", [torch.ones(CHUNK), torch.arange(CHUNK) + 1.0, torch.sin(torch.arange(CHUNK))])
def test_every_changed_byte_of_a_sparse_chunk_is_judged_alike(emulator_library: Path, name: str, sent: Tensor) -> None:
    """One index too many, one too few, one twice, one out of range; levels: in a chunk that a second block reads."""
    used, fixed, count = emulated(emulator_library, name), definition(name), 9 * CHUNK
    payload = fixed.encode(sent.repeat(9), torch.zeros(count), None, 1.0)
    size = (len(payload) - HEADER_BYTES) // 9
    refused = 0
    for at in range(len(payload) - size, len(payload)):
        changed = bytearray(payload)
        changed[at] ^= 1 << at % 8
        verdicts = [_accepts(judge, bytes(changed), count) for judge in (used, fixed)]
        assert verdicts[0] == verdicts[1], at
        refused += not verdicts[0]
    assert refused >= size // 8


def _accepts(used: Codec, payload: bytes, count: int) -> bool:
    try:
        used.check(payload, count)
    except MalformedPayload:
        return False
    return True


@every_kernel
@pytest.mark.parametrize("chunks", [0, 1, 2, 7, 8, 9])
def test_every_number_of_chunks(emulator_library: Path, name: str, chunks: int) -> None:
    """Grids whose last block is not full, and those with no block at all."""
    used, fixed, count = emulated(emulator_library, name, BACKWARDS), definition(name), chunks * CHUNK
    sent = torch.randn(count, generator=torch.Generator().manual_seed(chunks))
    payload = fixed.encode(sent, torch.zeros(count), None, 1.0)
    assert used.encode(sent, torch.zeros(count), None, 1.0) == payload
    assert used.check(payload, count) == payload[HEADER_BYTES:]
    ours, theirs = torch.ones(count), torch.ones(count)
    used.decode_add(payload, 0.5, ours)
    fixed.decode_add(payload, 0.5, theirs)
    assert (bits(ours) == bits(theirs)).all()


@every_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [[0], [4095], [4096], [300, 8000, 299], [8191]])
def test_non_finite_input_names_its_first_position(
    emulator_library: Path, name: str, bad: float, where: list[int]
) -> None:
    base = torch.ones(2 * CHUNK)
    base[where] = bad
    with pytest.raises(NonFinite) as error:
        emulated(emulator_library, name, BACKWARDS).encode(base, torch.zeros(2 * CHUNK), None, 1.0)
    assert error.value.position == min(where)


@FAST
@given(data=st.data())
def test_outer_step_is_as_defined(emulator_library: Path, data: st.DataObject) -> None:
    theta, momentum, gradient = (data.draw(ranges(exponents=(-149, 100), max_chunks=1)) for _ in range(3))
    lr, mu = data.draw(st.sampled_from((0.7, 1.0, 0.1))), data.draw(st.sampled_from((0.0, 0.6, 0.9)))
    local = torch.full_like(theta, 9.0) if data.draw(st.booleans()) else None
    backend = CudaBackend(EmulatedLauncher(emulator_library, data.draw(ORDERS)))
    ours, theirs = (theta.clone(), momentum.clone()), (theta.clone(), momentum.clone())
    backend.outer_step(*ours, gradient, OuterSettings(lr, mu), local=local)
    TorchBackend().outer_step(*theirs, gradient, OuterSettings(lr, mu))
    for found, expected in zip(ours, theirs, strict=True):
        assert (bits(found) == bits(expected)).all()
    assert local is None or (bits(local) == bits(theirs[0])).all()


def rounds(backend: Backend, name: str, many: int) -> bytes:
    """The state root after ``many`` rounds of three nodes with error feedback, from one seed."""
    generator = torch.Generator().manual_seed(7)
    used, n = backend.codec(name), CHUNK
    state = OuterState.initial(torch.randn(n, generator=generator))
    residuals = [torch.zeros(n) for _ in range(3)] if used.error_feedback else [None] * 3
    outer = torch.empty(n)
    for number in range(many):
        payloads = []
        for node, residual in enumerate(residuals):
            local = state.theta - torch.randn(n, generator=generator) * 10.0 ** (node - 3)
            payloads.append((fp32_quotient(node + 1, 6), used.encode(state.theta, local, residual, 0.95)))
        weighted_sum(used, payloads, outer)
        backend.outer_step(state.theta, state.momentum, outer, OuterSettings(0.7, 0.9 if number % 2 else 0.6))
    return state.index().root


@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "int4-32", "int2", "topk2", "topk2e-256"])
def test_the_state_root_after_a_hundred_rounds_is_the_same(emulator_library: Path, name: str) -> None:
    emulator = CudaBackend(EmulatedLauncher(emulator_library, 1234))
    assert rounds(emulator, name, 100) == rounds(TorchBackend(), name, 100)


# ------------------------------------------------------------------------- without waiting for the device


def test_a_refused_payload_on_the_device_writes_nothing(emulator_library: Path) -> None:
    used = emulated(emulator_library, "int8")
    assert isinstance(used, CudaCodec)
    payload, status = torch.zeros(used.payload_bytes(CHUNK), dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
    used.encode_into(torch.ones(CHUNK), torch.zeros(CHUNK), None, 1.0, payload, status)
    assert int(status) == FINITE
    for position in (0, 20, HEADER_BYTES + 5):
        changed, malformed = payload.clone(), torch.zeros(1, dtype=torch.int32)
        changed[position] = 0x80
        out = torch.full((CHUNK,), 3.5)
        used.decode_add_into(changed, 1.0, out, malformed)
        assert int(malformed) != 0
        assert (out == 3.5).all()
    out, malformed = torch.zeros(CHUNK), torch.zeros(1, dtype=torch.int32)
    used.decode_add_into(payload, 1.0, out, malformed)
    assert int(malformed) == 0
    assert (out == 1.0).all()


def test_tensors_that_kernels_cannot_take_are_refused_by_name(emulator_library: Path) -> None:
    used, whole = emulated(emulator_library, "int8"), torch.zeros(2 * CHUNK + 1)
    good = torch.zeros(CHUNK)
    for bad in (whole[1 : CHUNK + 1], whole[: 2 * CHUNK : 2], good.double(), torch.zeros(CHUNK + 4096)):
        with pytest.raises(ValueError, match="base"):
            used.encode(bad, good, None, 1.0)
        with pytest.raises(ValueError, match="residual"):
            used.encode(good, good, bad, 1.0)
    with pytest.raises(ValueError, match="multiple of 4096"):
        used.encode(torch.zeros(100), torch.zeros(100), None, 1.0)


@every_codec
def test_payloads_of_the_largest_values(emulator_library: Path, name: str) -> None:
    sent = torch.linspace(-LARGEST / 2, LARGEST / 2, CHUNK) * 2
    payload = definition(name).encode(sent, torch.zeros(CHUNK), None, 1.0)
    used = emulated(emulator_library, name)
    assert used.encode(sent, torch.zeros(CHUNK), None, 1.0) == payload
    assert used.squared_norm(payload, CHUNK) == definition(name).squared_norm(payload, CHUNK)

"""The native backend gives PyTorch's bits: at every instruction set, thread count, alignment and magnitude."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from psyche.numerics.aggregate import weighted_sum
from psyche.numerics.backends.base import Backend, TorchBackend
from psyche.numerics.capped_shares import fp32_quotient
from psyche.numerics.codecs.base import Codec, MalformedPayload, NonFinite
from psyche.numerics.codecs.registry import CODECS, codec
from psyche.numerics.codecs.topk2e import TopK2e
from psyche.numerics.outer import OuterSettings, OuterState, outer_step
from tests.numerics.native_samples import LEVELS, damaged, hard_ranges, like, misaligned, native
from tests.numerics.samples import CHUNK, LARGEST, TINIEST, bits, ranges

every_level = pytest.mark.parametrize("level", LEVELS)
# topk2e adds an entropy coder to topk2, which is the same code for all instruction sets.
every_codec = pytest.mark.parametrize(
    ("name", "level"),
    [(name, level) for name in CODECS for level in LEVELS if level == LEVELS[0] or not name.startswith("topk2e")],
)
THREADS = st.integers(1, 5)
BETAS = st.sampled_from((0.0, 0.5, 0.95, 1.0))
WEIGHTS = st.sampled_from([fp32_quotient(part, 1_000_003) for part in (0, 1, 333_334, 1_000_003)] + [2.0**-140])
MANY_CHUNKS = 23  # enough for five threads, and not the same number for each


def computed(name: str, level: str, threads: int = 1) -> Codec:
    return native.NativeBackend(level, threads).codec(name)


def wave(chunks: int) -> Tensor:
    return torch.sin(torch.arange(chunks * CHUNK, dtype=torch.float32) * 0.7) * torch.logspace(-9, 9, chunks * CHUNK)


def payload_or_position(used: Codec, *what: object) -> bytes | int:
    """What encoding gives, or where the first value is that it cannot encode: sums of huge ones overflow."""
    try:
        return used.encode(*what)
    except NonFinite as error:
        return error.position


# ------------------------------------------------------------------------------------------- the same bits


@every_codec
@settings(max_examples=20, deadline=None)
@given(
    base=hard_ranges(), beta=BETAS | st.none(), threads=THREADS, seed=st.integers(0, 99), scale=st.sampled_from((0, 1))
)
@example(base=torch.full((CHUNK,), LARGEST), beta=None, threads=1, seed=0, scale=0)
@example(base=torch.full((CHUNK,), TINIEST), beta=1.0, threads=1, seed=0, scale=0)
@example(base=torch.arange(CHUNK) * TINIEST, beta=0.5, threads=1, seed=0, scale=1)
def test_encoding(
    name: str, level: str, base: Tensor, beta: float | None, threads: int, seed: int, scale: float
) -> None:
    local = like(base, seed, scale)
    residual = None if beta is None else like(base, seed + 1, 2.0)
    wanted_residual = None if residual is None else residual.clone()
    wanted = payload_or_position(codec(name), base, local, wanted_residual, beta or 0.0)
    found = payload_or_position(computed(name, level, threads), base, local, residual, beta or 0.0)
    assert found == wanted
    if residual is not None and wanted_residual is not None and isinstance(wanted, bytes):
        assert (bits(residual) == bits(wanted_residual)).all()


@every_codec
@settings(max_examples=20, deadline=None)
@given(values=hard_ranges(), weight=WEIGHTS, threads=THREADS, seed=st.integers(0, 99))
def test_decoding(name: str, level: str, values: Tensor, weight: float, threads: int, seed: int) -> None:
    payload = codec(name).encode(values, torch.zeros_like(values), None, 1.0)
    wanted = like(values, seed, 1.0)
    wanted[::97] = -0.0
    found = wanted.clone()
    codec(name).decode_add(payload, weight, wanted)
    used = computed(name, level, threads)
    used.decode_add(payload, weight, found)
    assert (bits(found) == bits(wanted)).all()
    assert used.squared_norm(payload, len(values)) == codec(name).squared_norm(payload, len(values))
    assert used.check(payload, len(values)) == codec(name).check(payload, len(values))


@every_codec
def test_threads_and_alignment_change_nothing(name: str, level: str) -> None:
    base, before = wave(MANY_CHUNKS), wave(MANY_CHUNKS).flip(0)
    local, residual, total = like(base, 1, 0.5), before.clone(), base.clone()
    payload = codec(name).encode(base, local, residual, 0.95)
    codec(name).decode_add(payload, 0.25, total)
    norm = codec(name).squared_norm(payload, len(base))
    shifted = memoryview(b"?" + payload)[1:]  # a payload at an odd address
    for threads in range(1, 6):
        used = computed(name, level, threads)
        found, found_total = misaligned(before), misaligned(base)
        assert used.encode(misaligned(base), misaligned(local), found, 0.95) == payload
        assert (bits(found) == bits(residual)).all()
        assert used.squared_norm(shifted, len(base)) == norm
        used.decode_add(shifted, 0.25, found_total)
        assert (bits(found_total) == bits(total)).all()


@every_level
@settings(max_examples=30, deadline=None)
@given(
    values=st.tuples(*[ranges(exponents=(-149, 126), max_chunks=1)] * 3),
    lr=st.sampled_from((0.7, 1.0, 0.1, 3.3)),
    mu=st.sampled_from((0.0, 0.6, 0.9)),
    threads=THREADS,
    with_local=st.booleans(),
    repeats=st.sampled_from((1, MANY_CHUNKS)),
    length=st.integers(0, CHUNK),
)
def test_outer_step(
    level: str,
    values: tuple[Tensor, Tensor, Tensor],
    lr: float,
    mu: float,
    threads: int,
    with_local: bool,
    repeats: int,
    length: int,
) -> None:
    count = CHUNK * repeats - length % CHUNK  # the outer step also takes a ragged end
    theta, momentum, gradient = (v.repeat(repeats)[:count] for v in values)
    wanted_theta, wanted_momentum = theta.clone(), momentum.clone()
    outer_step(wanted_theta, wanted_momentum, gradient, OuterSettings(lr, mu))
    local = torch.full_like(theta, 7.0) if with_local else None
    theta, momentum, before = misaligned(theta), misaligned(momentum), gradient.clone()
    native.NativeBackend(level, threads).outer_step(theta, momentum, gradient, OuterSettings(lr, mu), local=local)
    assert (bits(theta) == bits(wanted_theta)).all()
    assert (bits(momentum) == bits(wanted_momentum)).all()
    assert (bits(gradient) == bits(before)).all()
    assert local is None or (bits(local) == bits(wanted_theta)).all()


@pytest.mark.parametrize(
    ("name", "level"),
    [
        *((name, level) for name in ("fp32", "int8", "int4-32", "int2", "topk2") for level in LEVELS),
        ("topk2e-256", LEVELS[0]),
    ],
)
def test_state_root_after_a_hundred_rounds(name: str, level: str) -> None:
    nodes, chunks = 3, 5

    def root(backend: Backend) -> bytes:
        generator = torch.Generator().manual_seed(11)
        used = backend.codec(name)
        state = OuterState.initial(torch.randn(chunks * CHUNK, generator=generator))
        residuals = [torch.zeros(chunks * CHUNK) for _ in range(nodes)]
        for _ in range(100):
            payloads = []
            for node in range(nodes):
                local = state.theta + torch.randn(chunks * CHUNK, generator=generator) * 1e-2
                payloads.append(used.encode(state.theta, local, residuals[node], 0.95))
            gradient = torch.empty(chunks * CHUNK)
            weights = [fp32_quotient(node + 1, nodes * (nodes + 1) // 2) for node in range(nodes)]
            weighted_sum(used, zip(weights, payloads, strict=True), gradient)
            backend.outer_step(state.theta, state.momentum, gradient, OuterSettings(0.7, 0.9))
        return state.index().root

    assert root(native.NativeBackend(level, 2)) == root(TorchBackend())


# --------------------------------------------------------------------------------- what is not encoded


@every_codec
def test_the_first_value_that_is_not_finite_is_named(name: str, level: str) -> None:
    last, zeros = MANY_CHUNKS * CHUNK - 1, torch.zeros(MANY_CHUNKS * CHUNK)
    for positions in ([0], [CHUNK - 1], [300, 8000], [last], [90_000, 17_000], [last, 5000, CHUNK]):
        for bad in (float("nan"), float("inf"), -float("inf")):
            base = torch.ones_like(zeros)
            base[positions] = bad
            for threads in (1, 4):
                used = computed(name, level, threads)
                assert payload_or_position(used, base, zeros, None, 0.5) == min(positions)
                assert payload_or_position(used, base, zeros, zeros.clone(), 0.5) == min(positions)


@every_codec
def test_a_sum_that_overflows_is_not_finite(name: str, level: str) -> None:
    base, residual = torch.zeros(CHUNK), torch.zeros(CHUNK)
    base[77], residual[77] = LARGEST, LARGEST
    with pytest.raises(NonFinite) as error:
        computed(name, level).encode(base, torch.zeros(CHUNK), residual, 1.0)
    assert error.value.position == 77


# --------------------------------------------------------------------------------- what is not decoded


def verdict(used: Codec, payload: bytes, out: Tensor) -> str | None:
    """Why a payload is refused, by all that read it alike; ``None`` where it is not."""
    try:
        used.decode_add(payload, 0.5, out)
    except MalformedPayload as refusal:
        reason = str(refusal)
    else:
        used.check(payload, out.numel())
        return None
    for read in (used.check, used.squared_norm):
        with pytest.raises(MalformedPayload) as error:
            read(payload, out.numel())
        assert str(error.value) == reason
    return reason


@every_codec
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_payloads_get_the_same_verdict(name: str, level: str, data: st.DataObject) -> None:
    payload = data.draw(damaged(codec(name), wave(1)))
    wanted, found = torch.full((CHUNK,), 3.5), torch.full((CHUNK,), 3.5)
    reason = verdict(codec(name), payload, wanted)
    assert verdict(computed(name, level), payload, found) == reason
    assert (bits(found) == bits(wanted)).all()
    assert reason is None or (found == 3.5).all()


@every_level
def test_every_fault_of_a_scale_or_level_has_the_same_reason(level: str) -> None:
    """The patterns on either side of every border between what is refused, and why, and what is not."""
    fp32 = np.array([0, 1, 0x7C010203, 0x7C010204, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x80000000, 0xFF800000], "<u4")
    cases = {"int8": [fp32[i : i + 1].tobytes() for i in range(len(fp32))]}
    borders = [0, 1, 0x7DFE, 0x7DFF, 0x7E00, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0xFDFF, 0xFE00, 0xFF80, 0xFFFF]
    cases["int4"] = cases["int4-32"] = [np.array([b], "<u2").tobytes() for b in borders]
    cases["int2"] = [np.array([a, b], "<u2").tobytes() for a in borders for b in borders]
    reasons = set()
    for name, endings in cases.items():
        payload = codec(name).encode(wave(1), torch.zeros(CHUNK), None, 1.0)
        for ending in endings:
            changed, out = payload[: -len(ending)] + ending, torch.zeros(CHUNK)
            reason = verdict(codec(name), changed, torch.zeros(CHUNK))
            assert verdict(computed(name, level), changed, out) == reason
            reasons.add(reason)
    assert len(reasons) == 7


@pytest.mark.parametrize("name", [name for name in CODECS if name.startswith("topk2e")])
@settings(max_examples=15, deadline=None)
@given(values=hard_ranges())
def test_the_entropy_coder_writes_the_same_stream(name: str, values: Tensor) -> None:
    reference, used = codec(name), computed(name, LEVELS[0])
    assert isinstance(reference, TopK2e)
    assert isinstance(used, TopK2e)
    fixed = reference.format.encode(values, torch.zeros_like(values), None, 1.0)
    body = memoryview(fixed)[-reference.format.payload_bytes(len(values)) + 32 :]
    assert used.compress(body) == reference.compress(body)
    payload = reference.header(len(values)) + reference.compress(body)
    assert used.expand(payload, len(values)) == fixed


def test_ranges_that_do_not_fit_each_other_are_refused() -> None:
    used = computed("int8", LEVELS[0])
    chunk, two = torch.zeros(CHUNK), torch.zeros(2 * CHUNK)
    for wrong in ((chunk, two, None), (chunk, chunk, two), (chunk[1:], chunk[1:], None)):
        with pytest.raises(ValueError, match="range"):
            used.encode(*wrong, 1.0)
    for wrong_type in (chunk.double(), torch.zeros(CHUNK, 2)[:, 0]):
        with pytest.raises(TypeError):
            used.encode(wrong_type, chunk, None, 1.0)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_fuzzing_under_sanitizers_finds_nothing(tmp_path: Path) -> None:
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    build = ["g++", "-fsanitize=address,undefined", str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(build, capture_output=True, check=False).returncode:
        pytest.skip("g++ has no sanitizers")
    script = Path(__file__).parents[2] / "scripts" / "fuzz_native.sh"
    # As many optimizations as a fuzzer of 20,000 cases needs: compiling takes the time.
    environment = {**os.environ, "TMPDIR": str(tmp_path), "CXXFLAGS": "-O1 -g1"}
    ran = subprocess.run([script, "20000"], capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "20000 cases" in ran.stdout

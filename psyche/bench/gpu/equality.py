"""Compare every kernel with its definition in PyTorch, bit for bit, on difficult data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from psyche.bench.gpu.machine import Machine
from psyche.numerics.backends.base import Backend, TorchBackend
from psyche.numerics.backends.cuda import CudaBackend
from psyche.numerics.capped_shares import fp32_quotient
from psyche.numerics.codecs.base import HEADER_BYTES, Codec, MalformedPayload, NonFinite
from psyche.numerics.codecs.registry import CODECS
from psyche.numerics.flat import ALIGNMENT
from psyche.numerics.outer import OuterSettings

BETA, LR, MU = 0.95, 0.7, 0.9
WEIGHT = fp32_quotient(1, 3)
LARGEST = torch.finfo(torch.float32).max
SMALLEST = 2.0**-149

OUTER = "outer step"


@dataclass(frozen=True)
class Difference:
    """A result in which a kernel and the definition differ."""

    what: str
    sample: str
    elements: int

    def __str__(self) -> str:
        return f"{self.what} differs on {self.sample}, {self.elements} elements"


def samples(count: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield names, values to send and residuals, fp32 ``[count]`` on the CPU; always the same."""
    generator = torch.Generator().manual_seed(count)
    normal = torch.randn(count, generator=generator)
    exponents = torch.randint(-149, 100, (count // 256, 1), generator=generator).double()
    wide = (normal.double().view(-1, 256) * 2.0**exponents).float().view(-1)
    whole = torch.randint(-300, 300, (count,), generator=generator)
    spike = torch.zeros(count)
    spike[-1] = -1.0
    yield "normal values", normal, torch.randn(count, generator=generator) * 0.1
    yield "blocks of very different magnitude", wide, wide.roll(256) * 0.5
    yield "subnormals", whole * SMALLEST, whole.roll(1) * SMALLEST
    yield "ties", (whole % 4 - 1).float(), torch.zeros(count)
    yield "zeros of both signs", torch.zeros(count) * normal.sign(), torch.zeros(count) * whole.sign()
    yield "equal values", torch.full((count,), -0.3), torch.full((count,), 1e-3)
    yield "the largest values", torch.linspace(-LARGEST / 2, LARGEST / 2, count) * 2, torch.zeros(count)
    yield "one value", spike, torch.zeros(count)


def comparisons(machine: Machine) -> list[tuple[str, int]]:
    """List what is compared and at how many elements: everything at the smallest size first."""
    return [
        (name, chunks * ALIGNMENT)
        for number, chunks in enumerate(machine.chunks)
        for name in (*CODECS, OUTER)
        if number < 2 or not name.startswith("topk2e")  # its entropy coder is plain Python, and slow
    ]


def differences(machine: Machine, name: str, count: int) -> Iterator[Difference]:
    """Compare codec ``name``, or the outer step, on ``count`` elements, and yield the differences."""
    if name == OUTER:
        yield from _outer_differences(machine, count)
        return
    used, defined = CudaBackend(machine.launcher).codec(name), TorchBackend().codec(name)
    for sample, sent, residual in samples(count):
        for before in (residual, None):
            for what in _coding(machine, used, defined, sent, before):
                yield Difference(what, sample, count)
    for what in _refusals(machine, used, defined, count):
        yield Difference(what, "damaged input", count)


def _outer_differences(machine: Machine, count: int) -> Iterator[Difference]:
    backend, device = CudaBackend(machine.launcher), machine.launcher.device
    for sample, theta, momentum in samples(count):
        gradient = theta.roll(5) * 0.25
        expected = _stepped(TorchBackend(), theta, momentum, gradient, torch.device("cpu"))
        found = _stepped(backend, theta, momentum, gradient, device)
        for what, ours, theirs in zip(("θ", "momentum", "the local copy"), found, expected, strict=True):
            if not _same(ours, theirs):
                yield Difference(what, sample, count)


def _stepped(backend: Backend, theta: Tensor, momentum: Tensor, gradient: Tensor, device: torch.device) -> list[Tensor]:
    theta, momentum, gradient = (tensor.to(device, copy=True) for tensor in (theta, momentum, gradient))
    local = torch.empty_like(theta)
    backend.outer_step(theta, momentum, gradient, OuterSettings(LR, MU), local=local)
    return [theta, momentum, local]


def _coding(machine: Machine, used: Codec, defined: Codec, sent: Tensor, before: Tensor | None) -> Iterator[str]:
    device, nothing = machine.launcher.device, torch.zeros_like(sent)
    ours, theirs = (before.to(place, copy=True) if before is not None else None for place in (device, "cpu"))
    payload = defined.encode(sent, nothing, theirs, BETA)
    on_device = sent.to(device), nothing.to(device)
    if used.encode(*on_device, ours, BETA) != payload:
        yield "the payload"
    if ours is not None and theirs is not None and not _same(ours, theirs):
        yield "the residual"
    with machine.other_stream():
        again = before.to(device, copy=True) if before is not None else None
        if used.encode(*on_device, again, BETA) != payload:
            yield "the payload on another stream"
    total, expected = on_device[0].flip(0), sent.flip(0)
    used.decode_add(payload, WEIGHT, total)
    defined.decode_add(payload, WEIGHT, expected)
    if not _same(total, expected):
        yield "the decoded sum"


def _refusals(machine: Machine, used: Codec, defined: Codec, count: int) -> Iterator[str]:
    device = machine.launcher.device
    sent, nothing = torch.sin(torch.arange(float(count))), torch.zeros(count)
    payload = defined.encode(sent, nothing, None, BETA)
    generator = torch.Generator().manual_seed(count)
    places = [0, 8, HEADER_BYTES, HEADER_BYTES + 1, HEADER_BYTES + 5, len(payload) - 1, len(payload) - 2]
    places += torch.randint(HEADER_BYTES, len(payload), (30,), generator=generator).tolist()
    for place in places:
        for byte in (0x00, 0x80, 0xFF):
            damaged = payload[:place] + bytes([byte]) + payload[place + 1 :]
            ours, theirs = torch.full((count,), 3.5, device=device), torch.full((count,), 3.5)
            if _accepted(used, damaged, ours) != _accepted(defined, damaged, theirs) or not _same(ours, theirs):
                yield f"the verdict on a payload with byte {place} set to {byte}"
    for position in (0, count // 2 + 1, count - 1):
        bad = sent.clone()
        bad[position] = float("nan")
        bad[count - 1] = float("inf")
        try:
            used.encode(bad.to(device), nothing.to(device), None, BETA)
        except NonFinite as error:
            if error.position != position:
                yield f"the position of a NaN ({error.position} instead of {position})"
        else:
            yield "the verdict on a NaN"


def _accepted(used: Codec, payload: bytes, out: Tensor) -> bool:
    try:
        used.decode_add(payload, WEIGHT, out)
    except MalformedPayload:
        return False
    return True


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.cpu().view(torch.int32), theirs.view(torch.int32))

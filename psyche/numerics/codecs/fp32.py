"""``fp32``: the unquantized pseudo-gradient, the baseline for all other codecs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs.base import MalformedPayload, TorchCodec
from psyche.numerics.flat import ALIGNMENT


class Fp32(TorchCodec):
    """32 bits per parameter, little-endian. Lossless, so it needs no error feedback."""

    name = "fp32"
    error_feedback = False
    chunk_bytes = 4 * ALIGNMENT

    def squared_norm(self, payload: Buffer, count: int) -> float:
        values = np.frombuffer(self.check(payload, count), "<f4").astype(np.float64)
        # accumulate() adds strictly from left to right; the order of sum() depends on the hardware
        return float(np.add.accumulate(values * values)[-1]) if count else 0.0

    def _quantize(self, values: Tensor) -> bytes:
        return values.numpy().astype("<f4", copy=False).tobytes()

    def _dequantize(self, body: memoryview, count: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(body, "<f4", count).astype(np.float32))

    def _check_body(self, body: memoryview, count: int) -> None:
        if not np.isfinite(np.frombuffer(body, "<f4", count)).all():
            raise MalformedPayload("a value is NaN or infinite")

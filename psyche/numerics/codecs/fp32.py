"""``fp32``: the pseudo-gradient as it is. The reference every other codec is measured against."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Buffer

from psyche.numerics.codecs.base import HEADER_BYTES, DefinedCodec, MalformedPayload


class Fp32(DefinedCodec):
    """32 bits a parameter, little-endian. Nothing is lost, so there is no error feedback."""

    name = "fp32"
    error_feedback = False

    def payload_bytes(self, count: int) -> int:
        return HEADER_BYTES + 4 * count

    def squared_norm(self, payload: Buffer, count: int) -> float:
        values = np.frombuffer(self.check(payload, count), "<f4").astype(np.float64)
        # accumulate adds strictly left to right; sum() would pair terms as the hardware likes
        return float(np.add.accumulate(values * values)[-1]) if count else 0.0

    def _quantize(self, values: Tensor) -> bytes:
        return values.numpy().astype("<f4", copy=False).tobytes()

    def _values(self, body: memoryview, count: int) -> Tensor:
        return torch.from_numpy(np.frombuffer(body, "<f4", count).astype(np.float32))

    def _check_body(self, body: memoryview, count: int) -> None:
        if not np.isfinite(np.frombuffer(body, "<f4", count)).all():
            raise MalformedPayload("a value is NaN or infinite")

"""Run every kernel on tensors of exactly the right size; with ASan preloaded, any access beyond one ends the process.

LD_PRELOAD=libasan.so python -m tests.numerics.under_asan LIBRARY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from psyche.numerics.backends.cuda import CudaBackend
from psyche.numerics.backends.emulated import EmulatedLauncher
from psyche.numerics.codecs.registry import CODECS
from psyche.numerics.outer import OuterSettings


def main() -> None:
    backend = CudaBackend(EmulatedLauncher(Path(sys.argv[1])))
    for name in CODECS:
        count = 9 * 4096
        used, sent = backend.codec(name), torch.sin(torch.arange(float(count)))
        residual, out = torch.zeros(count), torch.zeros(count)
        payload = used.encode(sent, torch.zeros(count), residual, 0.95)
        used.decode_add(payload, 0.5, out)
    backend.outer_step(sent, residual, out, OuterSettings(0.5, 0.5), local=torch.empty(count))
    print("nothing out of bounds")


if __name__ == "__main__":
    main()

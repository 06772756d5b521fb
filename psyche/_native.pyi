"""The C++ extension: ``kernels/cpu/module.cpp``. Tensors are contiguous fp32 ``[n]`` on the CPU.

Wrong sizes, names and levels raise ``ValueError``. What a peer's bytes are worth comes back as a reason, or ``None``.
"""

from torch import Tensor
from typing_extensions import Buffer

def levels() -> list[str]: ...

class Codec:
    def __init__(self, name: str, level: str) -> None: ...
    def encode(
        self, header: Buffer, base: Tensor, local: Tensor, residual: Tensor | None, beta: float, threads: int
    ) -> bytes | int:
        """The payload, or the position of the first value that is not finite."""

    def check(self, body: Buffer, count: int, threads: int) -> str | None: ...
    def decode_add(self, body: Buffer, weight: float, out: Tensor, threads: int) -> str | None: ...
    def squared_norm(self, body: Buffer, count: int) -> float: ...

def outer_step(
    theta: Tensor,
    momentum: Tensor,
    gradient: Tensor,
    lr: float,
    mu: float,
    local: Tensor | None,
    threads: int,
    level: str,
) -> None: ...
def compress(body: Buffer, kept: int) -> bytes | None:
    """``None`` where the coded stream would not be smaller."""

def expand(header: Buffer, stream: Buffer, kept: int, chunks: int) -> bytes | None:
    """``None`` where the stream is corrupt."""

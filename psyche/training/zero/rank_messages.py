"""The messages between the leading process and its ranks: msgpack over a socket pair.

Every rank answers every order with :class:`OrderDone` or :class:`OrderFailed`. Tensors go through a ``SharedVector``.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["theta", "exp_avg", "exp_avg_sq"]
"""The contents of the shared vector: the parameters, or one of AdamW's two moments."""


class RankMessage(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages."""


class Start(RankMessage, frozen=True):
    """Build the model and the optimizer. ``model`` and ``inner`` are parts of the run configuration, as JSON."""

    model: str
    inner: str
    precision: str
    stage: Literal[1, 2, 3]
    offload: bool
    """Keep the optimizer, its state and the master weights in host memory."""
    threads: int
    checkpoints: bool
    """Recompute activations in the backward pass instead of saving them."""
    end: int | None
    """The token that precedes padding; None: sequences are not padded."""
    memory_limit: int | None
    """Bytes of GPU memory that a rank may use; None: all of it."""


class Rows(msgspec.Struct, frozen=True):
    """One rank's part of a batch: token ids, int64 ``[sum(micro_batches), length]``."""

    tokens: bytes
    length: int
    micro_batches: tuple[int, ...]
    """Sequences of each forward pass. Every rank makes the same number of passes, so some may have no sequences."""


class Step(RankMessage, frozen=True):
    """Take one inner step."""

    rows: Rows
    total: int
    """Predicted tokens of the whole batch, over all ranks."""
    lr: float


class Evaluate(RankMessage, frozen=True):
    """Compute the loss without training."""

    rows: Rows


class Fit(RankMessage, frozen=True):
    """Report how many sequences of ``length`` tokens fit into this rank's memory at once."""

    length: int


class Read(RankMessage, frozen=True):
    """Copy this rank's part of ``kind`` to the shared vector."""

    kind: Kind


class Write(RankMessage, frozen=True):
    """Copy this rank's part of the ranges ``parts`` (start, stop) from the shared vector."""

    kind: Kind
    parts: tuple[tuple[int, int], ...]


class Shift(RankMessage, frozen=True):
    """Add the shared vector to the parameters in the ranges ``parts``."""

    parts: tuple[tuple[int, int], ...]


class Resume(RankMessage, frozen=True):
    """Set the optimizer's step count; 0 drops its state."""

    steps: int


class Stop(RankMessage, frozen=True):
    """Exit. The only message without an answer."""


Order = Start | Step | Evaluate | Fit | Read | Write | Shift | Resume | Stop


class OrderDone(RankMessage, frozen=True):
    """The order was executed. For a batch: this rank's part of the loss and of the predicted tokens."""

    loss: float = 0.0
    tokens: int = 0
    sequences: int = 0
    """The answer to :class:`Fit`."""


class OrderFailed(RankMessage, frozen=True):
    """The order failed, and this rank cannot be used any more."""

    text: str
    out_of_memory: bool = False


Answer = OrderDone | OrderFailed

encode = msgspec.msgpack.encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode

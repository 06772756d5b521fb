"""What the leading process and its ranks say to each other: msgpack over a socket pair. Tensors go another way.

Every rank answers every order with :class:`OrderDone` or :class:`OrderFailed`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["theta", "exp_avg", "exp_avg_sq"]
"""What the shared flat vector holds: the parameters, or one of AdamW's two moments of them."""


class RankMessage(msgspec.Struct, frozen=True, tag=True):
    """Anything that is said."""


class Start(RankMessage, frozen=True):
    """What a rank builds, and where. Model and inner are JSON, as the configuration writes them."""

    model: str
    inner: str
    precision: str
    stage: Literal[1, 2, 3]
    offload: bool
    """The optimizer, its state and the master weights lie in the machine's memory."""
    threads: int
    checkpoints: bool
    """Activations are computed twice instead of kept."""
    end: int | None
    """Of padded sequences, the token that padding follows."""
    memory_limit: int | None
    """Bytes that a rank may take of its GPU."""


class Rows(msgspec.Struct, frozen=True):
    """One rank's part of a batch: token ids, int64 ``[sum(pieces), length]``."""

    tokens: bytes
    length: int
    pieces: tuple[int, ...]
    """Sequences of each forward pass: the same number of passes on every rank, a pass of none among them."""


class Step(RankMessage, frozen=True):
    """One inner step."""

    rows: Rows
    total: int
    """Tokens predicted in the whole batch."""
    lr: float


class Evaluate(RankMessage, frozen=True):
    """The loss of the parameters as they are."""

    rows: Rows


class Fit(RankMessage, frozen=True):
    """Say how many sequences of so many tokens fit into this rank's memory at once."""

    length: int


class Read(RankMessage, frozen=True):
    """Copy what this rank holds of it into the shared vector."""

    kind: Kind


class Write(RankMessage, frozen=True):
    """Take what this rank holds of the ranges ``parts`` (start, stop) from the shared vector."""

    kind: Kind
    parts: tuple[tuple[int, int], ...]


class Shift(RankMessage, frozen=True):
    """Add the shared vector to the parameters in the ranges ``parts``."""

    parts: tuple[tuple[int, int], ...]


class Resume(RankMessage, frozen=True):
    """The optimizer stands after so many steps; after none it has no state."""

    steps: int


class Stop(RankMessage, frozen=True):
    """End this process. Not answered."""


Order = Start | Step | Evaluate | Fit | Read | Write | Shift | Resume | Stop


class OrderDone(RankMessage, frozen=True):
    """The order is carried out. For a batch: this rank's share of the loss, and of the predicted tokens."""

    loss: float = 0.0
    tokens: int = 0
    sequences: int = 0
    """That fit at once; the answer to :class:`Fit`."""


class OrderFailed(RankMessage, frozen=True):
    """The order is not carried out, and this rank is of no more use."""

    text: str
    out_of_memory: bool = False


Answer = OrderDone | OrderFailed

encode = msgspec.msgpack.encode
decode_order = msgspec.msgpack.Decoder(Order).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode

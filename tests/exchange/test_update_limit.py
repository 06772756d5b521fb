"""What peers send is bounded before it reaches the model: a result of 3.4e38 made θ infinite, with no way back."""

from __future__ import annotations

import pytest
import torch

from psyche.config import Data, Model, Rounds, Run
from psyche.exchange.payload_store import PayloadLayout
from psyche.exchange.rules import update_limit
from psyche.numerics.codecs.registry import codec

COUNT = 4096
RUN = Run(
    name="limit", model=Model(settings={"vocab_size": 4096}), data=Data(), rounds=Rounds(total=1, inner_steps=100)
)


def encoded(name: str, value: float) -> bytes:
    return bytes(codec(name).encode(torch.full((COUNT,), value), torch.zeros(COUNT), None, 0.0))


@pytest.mark.parametrize("name", ["fp32", "int8", "int4", "topk2e"])
def test_a_slice_larger_than_inner_steps_can_make_it_is_refused(name: str) -> None:
    layout = PayloadLayout(codec(name), (COUNT,), update_limit(RUN))
    honest = RUN.inner.lr * RUN.rounds.inner_steps  # as far as AdamW goes with all gradients of one sign
    layout.check_slice(0, encoded(name, honest))
    layout.check_slice(0, encoded(name, -20 * honest))
    for value in (3.4e38, 1e6, -1e6):
        with pytest.raises(ValueError, match="is larger than"):
            layout.check_slice(0, encoded(name, value))

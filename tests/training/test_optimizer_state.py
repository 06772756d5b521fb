"""The inner optimizer's state as bytes: the same for the same state, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch

from psyche import config
from psyche.config import BpeTokenizer, Data, Inner, Node, Run
from psyche.training.models import build, draws_random_numbers
from psyche.training.optimizer_state import Moments, muon_parameters, pack_state, packed_state_bytes
from psyche.training.torch_engine import TorchEngine
from tests.training.tiny_models import SPEC, parameters, steps, tiny

RUN = Run(name="tiny", model=SPEC, data=Data(tokenizer=BpeTokenizer(vocab_size=260)))


def engine(optimizer: str) -> TorchEngine:
    return TorchEngine(tiny(), Inner(optimizer=optimizer, batch_size=4, warmup_steps=0), Node(device="cpu"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_goes_on_from_an_unpacked_state_to_the_bit(optimizer: str) -> None:
    one, other = engine(optimizer), engine(optimizer)
    steps(one, 3)
    data = bytes(pack_state(one))
    assert len(data) == packed_state_bytes(one.layout)
    moments = Moments.unpack(data, other.layout)
    run = RUN.model_copy(update={"inner": Inner(optimizer=optimizer)})
    other.write(parameters(one))
    other.load_state(moments.state(other.layout, muon_parameters(run)))
    assert other.steps == 3
    assert bytes(pack_state(other)) == data
    assert steps(one, 2, 3) == steps(other, 2, 3)
    assert torch.equal(parameters(one), parameters(other))
    assert bytes(pack_state(one)) == bytes(pack_state(other)) != data


def test_before_the_first_step_there_is_none() -> None:
    one = engine("adamw")
    assert len(pack_state(one)) == 8
    moments = Moments.unpack(pack_state(one), one.layout)
    assert moments.state(one.layout, frozenset()) == {}
    assert torch.isfinite(moments.flat).all()
    steps(one, 1)
    one.load_state({})
    assert len(pack_state(one)) == 8


def test_what_no_engine_has_is_refused() -> None:
    one = engine("adamw")
    steps(one, 2)
    data = bytes(pack_state(one))
    without = data[:-8] + bytes(8)
    for bad in (b"", data[:-1], data + b"\0", without, (5).to_bytes(8, "little"), data[:-8] + b"\xff" * 8):
        with pytest.raises(ValueError, match="optimizer state"):
            Moments.unpack(bad, one.layout)
    with pytest.raises(ValueError, match="after 2 steps, expected at most 1"):
        Moments.unpack(data, one.layout, most=1)


@pytest.mark.parametrize(
    ("settings", "draws"), [({}, True), ({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, False)]
)
def test_dropout_is_noticed(settings: dict[str, float], draws: bool) -> None:
    size = {"vocab_size": 64, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = build(config.Model(architecture="gpt2", settings=size | settings))
    before = torch.get_rng_state()
    assert draws_random_numbers(model, torch.zeros(1, 4, dtype=torch.int64)) is draws
    assert torch.equal(torch.get_rng_state(), before)

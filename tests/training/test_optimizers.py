"""The inner optimizers: Muon between the embeddings, AdamW for the rest, one state by name."""

from __future__ import annotations

import pytest
import torch

from psyche import config
from psyche.config import Inner, Node
from psyche.training.models import build
from psyche.training.optimizers import Optimizers
from psyche.training.torch_engine import TorchEngine
from tests.training.tiny_models import SETTINGS, parameters, steps, tiny

torch.set_num_threads(1)
MUON = Inner(optimizer="muon", lr=1e-2, batch_size=4, warmup_steps=0)


def engine(seed: int = 0, inner: Inner = MUON) -> TorchEngine:
    return TorchEngine(tiny(seed), inner, Node(device="cpu"))


@pytest.mark.parametrize("tied", [True, False])
def test_muon_takes_the_matrices_between_embeddings_and_head(tied: bool) -> None:
    model = build(config.Model(settings=SETTINGS | {"tie_word_embeddings": tied}))
    one = TorchEngine(model, MUON, Node(device="cpu"))
    steps(one, 1)
    kept = one.state()
    by_muon = {name.partition("/")[2] for name in kept if name.startswith("momentum_buffer/")}
    by_adamw = {name.partition("/")[2] for name in kept if name.startswith("exp_avg/")}
    assert by_muon == {name for name, p in model.named_parameters() if "proj" in name and p.dim() == 2}
    assert by_muon | by_adamw == {name for name, _ in model.named_parameters()}
    assert not by_muon & by_adamw
    assert ("lm_head.weight" in by_adamw) is not tied


def test_its_update_is_orthogonal_and_of_adamws_size() -> None:
    """0.2·√max(A, B) times a matrix whose singular values are all near 1 (five Newton–Schulz steps leave .7 to 1.2)."""
    inner = MUON.model_copy(update={"weight_decay": 0.0})
    model = tiny(1)
    name, weight = next((n, p) for n, p in model.named_parameters() if "gate_proj" in n)
    one = TorchEngine(model, inner, Node(device="cpu"))
    before = parameters(one)
    steps(one, 1)
    moved = (one.layout.views(before)[name] - one.layout.views(parameters(one))[name]) / 1e-2
    singular = torch.linalg.svdvals(moved.double()) / (0.2 * max(weight.shape) ** 0.5)
    assert 0.5 < float(singular.min()) <= float(singular.max()) < 1.4


def test_muon_learns_and_continues_to_the_bit_from_its_state() -> None:
    one = engine(1)
    losses = steps(one, 12)
    assert losses[-1] < losses[0]
    other = engine(2)
    other.write(parameters(one))
    other.load_state({name: value.clone() for name, value in one.state().items()})
    assert other.steps == 12
    assert steps(one, 3, start=12) == steps(other, 3, start=12)
    assert torch.equal(parameters(one), parameters(other))


def test_the_state_of_the_other_optimizer_is_refused() -> None:
    adamw = engine(inner=MUON.model_copy(update={"optimizer": "adamw"}))
    one = engine()
    steps(adamw, 1)
    steps(one, 1)
    for giver, taker in ((adamw, one), (one, adamw)):
        with pytest.raises(ValueError, match="inner optimizer state"):
            taker.load_state(giver.state())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_what_the_first_step_will_allocate_is_known_before_it(optimizer: str) -> None:
    model = tiny()
    optimizers = Optimizers(model, MUON.model_copy(update={"optimizer": optimizer}))
    expected = optimizers.unallocated_bytes
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(1e-3)
    kept = {name: value for name, value in optimizers.state().items() if not name.startswith("step/")}
    assert expected == sum(value.nbytes for value in kept.values())
    assert optimizers.unallocated_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_step_numbers_are_loaded_as_what_fused_kernels_read(dtype: torch.dtype) -> None:
    one, other = engine(), engine()
    losses = steps(one, 2)
    assert losses == steps(other, 2)
    one.load_state({name: value.to(dtype) if "step/" in name else value for name, value in other.state().items()})
    assert one.steps == 2
    assert {value.dtype for value in one.state().values()} == {torch.float32}
    assert steps(one, 2, start=2) == steps(other, 2, start=2)


def test_what_is_loaded_goes_to_the_device_of_its_parameter_step_numbers_too() -> None:
    """As fused kernels want it; on the meta device, which needs no GPU and has no such kernels."""
    one, model = engine(), tiny()
    steps(one, 2)
    optimizers = Optimizers(model, MUON)
    names = dict(model.named_parameters())
    there = {name: torch.nn.Parameter(p.detach().to("meta")) for name, p in names.items()}
    optimizers._names = {there[name]: name for name in there}
    for part in optimizers._parts:
        for group in part.param_groups:
            group["params"] = [there[name] for name, p in names.items() if any(p is held for held in group["params"])]
    assert optimizers.load_state(one.state()) == 2
    found = optimizers.state()
    assert found.keys() == one.state().keys()
    assert {value.device.type for value in found.values()} == {"meta"}

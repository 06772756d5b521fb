"""The engine: one flat vector outside, a model and its optimizer inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from psyche import config
from psyche.config import Inner, Node
from psyche.errors import ConfigError, PsycheError
from psyche.training.devices import pick_device, pick_precision
from psyche.training.models import build, layout
from psyche.training.torch_engine import TorchEngine
from tests.training.tiny_models import SETTINGS, SPEC, SPLIT, parameters, steps, tiny

torch.set_num_threads(1)
INNER = Inner(lr=1e-2, batch_size=4, warmup_steps=0)
NODE = Node(device="cpu")


def engine(seed: int = 0, inner: Inner = INNER, **node: object) -> TorchEngine:
    return TorchEngine(tiny(seed), inner, Node(device="cpu", **node))


def test_read_gives_the_models_parameters() -> None:
    model = tiny(3)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    one = TorchEngine(model, INNER, NODE)
    views = one.layout.views(parameters(one))
    assert views.keys() == expected.keys()
    for name, view in views.items():
        assert torch.equal(view, expected[name])


def test_write_then_read_is_the_same_and_moves_the_model() -> None:
    one = engine()
    wanted = torch.randn(one.layout.size, generator=torch.Generator().manual_seed(1)) * 0.02
    before = one.evaluate(SPLIT.batch(range(4)))
    one.write(wanted)
    assert torch.equal(parameters(one), wanted)
    assert one.evaluate(SPLIT.batch(range(4))) != before
    wanted.zero_()
    assert parameters(one).any(), "the engine keeps its own copy"


def test_two_engines_with_the_same_parameters_and_data_stay_the_same() -> None:
    one, other = engine(1), engine(2)
    other.write(parameters(one))
    assert steps(one, 3) == steps(other, 3)
    assert torch.equal(parameters(one), parameters(other))


def test_training_learns() -> None:
    one = engine()
    first, *_, last = steps(one, 16)
    assert last < first


def test_padding_stays_zero() -> None:
    one = engine()
    steps(one, 2)
    flat = parameters(one)
    for view in one.layout.views(flat).values():
        view.zero_()
    assert not flat.any()


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4, 9])
def test_accumulated_gradients_equal_the_whole_batch(micro_batch: int) -> None:
    """Not to the bit: sums are made in another order. SGD would show it; AdamW makes much of little, so lr is low."""
    whole, pieces = engine(), engine(micro_batch=micro_batch)
    losses = steps(whole, 4), steps(pieces, 4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(parameters(whole), parameters(pieces), rtol=0, atol=2e-4)


def test_accumulation_weighs_an_uneven_last_piece_by_its_rows() -> None:
    def gradients(micro_batch: int) -> list[torch.Tensor]:
        one = engine(micro_batch=micro_batch, inner=INNER.model_copy(update={"clip": None}))
        one.step(SPLIT.batch(range(5)), 1e-2)
        return [p.grad for p in one.model.parameters() if p.grad is not None]

    for one, other in zip(gradients(5), gradients(3), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-7)


def test_clipping_bounds_the_gradient() -> None:
    one = engine(inner=INNER.model_copy(update={"clip": 0.01}))
    steps(one, 1)
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in one.model.parameters() if p.grad is not None]))
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_evaluate_changes_nothing_and_counts_predictions() -> None:
    one = engine()
    steps(one, 2)
    before, state = parameters(one), {k: v.clone() for k, v in one.state().items()}
    batch = SPLIT.batch(range(8))
    total, predicted = one.evaluate(batch)
    assert predicted == 8 * (batch.shape[1] - 1)
    assert torch.equal(parameters(one), before)
    assert all(torch.equal(value, state[name]) for name, value in one.state().items())
    halves = [one.evaluate(batch[:4]), one.evaluate(batch[4:])]
    assert sum(loss for loss, _ in halves) == pytest.approx(total, rel=1e-5)
    assert one.model.training


def test_the_loss_is_in_nats_a_token() -> None:
    one = engine()
    one.write(torch.zeros(one.layout.size))
    assert steps(one, 1)[0] == pytest.approx(np.log(SETTINGS["vocab_size"]), rel=1e-5)


# ----------------------------------------------------------------------------------------- optimizer


def test_state_and_parameters_together_continue_to_the_bit() -> None:
    one = engine(1)
    steps(one, 5)
    other = engine(2)
    other.write(parameters(one))
    other.load_state({name: value.clone() for name, value in one.state().items()})
    assert steps(one, 5, start=5) == steps(other, 5, start=5)
    assert torch.equal(parameters(one), parameters(other))


def test_the_steps_behind_the_optimizers_state_go_where_the_state_goes() -> None:
    one, other = engine(1), engine(2)
    assert one.steps == 0
    steps(one, 3)
    one.write(parameters(other))
    assert one.steps == 3
    other.load_state(one.state())
    steps(other, 2)
    assert other.steps == 5
    other.load_state(engine().state())
    assert other.steps == 0, "a state that is lost begins anew"


def test_without_the_state_it_would_not_continue() -> None:
    one, other = engine(1), engine(1)
    steps(one, 5)
    other.write(parameters(one))
    steps(one, 1, start=5)
    steps(other, 1, start=5)
    assert not torch.equal(parameters(one), parameters(other))


def test_a_loaded_state_is_a_copy() -> None:
    one, other = engine(), engine()
    steps(one, 2)
    state = one.state()
    other.load_state(state)
    before = {name: value.clone() for name, value in state.items()}
    steps(other, 2)
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_the_state_before_the_first_step_is_empty_and_loads() -> None:
    one = engine()
    assert one.state() == {}
    steps(one, 2)
    one.load_state({})
    assert one.state() == {}


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    one = engine()
    steps(one, 1)
    state = {name: value.clone() for name, value in one.state().items()}
    name = next(iter(one.layout.views(parameters(one))))
    wrong: list[dict[str, torch.Tensor]] = [
        {key: value for key, value in state.items() if key != f"exp_avg_sq/{name}"},
        state | {f"exp_avg/{name}": torch.zeros(3)},
        state | {f"exp_avg_sq/{name}": torch.zeros(3)},
        state | {"exp_avg/no.such.parameter": torch.zeros(3)},
        state | {f"momentum/{name}": torch.zeros(3)},
    ]
    for given in wrong:
        with pytest.raises(ValueError, match="inner optimizer state"):
            one.load_state(given)
        assert all(torch.equal(value, state[key]) for key, value in one.state().items())


def test_writing_parameters_keeps_the_optimizer_state() -> None:
    one = engine()
    steps(one, 2)
    before = {name: value.clone() for name, value in one.state().items()}
    one.write(torch.zeros(one.layout.size))
    assert all(torch.equal(value, before[name]) for name, value in one.state().items())


def test_weight_decay_is_for_matrices_only() -> None:
    decaying = engine(inner=INNER.model_copy(update={"weight_decay": 0.5}))
    plain = engine(inner=INNER.model_copy(update={"weight_decay": 0.0}))
    steps(decaying, 1)
    steps(plain, 1)
    one, other = (e.layout.views(parameters(e)) for e in (decaying, plain))
    for name, view in one.items():
        assert torch.equal(view, other[name]) == (view.dim() < 2), name


# --------------------------------------------------------------------------------- device, precision


def test_precision_choices() -> None:
    cpu = torch.device("cpu")
    assert pick_precision("fp32", cpu) is None
    assert pick_precision("bf16", cpu) is torch.bfloat16
    assert pick_precision("auto", cpu) is None


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_precision_on_a_gpu_is_bf16_where_it_has_it(has_bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has_bf16)
    assert pick_precision("auto", torch.device("cuda")) is (torch.bfloat16 if has_bf16 else None)


def test_bf16_trains_with_fp32_parameters() -> None:
    one = engine(precision="bf16")
    plain = engine(precision="fp32")
    losses = steps(one, 2)
    assert losses == pytest.approx(steps(plain, 2), rel=2e-2)
    assert losses != steps(engine(precision="fp32"), 2)
    assert all(p.dtype == torch.float32 for p in one.model.parameters())


def test_device_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(PsycheError, match="--device cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda:0")
    assert pick_device("cuda:0") == torch.device("cuda:0")
    with pytest.raises(PsycheError, match="cuda:1"):
        pick_device("cuda:1")


# ------------------------------------------------------------------------------------------- models


def test_a_model_follows_its_seed_and_disturbs_no_other_random_numbers() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first, second, third = tiny(1), tiny(1), tiny(2)
    assert torch.equal(torch.rand(3), expected)
    a, b, c = (torch.cat([p.flatten() for p in m.parameters()]) for m in (first, second, third))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_layout_needs_no_memory() -> None:
    huge = config.Model(settings=SETTINGS | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 8})
    assert layout(huge).parameters > 5e9


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (config.Model(architecture="no-such-model", settings=SETTINGS), "run.model.architecture"),
        (config.Model(settings=SETTINGS | {"hiden_size": 3}), "run.model.settings.hiden_size"),
        (config.Model(settings=SETTINGS | {"hidden_size": "wide"}), "run.model"),
        (config.Model(settings=SETTINGS | {"num_attention_heads": 3}), "run.model"),
    ],
)
def test_models_that_cannot_be_built_name_the_setting(spec: config.Model, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build(spec)


def test_the_tiny_model_has_a_layout() -> None:
    assert layout(SPEC).size == engine().layout.size


# ------------------------------------------------------------------------------------------ padding

END = 7


def padded(rows: list[list[int]]) -> np.ndarray:
    return np.array([[*row, *[END] * (16 - len(row))] for row in rows], np.int64)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_padding_is_not_learned_and_every_token_counts_alike(micro_batch: int) -> None:
    """The loss is the mean over the tokens of all documents, however unevenly they are dealt to pieces."""
    documents = [[9, 8, 9, 8], [20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120], [5], [11, 12]]
    one = TorchEngine(tiny(1), INNER, Node(device="cpu", micro_batch=micro_batch), END)
    alone = TorchEngine(tiny(1), INNER, NODE)
    sums = [alone.evaluate(np.array([[*document, END]], np.int64)) for document in documents]
    expected, tokens = sum(loss for loss, _ in sums), sum(count for _, count in sums)
    assert one.evaluate(padded(documents)) == (pytest.approx(expected, rel=1e-5), tokens)
    assert one.step(padded(documents), 1e-2) == pytest.approx(expected / tokens, rel=1e-5)

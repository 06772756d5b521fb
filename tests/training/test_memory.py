"""Batches are taken in as few pieces as fit, and a step that did not fit is taken again in smaller ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psyche import config
from psyche.config import Inner, Node
from psyche.errors import PsycheError
from psyche.training import torch_engine
from psyche.training.engine import Batch
from psyche.training.memory import (
    MEMORY_SHARE,
    OVERHEAD,
    activation_bytes,
    free_memory,
    max_micro_batch,
    micro_batch_size,
    saved_bytes,
)
from psyche.training.models import build
from psyche.training.torch_engine import MicroBatch, TorchEngine
from tests.training.tiny_models import SETTINGS, Sequences, parameters, tiny

torch.set_num_threads(1)
INNER = Inner(lr=1e-2, batch_size=8, warmup_steps=0)
BATCH = Sequences(64).batch(range(8))


def engine(**node: object) -> TorchEngine:
    return TorchEngine(tiny(), INNER, Node(device="cpu", **node))


def loss_of(one: TorchEngine, rows: int) -> torch.Tensor:
    """Of a forward pass over so many sequences."""
    (piece,) = one._micro_batches(BATCH[:rows])
    return one._loss(one.model, piece)


class Narrow(TorchEngine):
    """A device on which ``room`` sequences fit at once, twice as many where their activations are not kept."""

    room = 3

    def _loss(self, forward: object, piece: MicroBatch) -> torch.Tensor:
        self.tried = [*getattr(self, "tried", []), len(piece.tokens)]
        if len(piece.tokens) > self.room * (1 + self.checkpoints):
            raise torch.OutOfMemoryError("this many do not fit")
        return super()._loss(forward, piece)  # type: ignore[arg-type]


@given(rows=st.integers(1, 500), most=st.integers(1, 600))
def test_pieces_are_equal_as_few_as_fit_and_never_empty(rows: int, most: int) -> None:
    found = micro_batch_size(rows, most)
    assert 1 <= found <= min(rows, most)
    pieces = -(-rows // found)
    assert pieces == -(-rows // most)
    assert found == -(-rows // pieces), "no smaller piece would do as few"


@given(each=st.integers(1, 1 << 40), once=st.integers(0, 1 << 40), free=st.integers(-1, 1 << 44))
def test_as_many_are_taken_at_once_as_fit_beside_what_all_of_them_keep(each: int, once: int, free: int) -> None:
    found = max_micro_batch(each, free, once)
    assert found >= 1
    assert found == 1 or (once + found * each) * OVERHEAD <= MEMORY_SHARE * free
    assert (once + (found + 2) * each) * OVERHEAD > MEMORY_SHARE * free


def test_what_a_forward_pass_keeps_grows_with_its_sequences_and_leaves_parameters_out() -> None:
    one = engine()
    kept = [saved_bytes(lambda n=n: loss_of(one, n), [one._flat]) for n in (1, 2, 4)]
    assert kept[0] > 0
    # What does not grow (masks, rotary tables) is little.
    assert kept[1] == pytest.approx(2 * kept[0], rel=0.2)
    assert kept[2] == pytest.approx(4 * kept[0], rel=0.2)


def test_measuring_disturbs_neither_parameters_nor_random_numbers() -> None:
    one = engine()
    before = parameters(one)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    saved_bytes(lambda: loss_of(one, 1) + torch.rand(1).sum(), [one._flat])
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(parameters(one), before)
    assert all(p.grad is None for p in one.model.parameters())


def test_the_whole_batch_is_taken_at_once_where_it_fits() -> None:
    one, other = engine(), engine(micro_batch=8)
    assert one.step(BATCH, 1e-2) == other.step(BATCH, 1e-2)
    assert torch.equal(parameters(one), parameters(other))
    assert sizes(one, BATCH) == [8]


def sizes(one: TorchEngine, batch: Batch) -> list[int]:
    """Of the pieces that a batch is taken in."""
    return [len(piece.tokens) for piece in one._micro_batches(batch)]


def room_for(one: TorchEngine, sequences: float) -> int:
    """Bytes free where so many fit at once."""
    kept = [saved_bytes(lambda n=n: loss_of(one, n), [one._flat]) for n in (1, 2)]  # type: ignore[misc]
    each, to_come = kept[1] - kept[0], sum(p.nbytes for p in one.model.parameters()) * 3
    return int(to_come + (kept[0] + (sequences - 1) * each) * OVERHEAD / MEMORY_SHARE)


def test_little_memory_means_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine()
    free = room_for(one, 2.5)
    monkeypatch.setattr(torch_engine, "free_memory", lambda device: free)
    one.step(BATCH, 1e-2)
    assert sizes(one, BATCH) == [2, 2, 2, 2]


@pytest.mark.parametrize("first", [1, 3, 8])
def test_how_many_fit_does_not_depend_on_how_many_come_first(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last batch of the held-out split, say."""
    one = engine()
    free = room_for(one, 5.5)
    monkeypatch.setattr(torch_engine, "free_memory", lambda device: free)
    one.evaluate(BATCH[:first])
    assert sizes(one, BATCH) == [4, 4]
    assert sizes(one, BATCH[:5]) == [5]


def test_weights_that_are_cast_for_a_pass_count_once_and_not_for_each_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    one = engine(precision="bf16")
    free = room_for(one, 6.5)
    monkeypatch.setattr(torch_engine, "free_memory", lambda device: free)
    one.step(BATCH, 1e-2)
    assert sizes(one, np.concatenate([BATCH] * 3)) == [6, 6, 6, 6]


def test_a_step_that_does_not_fit_is_taken_again_in_smaller_pieces() -> None:
    one, plain = Narrow(tiny(), INNER, Node(device="cpu", micro_batch=8)), engine(micro_batch=2)
    expected = plain.step(BATCH, 1e-2)
    assert one.step(BATCH, 1e-2) == expected
    assert one.tried == [8, 4, 2, 2, 2, 2]
    assert torch.equal(parameters(one), parameters(plain)), "what was accumulated before it failed is forgotten"
    assert one.steps == 1


def test_a_batch_that_cannot_be_judged_at_once_is_judged_in_smaller_pieces() -> None:
    one, plain = Narrow(tiny(), INNER, Node(device="cpu", micro_batch=8)), engine(micro_batch=2)
    assert one.evaluate(BATCH) == plain.evaluate(BATCH)
    assert one.tried == [8, 4, 2, 2, 2, 2]
    assert one.model.training
    assert not one.model.is_activation_checkpointing, "nothing is kept that could be computed again"


def test_where_two_do_not_fit_one_is_taken_at_a_time() -> None:
    """The second sequence of the measurement is one too many."""

    class Tight(Narrow):
        room = 1

    one, plain = Tight(tiny(), INNER, Node(device="cpu")), engine(micro_batch=1)
    assert one.step(BATCH, 1e-2) == plain.step(BATCH, 1e-2)
    assert one.tried == [1, 2, *[1] * 8]


def test_where_one_sequence_does_not_fit_activations_are_not_kept() -> None:
    class Narrower(Narrow):
        room = 0.5  # type: ignore[assignment]

    one, plain = Narrower(tiny(), INNER, Node(device="cpu", micro_batch=2)), engine(micro_batch=1)
    assert one.step(BATCH, 1e-2) == pytest.approx(plain.step(BATCH, 1e-2), rel=1e-6)
    assert torch.allclose(parameters(one), parameters(plain), atol=1e-6)
    assert one.model.is_activation_checkpointing


def test_where_nothing_fits_the_mend_is_named() -> None:
    class Nothing(Narrow):
        room = 0

    one = Nothing(tiny(), INNER, Node(device="cpu", micro_batch=2))
    before = parameters(one)
    with pytest.raises(PsycheError, match="one sequence does not fit"):
        one.step(BATCH, 1e-2)
    with pytest.raises(PsycheError, match="one sequence does not fit"):
        one.evaluate(BATCH)
    assert torch.equal(parameters(one), before)


def test_checkpointed_activations_give_the_same_gradients() -> None:
    one, plain = engine(activation_checkpointing=True, micro_batch=8), engine(micro_batch=8)
    # One layer's activations at a time are less than all of them.
    assert saved_bytes(lambda: loss_of(one, 8), [one._flat]) < 0.8 * saved_bytes(lambda: loss_of(plain, 8), plain._flat)
    losses = [[e.step(BATCH, 1e-2) for _ in range(3)] for e in (one, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_free_memory_of_a_gpu_ends_at_the_limit_that_was_set_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """24 GB, of which others have 4 and we 3, one of them cached only."""
    for name, value in {
        "memory_reserved": 3,
        "memory_allocated": 2,
        "mem_get_info": (17, 24),
        "get_per_process_memory_fraction": 1.0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    gpu = torch.device("cuda", 0)
    assert free_memory(gpu) == 18
    for fraction, left in ((0.5, 10), (1 / 24, 0)):
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, share=fraction: share)
        assert free_memory(gpu) == left


def test_free_memory_is_some() -> None:
    assert free_memory(torch.device("cpu")) > 1 << 20


def test_activations_are_known_without_allocating_them() -> None:
    """Within a fifth of what a model of this size keeps on the CPU, in bf16."""
    spec = config.Model(settings=SETTINGS | {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4})
    found = activation_bytes(spec, 32, recompute=False)
    model = build(spec).to(torch.bfloat16).train()
    tokens = torch.zeros(1, 32, dtype=torch.long)
    kept = saved_bytes(lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss, model.parameters())
    assert found == pytest.approx(kept, rel=0.2)
    assert activation_bytes(spec, 32, recompute=True) < 0.6 * found


def test_activations_of_a_model_as_wide_as_its_sequences_are_long_count_like_any_other() -> None:
    """Of hidden states, heads and MLP each has its turn to be of the shape of attention's weights."""
    spec = config.Model(settings=SETTINGS | {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 2})
    for twice in (False, True):
        found = {length: activation_bytes(spec, length, recompute=twice) for length in (63, 64, 65, 127, 128, 129, 384)}
        for length in (64, 128):
            assert 2 * found[length] == pytest.approx(found[length - 1] + found[length + 1], abs=2)
        assert found[384] == pytest.approx(3 * found[128], rel=0.01)

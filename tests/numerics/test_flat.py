"""The flat space: where every parameter lies, and that all nodes agree on it."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from psyche import config
from psyche.numerics.flat import ALIGNMENT, MAX_SLICES, SLICE, FlatLayout, slice_length
from psyche.training.models import build, initial_parameters, layout

SHAPES = st.lists(st.lists(st.integers(1, 90), min_size=0, max_size=3).map(tuple), min_size=1, max_size=8)
LLAMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def named(shapes: list[tuple[int, ...]]) -> FlatLayout:
    return FlatLayout.of((f"t{number}", shape) for number, shape in enumerate(shapes))


@settings(max_examples=50, deadline=None)
@given(shapes=SHAPES)
def test_tensors_are_aligned_and_disjoint(shapes: list[tuple[int, ...]]) -> None:
    flat = named(shapes)
    end = 0
    for span, shape in zip(flat.spans, shapes, strict=True):
        assert span.start % ALIGNMENT == 0
        assert end <= span.start < end + ALIGNMENT
        assert span.stop - span.start == prod(shape)
        end = span.stop
    assert flat.size % ALIGNMENT == 0
    assert end <= flat.size < end + ALIGNMENT
    assert flat.parameters == sum(prod(shape) for shape in shapes)


@settings(max_examples=50, deadline=None)
@given(shapes=SHAPES, data=st.data())
def test_every_position_belongs_to_one_tensor(shapes: list[tuple[int, ...]], data: st.DataObject) -> None:
    flat = named(shapes)
    for span in flat.spans:
        for position in {span.start, span.stop - 1, data.draw(st.integers(span.start, span.stop - 1))}:
            assert flat.name_at(position) == span.name
    assert flat.name_at(flat.size - 1) == flat.spans[-1].name  # padding counts to the tensor before it


@settings(max_examples=30, deadline=None)
@given(shapes=SHAPES, seed=st.integers(0, 99))
def test_views_and_gather_are_inverse(shapes: list[tuple[int, ...]], seed: int) -> None:
    flat = named(shapes)
    generator = torch.Generator().manual_seed(seed)
    tensors = {span.name: torch.randn(span.shape, generator=generator) for span in flat.spans}
    vector = torch.full((flat.size,), 7.0)
    flat.gather(tensors, vector)
    views = flat.views(vector)
    for span in flat.spans:
        assert torch.equal(views[span.name], tensors[span.name])
        assert (vector[span.stop : -(-span.stop // ALIGNMENT) * ALIGNMENT] == 7.0).all()  # padding is left alone
    views["t0"].zero_()
    assert not vector[: flat.spans[0].stop].any(), "a view must write through"


@pytest.mark.parametrize("size", [1, ALIGNMENT, SLICE - 1, SLICE, SLICE + 1, 3 * SLICE + 5])
def test_slices_cover_the_vector_once(size: int) -> None:
    flat = FlatLayout.of([("a", (size,))])
    covered = 0
    for part in flat.slices():
        assert part.start == covered
        assert part.start % ALIGNMENT == part.stop % ALIGNMENT == 0
        assert 0 < part.stop - part.start <= SLICE
        covered = part.stop
    assert covered == flat.size


def test_the_digest_changes_with_every_name_shape_and_order() -> None:
    base = [("a", (4, 8)), ("b", (32,)), ("c", (2, 2, 2))]
    variants = [
        base,
        base[:2],
        [*base, ("d", (1,))],
        [("A", (4, 8)), *base[1:]],
        [("a", (8, 4)), *base[1:]],
        [("a", (32,)), *base[1:]],
        [base[1], base[0], base[2]],
        [("ab", (4, 8)), ("", (32,)), ("c", (2, 2, 2))],
        [],
    ]
    assert len({FlatLayout.of(variant).digest for variant in variants}) == len(variants)
    assert FlatLayout.of(base).digest == FlatLayout.of(base).digest


def test_repeated_names_are_refused() -> None:
    with pytest.raises(ValueError, match="repeat"):
        FlatLayout.of([("a", (1,)), ("a", (2,))])


def test_an_empty_layout_is_empty() -> None:
    assert FlatLayout.of([]).size == 0
    assert list(FlatLayout.of([]).slices()) == []


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_appear_once(tied: bool) -> None:
    model = build(config.Model(settings=LLAMA | {"tie_word_embeddings": tied}))
    flat = FlatLayout.of_model(model)
    names = [span.name for span in flat.spans]
    assert ("lm_head.weight" in names) is not tied
    assert sum("embed_tokens" in name for name in names) == 1
    assert flat.parameters == sum(p.numel() for p in model.parameters())
    assert not any("rotary" in name or "inv_freq" in name for name in names), "buffers are not trained"


def test_the_layout_is_the_same_without_memory_and_with_it() -> None:
    spec = config.Model(settings=LLAMA | {"tie_word_embeddings": True})
    flat, theta = initial_parameters(spec, seed=3)
    assert layout(spec).digest == flat.digest
    assert len(theta) == flat.size
    model = build(spec, seed=3)
    for name, parameter in model.named_parameters():
        assert torch.equal(flat.views(theta)[name], parameter.detach())
    padding = torch.ones(flat.size, dtype=torch.bool)
    for view in flat.views(padding).values():
        view.fill_(False)
    assert padding.any()
    assert not theta[padding].any()


def test_frozen_parameters_are_not_in_the_layout() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].requires_grad_(False)
    assert [span.name for span in FlatLayout.of_model(model).spans] == ["1.weight", "1.bias"]


def test_initial_parameters_follow_the_seed() -> None:
    spec = config.Model(settings=LLAMA)
    assert torch.equal(initial_parameters(spec, 1)[1], initial_parameters(spec, 1)[1])
    assert not torch.equal(initial_parameters(spec, 1)[1], initial_parameters(spec, 2)[1])


# ------------------------------------------------------------------------------------------- fragments


def _transformer(layers: int, sizes: list[int], tail: int) -> FlatLayout:
    """Embeddings, ``layers`` layers of the tensors ``sizes``, and after them ``tail`` more tensors."""
    shapes = [("model.embed_tokens.weight", (700, 9))]
    for layer in range(layers):
        shapes += [(f"model.layers.{layer}.part{i}.weight", (size,)) for i, size in enumerate(sizes)]
    shapes += [(("model.norm.weight", "lm_head.weight")[i], (5, 1000 * i + 1)) for i in range(tail)]
    return FlatLayout.of(shapes)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 9),
    sizes=st.lists(st.one_of(st.integers(1, 9000), st.integers(SLICE - 2, SLICE + 9000)), min_size=1, max_size=3),
    tail=st.integers(0, 2),
    count=st.integers(1, 5),
)
def test_fragments_partition_the_vector_into_aligned_bounded_slices(
    layers: int, sizes: list[int], tail: int, count: int
) -> None:
    flat = _transformer(layers, sizes, tail)
    units = 1 + layers + (tail > 0)
    if count > units:
        with pytest.raises(ValueError, match=f"{count} fragments: this model can be split into at most {units}"):
            flat.fragments(count)
        return
    fragments = flat.fragments(count)
    assert len(fragments) == count
    everything = sorted((part.start, part.stop) for parts in fragments for part in parts)
    assert [start for start, _ in everything] == [0, *(stop for _, stop in everything[:-1])]
    assert everything[-1][1] == flat.size
    for parts in fragments:
        assert list(parts) == sorted(parts, key=lambda part: part.start)
        for part in parts:
            assert part.start % ALIGNMENT == part.stop % ALIGNMENT == 0
            assert 0 < part.stop - part.start <= slice_length(flat.size)


def test_layers_are_dealt_to_fragments_in_turn() -> None:
    flat = _transformer(5, [3], 2)
    found = [
        {flat.name_at(at) for part in parts for at in range(part.start, part.stop, ALIGNMENT)}
        for parts in flat.fragments(3)
    ]
    assert found == [
        {"model.embed_tokens.weight", "model.layers.2.part0.weight", "model.norm.weight", "lm_head.weight"},
        {"model.layers.0.part0.weight", "model.layers.3.part0.weight"},
        {"model.layers.1.part0.weight", "model.layers.4.part0.weight"},
    ]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gpt_neox"])
def test_the_layers_of_real_models_are_found(architecture: str) -> None:
    names = {"gpt2": {"n_embd": 32, "n_layer": 5, "n_head": 2}}
    usual = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 2}
    settings_ = {"vocab_size": 64, **names.get(architecture, usual)}
    flat = layout(config.Model(architecture=architecture, settings=settings_))
    assert len(flat.fragments(7)) == 7  # what is before the layers, five layers, what comes after
    with pytest.raises(ValueError, match="at most 7"):
        flat.fragments(8)


@pytest.mark.parametrize(
    ("size", "length"),
    [(1, SLICE), (MAX_SLICES * SLICE, SLICE), (MAX_SLICES * SLICE + 1, 2 * SLICE), (7 * 10**9, 16 * SLICE)],
)
def test_larger_models_have_larger_slices_not_more(size: int, length: int) -> None:
    assert slice_length(size) == length
    assert -(-size // length) <= MAX_SLICES


@settings(max_examples=50, deadline=None)
@given(shapes=SHAPES, first=st.integers(0, 40), chunks=st.integers(1, 40))
def test_what_lies_within_a_range_is_its_parameters_without_padding(
    shapes: list[tuple[int, ...]], first: int, chunks: int
) -> None:
    flat = named(shapes)
    part = slice(first * ALIGNMENT, (first + chunks) * ALIGNMENT)
    found = [at for piece in flat.within(part) for at in (piece.start, piece.stop)]
    assert found == sorted(found)
    used = torch.zeros(flat.size, dtype=torch.bool)
    for span in flat.spans:
        used[span.start : span.stop] = True
    there = torch.zeros(flat.size, dtype=torch.bool)
    for piece in flat.within(part):
        there[piece] = True
    used[: part.start] = False
    used[part.stop :] = False
    assert torch.equal(there, used)

"""Documents to sequences: nothing is lost, nothing is added that is learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psyche.data.encoding import pack, pad
from psyche.training.engine import IGNORED, target_labels

EOS = 0
documents = st.lists(st.lists(st.integers(1, 99), max_size=40).map(lambda ids: [*ids, EOS]), max_size=12)
widths = st.integers(2, 17)


def array(tokens: list[int]) -> np.ndarray:
    return np.array(tokens, np.uint16)


@given(documents, widths)
def test_packing_keeps_every_token_in_order(texts: list[list[int]], width: int) -> None:
    rows, carry = [], array([])
    for text in texts:
        found, carry = pack(np.concatenate([carry, array(text)]), width)
        assert len(carry) < width
        rows.append(found)
    stream = np.concatenate([*rows, carry], axis=None)
    assert stream.tolist() == [token for text in texts for token in text]


@given(documents.filter(bool), widths)
def test_padding_learns_every_token_once_and_no_padding(texts: list[list[int]], width: int) -> None:
    for text in texts:
        rows = pad(array(text), width)
        assert rows.shape == (-(-(len(text) - 1) // width), width)
        learned = target_labels(rows.astype(np.int64), EOS)
        assert (learned[:, 1:] != IGNORED).any(axis=1).all()  # no row's mean is of nothing
        kept = learned[learned != IGNORED].tolist()
        assert kept in (text, text[:-1])  # the end alone would be a row that teaches nothing
        assert (rows[learned == IGNORED] == EOS).all()


@given(documents.filter(bool), widths)
def test_labels_are_those_of_documents_alone(texts: list[list[int]], width: int) -> None:
    """A padded row's labels, by the definition: everything up to the first end token."""
    for row in pad(array(texts[0]), width).astype(np.int64):
        stop = row.tolist().index(EOS) + 1 if EOS in row else width
        assert target_labels(row[None], EOS)[0].tolist() == [*row[:stop].tolist(), *[IGNORED] * (width - stop)]


def test_a_padded_sequence_has_the_loss_of_the_document_alone() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    document = [5, 6, 7, 8, EOS]
    alone = torch.tensor([document])
    padded = pad(array(document), 12).astype(np.int64)
    expected = model(input_ids=alone, labels=alone).loss.item()
    found = model(input_ids=torch.from_numpy(padded), labels=torch.from_numpy(target_labels(padded, EOS))).loss.item()
    assert found == pytest.approx(expected, rel=1e-6)

"""Mixtures: shares follow weights to within one document, and a mixture can be taken up anywhere."""

from __future__ import annotations

import json
import signal
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from psyche.config import BpeTokenizer, Data, MixturePart, MixtureSource, TextSource
from psyche.data.prepare import prepare
from psyche.data.sources import Part, documents, interleave
from psyche.data.token_store import store_path
from psyche.errors import PsycheError
from tests.data.conftest import Spawn
from tests.data.stores import decoded
from tests.data.stores import documents as documents_of

sources = st.lists(
    st.tuples(st.floats(0.01, 100), st.lists(st.integers(1, 50), min_size=1, max_size=30)), min_size=1, max_size=5
)
stops = st.sampled_from(["first_exhausted", "all_exhausted"])


def parts_of(spec: list[tuple[float, list[int]]]) -> list[Part[int]]:
    return [Part(weight, lambda items=items: iter(items), iter(items)) for weight, items in spec]


@given(sources, stops)
def test_shares_follow_weights_to_within_one_document(spec: list[tuple[float, list[int]]], stop: str) -> None:
    parts = parts_of(spec)
    slack = max(max(items) / weight for weight, items in spec)
    for _ in islice(interleave(parts, lambda item: item, stop), 500):
        shares = [part.size / part.weight for part in parts]
        assert max(shares) - min(shares) <= slack * (1 + 1e-9)


@given(sources, stops)
def test_every_source_keeps_its_order_and_the_mixture_ends_as_it_says(
    spec: list[tuple[float, list[int]]], stop: str
) -> None:
    parts = parts_of(spec)
    taken: list[list[int]] = [[] for _ in spec]
    for number, item in islice(interleave(parts, lambda item: item, stop), 500):
        taken[number].append(item)
    for (_, items), found in zip(spec, taken, strict=True):
        assert found == (items * (len(found) // len(items) + 1))[: len(found)]
    whole = [len(found) >= len(items) for (_, items), found in zip(spec, taken, strict=True)]
    if stop == "first_exhausted":
        assert any(whole)
        assert all(len(found) <= len(items) for (_, items), found in zip(spec, taken, strict=True))
    elif sum(map(len, taken)) < 500:
        assert all(whole)


@given(sources, stops, st.integers(0, 60))
def test_a_mixture_goes_on_from_what_its_parts_say(spec: list[tuple[float, list[int]]], stop: str, count: int) -> None:
    whole = list(islice(interleave(parts_of(spec), lambda item: item, stop), 300))
    parts = parts_of(spec)
    first = list(islice(interleave(parts, lambda item: item, stop), count))
    again = []
    for (weight, items), part, number in zip(spec, parts, range(len(spec)), strict=True):
        done = sum(n == number for n, _ in first) - part.passes * len(items)
        again.append(Part(weight, part.open, iter(items[done:]), part.size, part.passes))
    if len(first) == count:
        rest = islice(interleave(again, lambda item: item, stop), 300 - count)
        assert [*first, *rest] == whole


def test_a_source_without_documents_is_named() -> None:
    with pytest.raises(PsycheError, match=r"data\.source\.parts\.1 has no document"):
        list(interleave(parts_of([(1.0, [1, 2]), (1.0, [])]), lambda item: item, "all_exhausted"))


# ------------------------------------------------------------------------------------------- of text


@pytest.fixture
def mixture(tmp_path: Path) -> MixtureSource:
    """One document of ``a`` for three tokens' worth of ``b``, whose documents are shorter."""
    parts = []
    for name, weight, count, words in (("a", 1.0, 30, 60), ("b", 3.0, 200, 25)):
        directory = tmp_path / name
        directory.mkdir()
        for number in range(count):
            (directory / f"{number:03d}").write_text(f"{name}{number} " * words)
        parts.append(MixturePart(weight=weight, source=TextSource(kind="text", paths=(str(directory),))))
    return MixtureSource(kind="mixture", parts=tuple(parts))


def test_documents_take_turns_by_characters(mixture: MixtureSource) -> None:
    texts = list(documents(mixture, 60))
    a, b = (sum(len(text) for text in texts if text[0] == name) for name in "ab")
    assert abs(b / 3 - a) <= max(map(len, texts))


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
def test_a_mixture_becomes_a_store_with_its_shares(mixture: MixtureSource, tmp_path: Path, stop: str) -> None:
    source = mixture.model_copy(update={"stop": stop})
    data = Data(source=source, tokenizer=BpeTokenizer(vocab_size=300), sequence_length=16, heldout_fraction=0.1)
    store = prepare(data, tmp_path, vocab_limit=300)
    tokens, longest = {"a": 0, "b": 0}, 0
    for split in ("train", "heldout"):
        for text, document in zip(decoded(store, split), documents_of(store, split), strict=True):
            tokens[text[0]] += len(document)
            longest = max(longest, len(document))
    assert abs(tokens["b"] / 3 - tokens["a"]) <= longest * 3  # one document, and the cut tail of two splits


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
def test_a_mixture_killed_and_resumed(mixture: MixtureSource, tmp_path: Path, spawn: Spawn, stop: str) -> None:
    """Also where a source was begun again before the kill."""
    source = mixture.model_copy(update={"stop": stop})
    data = Data(source=source, tokenizer=BpeTokenizer(vocab_size=300), sequence_length=16, heldout_fraction=0.1)
    out, _ = spawn(data, tmp_path / "whole").communicate()
    root, calls = out.split()[-2:]
    journals = []
    for moment in (0.3, 0.25, 0.2):  # of all that is to do
        child = spawn(data, tmp_path / "killed", die_at=int(moment * int(calls)))
        child.communicate()
        assert child.returncode == -signal.SIGKILL
        journal = store_path(tmp_path / "killed", data) / "staging" / "journal.json"
        journals.append(json.loads(journal.read_bytes()))
    out, _ = spawn(data, tmp_path / "killed").communicate()
    assert out.split()[-2] == root
    assert 0 < journals[0]["documents"] < journals[1]["documents"]
    assert (stop == "all_exhausted") == any(part["passes"] for journal in journals for part in journal["parts"])


def test_the_configuration_of_a_mixture() -> None:
    tree = {
        "source": {
            "kind": "mixture",
            "parts": [
                {"weight": 3, "source": {"kind": "stdlib"}},
                {"weight": 1.5, "source": {"kind": "dataset", "path": "json", "data_files": ["a", "b"]}},
            ],
        }
    }
    data = Data.model_validate(tree)
    assert Data.model_validate_json(data.model_dump_json()) == data
    tree["source"]["parts"][0]["weight"] = 0  # type: ignore[index]
    with pytest.raises(ValidationError, match="greater than 0"):
        Data.model_validate(tree)

"""Tokenizers: what the store keeps is what transformers loads, whatever machine made it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from psyche.config import BpeTokenizer, Data, NamedTokenizer
from psyche.data import tokenizer as module
from psyche.data.prepare import prepare
from psyche.data.tokenizer import Encoder, tokenizer_files
from psyche.errors import PsycheError

TEXTS = ["the cat sat on the mat. ", "a λ in the dark\n\n    indented", "the end of the thing "] * 20


def write_tokenizer(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def test_transformers_loads_what_was_trained(data: Data, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    store = prepare(data, tmp_path, vocab_limit=400)
    tokenizer = AutoTokenizer.from_pretrained(store.tokenizer_path)
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id == store.index.eos
    assert len(tokenizer) == store.vocab_size
    text = "never seen: žluťoučký 🐎\t\x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer(text)["input_ids"] == Encoder.load(store.tokenizer_path).encode([text])[0][:-1].tolist()


def test_training_is_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = BpeTokenizer(vocab_size=300)
    first = tokenizer_files(spec, TEXTS)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert tokenizer_files(spec, iter(TEXTS)) == first


def test_training_reads_no_more_than_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SAMPLE", 50)
    stream = iter(TEXTS)
    tokenizer_files(BpeTokenizer(vocab_size=300), stream)
    assert len(list(stream)) == len(TEXTS) - 2


def test_text_that_spells_the_end_is_text(tmp_path: Path) -> None:
    encoder = Encoder.load(write_tokenizer(tmp_path, tokenizer_files(BpeTokenizer(vocab_size=300), TEXTS)))
    ids = encoder.encode(["a<|endoftext|>b"])[0].tolist()
    assert ids.index(encoder.eos) == len(ids) - 1
    assert encoder.tokenizer.decode(ids[:-1]) == "a<|endoftext|>b"


def test_long_texts_are_encoded_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder.load(write_tokenizer(tmp_path, tokenizer_files(BpeTokenizer(vocab_size=300), TEXTS)))
    texts = ["", "λ" * 25, "the mat", "the cat sat on the mat. " * 9]
    whole = [ids.tolist() for ids in encoder.encode(texts)]
    monkeypatch.setattr(module, "PIECE", 10)
    monkeypatch.setattr(module, "MAX_CHARACTERS", 30)
    pieces = [ids.tolist() for ids in encoder.encode(texts)]
    assert [encoder.tokenizer.decode(ids[:-1]) for ids in pieces] == texts
    assert [ids[-1] for ids in pieces] == [encoder.eos] * len(texts)
    assert pieces[0::2] == whole[0::2]  # the short ones: nothing was cut


def test_a_named_tokenizer_is_kept_whole_and_says_nothing_of_where_it_was(data: Data, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files = tokenizer_files(BpeTokenizer(vocab_size=300), TEXTS)
    stores = []
    for place in ("here", "there"):
        spec = NamedTokenizer(kind="pretrained", name=str(write_tokenizer(tmp_path / place, files)))
        named = data.model_copy(update={"tokenizer": spec})
        stores.append(prepare(named, tmp_path, vocab_limit=300))
    assert stores[0].path != stores[1].path
    assert stores[0].root == stores[1].root
    assert stores[0].vocab_size == Encoder.load(tmp_path / "here").vocab_size
    assert len(AutoTokenizer.from_pretrained(stores[0].tokenizer_path)) == stores[0].vocab_size
    with pytest.raises(PsycheError, match=r"model\.settings\.vocab_size"):
        prepare(named, tmp_path / "other", vocab_limit=280)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    files = tokenizer_files(BpeTokenizer(vocab_size=300), TEXTS)
    config = json.loads(files["tokenizer_config.json"])
    del config["eos_token"]
    write_tokenizer(tmp_path, {**files, "tokenizer_config.json": json.dumps(config).encode()})
    with pytest.raises(PsycheError, match="no eos_token"):
        Encoder.load(tmp_path)


def test_a_name_that_does_not_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    with pytest.raises(PsycheError, match=r"data\.tokenizer\.name: AutoTokenizer cannot load .*hollow"):
        tokenizer_files(NamedTokenizer(kind="pretrained", name=str(tmp_path / "hollow")), [])

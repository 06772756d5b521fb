"""Reading: any sequence by its index, and never a byte that was not checked."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psyche.config import Data, HubSource, NamedTokenizer, TextSource
from psyche.data.index import Index, Shard, TokenizerFile, decode_index
from psyche.data.prepare import prepare
from psyche.data.shards import shard_name
from psyche.data.token_store import TokenStore, store_path
from psyche.errors import PsycheError
from psyche.numerics.digest import blob_root, digest

LENGTH = 16


def write_store(path: Path, sequences: int = 100, vocab_size: int = 1000, shard_sequences: int = 10) -> np.ndarray:
    """A store of random tokens, ten sequences a shard. Returns its training split."""
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "tokenizer.json").write_bytes(b"{}")
    wide = vocab_size > 2**16
    rows = np.random.default_rng(3).integers(0, vocab_size, (sequences, LENGTH))
    shards: dict[str, list[Shard]] = {}
    for split, part in (("train", rows), ("heldout", rows[:7])):
        shards[split] = []
        for number, start in enumerate(range(0, len(part), shard_sequences)):
            piece = part[start : start + shard_sequences].astype("<u4" if wide else "<u2")
            file = shard_name(split, number)
            (path / file).write_bytes(piece.tobytes())
            shards[split].append(Shard(file, len(piece), piece.nbytes, blob_root(piece.tobytes()).hex()))
    index = Index(
        format=2,
        sequence_length=LENGTH,
        dtype="uint32" if wide else "uint16",
        vocab_size=vocab_size,
        eos=0,
        tokenizer=(TokenizerFile("tokenizer.json", 2, blob_root(b"{}").hex()),),
        train=tuple(shards["train"]),
        heldout=tuple(shards["heldout"]),
    )
    (path / "index.json").write_bytes(index.encode())
    return rows


@pytest.mark.parametrize("vocab_size", [1000, 2**16, 2**16 + 1, 200_000])
def test_random_access(tmp_path: Path, vocab_size: int) -> None:
    rows = write_store(tmp_path, vocab_size=vocab_size)
    store = TokenStore.open(tmp_path)
    wanted = np.random.default_rng(4).integers(0, 100, 300)
    found = store.train.batch(wanted)
    assert found.dtype == np.int64
    assert np.array_equal(found, rows[wanted])
    assert (len(store.train), len(store.heldout)) == (100, 7)
    assert store.train.batch([]).shape == (0, LENGTH)


@pytest.mark.parametrize("index", [-1, 100])
def test_outside_the_split(tmp_path: Path, index: int) -> None:
    write_store(tmp_path)
    with pytest.raises(IndexError, match="split of 100"):
        TokenStore.open(tmp_path).train.batch([5, index])


def test_root_is_that_of_the_index_file(tmp_path: Path) -> None:
    write_store(tmp_path)
    store = TokenStore.open(tmp_path)
    assert store.root == digest("store", (tmp_path / "index.json").read_bytes())
    assert TokenStore.open(tmp_path, store.root).root == store.root
    for shard in store.index.train + store.index.heldout:
        assert blob_root((tmp_path / shard.file).read_bytes()).hex() == shard.root


def test_another_root_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path)
    with pytest.raises(PsycheError, match=rf"root {TokenStore.open(tmp_path).root.hex()}, the run is fixed to 0000"):
        TokenStore.open(tmp_path, bytes(32))


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(PsycheError, match=r"no token store at .* run `psyche data prepare` first"):
        TokenStore.open(tmp_path / "nowhere")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (flip_bit, r"is corrupt \(expected hash [0-9a-f]{64}, found [0-9a-f]{64}\): delete it and run"),
        (lambda path: os.truncate(path, 100), "is corrupt"),
        (lambda path: os.truncate(path, 0), "is empty"),
        (Path.unlink, "is missing"),
    ],
)
def test_a_bad_shard_is_named_when_it_is_needed_and_not_before(tmp_path: Path, harm, reason: str) -> None:
    rows = write_store(tmp_path)
    harm(tmp_path / "train-00003.bin")
    store = TokenStore.open(tmp_path)
    assert np.array_equal(store.train.batch(range(30)), rows[:30])
    for use in (lambda: store.train.batch([30]), store.verify):
        with pytest.raises(PsycheError, match=rf"train-00003\.bin {reason}"):
            use()


def test_verify_names_every_file(tmp_path: Path) -> None:
    write_store(tmp_path)
    sound: list[Path] = []
    TokenStore.open(tmp_path).verify(sound.append)
    files = {path for path in tmp_path.rglob("*") if path.is_file()} - {tmp_path / "index.json"}
    assert set(sound) == files
    assert len(sound) == len(files)


def test_an_altered_tokenizer_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path)
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("[]")
    with pytest.raises(PsycheError, match=r"tokenizer\.json is corrupt"):
        _ = TokenStore.open(tmp_path).tokenizer_path


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    """A hash proves who wrote a shard, not that an embedding has a row for each of its tokens."""
    write_store(tmp_path, vocab_size=1000)
    index = msgspec.structs.replace(TokenStore.open(tmp_path).index, vocab_size=900)
    (tmp_path / "index.json").write_bytes(index.encode())
    with pytest.raises(PsycheError, match="in a vocabulary of 900"):
        TokenStore.open(tmp_path).train.batch(range(100))


def test_a_deleted_shard_is_made_again(data: Data, tmp_path: Path) -> None:
    first = prepare(data, tmp_path, vocab_limit=400)
    kept = first.train.batch(range(len(first.train)))
    (first.path / "train-00000.bin").unlink()
    again = prepare(data, tmp_path, vocab_limit=400)
    assert again.root == first.root
    assert np.array_equal(again.train.batch(range(len(again.train))), kept)


def test_a_store_can_be_copied(tmp_path: Path) -> None:
    rows = write_store(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    root = TokenStore.open(tmp_path / "a").root
    assert np.array_equal(TokenStore.open(tmp_path / "b", root).train.batch([99]), rows[99:])


# ------------------------------------------------------------------------------------------- index

SHARD = Shard("train-00000.bin", 2, 64, "0" * 64)
INDEX = Index(2, LENGTH, "uint16", 1000, 0, (TokenizerFile("tokenizer.json", 2, "1" * 64),), (SHARD,), ())


@pytest.mark.parametrize(
    "change",
    [
        {"format": 1},
        {"packing": "stack"},
        {"sequence_length": 0},
        {"dtype": "uint32"},
        {"dtype": "float64"},
        {"vocab_size": 2**40},
        {"eos": 1000},
        {"heldout": (SHARD,)},
        {"train": (msgspec.structs.replace(SHARD, file="../../etc/passwd"),)},
        {"train": (msgspec.structs.replace(SHARD, file="/etc/passwd"),)},
        {"train": (msgspec.structs.replace(SHARD, file=".."),)},
        {"train": (msgspec.structs.replace(SHARD, file="a\n"),)},
        {"train": (msgspec.structs.replace(SHARD, sequences=3),)},
        {"train": (msgspec.structs.replace(SHARD, sequences=-2, bytes=-64),)},
        {"train": (msgspec.structs.replace(SHARD, root="0" * 63),)},
        {"tokenizer": (TokenizerFile("a/../../b", 2, "1" * 64),)},
        {"train": (SHARD, Shard("train-00001.bin", 3, 96, "0" * 64))},
        {"train": (SHARD, Shard("train-00001.bin", 1, 32, "0" * 64), Shard("train-00002.bin", 1, 32, "0" * 64))},
    ],
)
def test_a_malformed_index_is_refused(change: dict) -> None:
    decode_index(INDEX.encode(), "index.json")
    with pytest.raises(PsycheError, match=r"^index\.json is not the index of a token store \("):
        decode_index(msgspec.structs.replace(INDEX, **change).encode(), "index.json")


def test_only_the_canonical_form_is_read() -> None:
    content = INDEX.encode()
    for other in (content + b" ", content.replace(b",", b", ", 1), content[:-1] + b',"more":1}', content[:-1], b""):
        with pytest.raises(PsycheError, match="not the index"):
            decode_index(other, "index.json")


@given(st.binary(max_size=200))
def test_no_bytes_crash_the_reader(content: bytes) -> None:
    with pytest.raises(PsycheError):
        decode_index(content, "index.json")


# -------------------------------------------------------------------------------------------- path


def test_each_recipe_has_its_own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    recipes = [
        Data(),
        Data(sequence_length=128),
        Data(source=TextSource(kind="text", paths=("x.txt",))),
        Data(source=HubSource(kind="dataset", path="json", data_files="x.jsonl")),
        Data(tokenizer=NamedTokenizer(kind="pretrained", name="gpt2")),
    ]
    monkeypatch.chdir(tmp_path / "here")
    here = [store_path(tmp_path, data) for data in recipes]
    assert len(set(here)) == len(recipes)
    assert here == [store_path(tmp_path, data) for data in recipes]
    monkeypatch.chdir(tmp_path / "there")  # the same words mean other files there
    there = [store_path(tmp_path, data) for data in recipes]
    assert [a == b for a, b in zip(here, there, strict=True)] == [True, True, False, False, True]

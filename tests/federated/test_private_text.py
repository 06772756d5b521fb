"""A node's own text: read, encoded as the run's is, and kept from everybody else."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from psyche.config import BpeTokenizer, Data, TextSource
from psyche.data.prepare import prepare
from psyche.data.token_store import TokenStore
from psyche.data.tokenizer import Encoder
from psyche.errors import PsycheError
from psyche.federated.private_text import TOKENS, PrivateText, prepare_private

LENGTH = 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    directory = tmp_path_factory.mktemp("public")
    for number in range(40):
        (directory / f"{number}.txt").write_text(f"public text number {number}, which anybody may read. " * 20)
    source = TextSource(kind="text", paths=(str(directory),))
    data = Data(source=source, tokenizer=BpeTokenizer(vocab_size=300), sequence_length=LENGTH, heldout_fraction=0.3)
    return prepare(data, directory / "cache", vocab_limit=300)


def texts(directory: Path) -> list[str]:
    directory.mkdir(exist_ok=True)
    found = [f"secret number {number}, of nobody's business; " * 5 for number in range(7)]
    (directory / "a.txt").write_text(found[0])
    (directory / "sub").mkdir(exist_ok=True)
    (directory / "sub" / "b.md").write_text(found[1])
    (directory / "c.jsonl").write_text("".join(json.dumps({"id": 1, "text": one}) + "\n" for one in found[2:]))
    (directory / ".hidden").write_text("not this")
    return [found[0], *found[2:], found[1]]


def test_it_is_packed_as_the_runs_own_text_is(tmp_path: Path, store: TokenStore) -> None:
    wanted = texts(tmp_path / "own")
    found = prepare_private(tmp_path / "own", tmp_path / "node", store.index, store.tokenizer_path)
    stream = [token for ids in Encoder.load(store.tokenizer_path).encode(wanted) for token in ids]
    assert len(found) == len(stream) // LENGTH
    rows = {tuple(stream[at : at + LENGTH]) for at in range(0, len(found) * LENGTH, LENGTH)}
    assert {tuple(row) for row in found.batch(len(found)).tolist()} == rows
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o700


def test_where_the_runs_documents_are_padded_so_are_its_own(tmp_path: Path, store: TokenStore) -> None:
    wanted = texts(tmp_path / "own")
    index = msgspec.structs.replace(store.index, packing="pad")
    found = prepare_private(tmp_path / "own", tmp_path / "node", index, store.tokenizer_path)
    encoded = Encoder.load(store.tokenizer_path).encode(wanted)
    assert len(found) == sum(-(-(len(ids) - 1) // LENGTH) for ids in encoded)
    rows = found.batch(len(found))
    ends = [row.tolist().index(store.index.eos) for row in rows if store.index.eos in row]
    assert len(ends) >= len(wanted) - 1, "each document's end"
    assert all(
        (row[row.tolist().index(store.index.eos) :] == store.index.eos).all() for row in rows if store.index.eos in row
    )


def test_a_directory_that_was_there_and_open_is_closed(tmp_path: Path, store: TokenStore) -> None:
    texts(tmp_path / "own")
    (tmp_path / "node").mkdir(mode=0o755)
    prepare_private(tmp_path / "own", tmp_path / "node", store.index, store.tokenizer_path)
    assert (tmp_path / "node").stat().st_mode & 0o777 == 0o700


def test_it_is_encoded_again_only_where_it_changed(tmp_path: Path, store: TokenStore) -> None:
    texts(tmp_path / "own")

    def prepared() -> tuple[int, int]:
        found = prepare_private(tmp_path / "own", tmp_path / "node", store.index, store.tokenizer_path)
        return len(found), (tmp_path / "node" / TOKENS).stat().st_ino

    first = prepared()
    assert prepared() == first
    (tmp_path / "own" / "more.txt").write_text("another secret, a long one; " * 40)
    assert prepared()[0] > first[0]


def test_each_sequence_comes_once_before_any_comes_again_in_an_order_of_its_own() -> None:
    sequences = np.arange(60, dtype=np.uint16).reshape(30, 2)
    drawn = [PrivateText(sequences).batch(90)[:, 0] // 2 for _ in range(2)]
    for order in drawn:
        for at in range(0, 90, 30):
            assert sorted(order[at : at + 30]) == list(range(30))
    assert drawn[0].tolist() != drawn[1].tolist(), "no seed that anybody knows"
    assert PrivateText(sequences[:1]).batch(3).tolist() == [[0, 1]] * 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"secret \xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "fine, a secret"}\n{"text": secret}\n', "line 2 of "),
        ("a.jsonl", b'{"content": "secret"}\n', "line 1 of "),
        ("a.txt", b"secret", "does not fill one sequence"),
        (".a.txt", b"secret", "contains no file"),
    ],
)
def test_what_cannot_be_read_is_named_and_not_quoted(
    tmp_path: Path, store: TokenStore, name: str, content: bytes, said: str
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / name).write_bytes(content)
    with pytest.raises(PsycheError, match=said) as raised:
        prepare_private(tmp_path / "own", tmp_path / "node", store.index, store.tokenizer_path)
    assert "secret" not in str(raised.value)


def test_a_directory_that_is_none_is_refused(tmp_path: Path, store: TokenStore) -> None:
    with pytest.raises(PsycheError, match="is not a directory"):
        prepare_private(tmp_path / "nowhere", tmp_path / "node", store.index, store.tokenizer_path)

"""Sources: which documents, in which order, and what is said when there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from psyche.config import Data, Filter, HubSource, StdlibSource, TextSource
from psyche.data import sources
from psyche.data.prepare import prepare
from psyche.data.sources import documents
from psyche.errors import PsycheError


def text(*paths: Path | str) -> TextSource:
    return TextSource(kind="text", paths=tuple(map(str, paths)))


def hub(path: str, files: Path | str, **more: str) -> HubSource:
    return HubSource(kind="dataset", path=path, data_files=str(files), **more)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b.txt", "a/z.md", "a/b/c.txt", "a-b.txt", ".git/config", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "empty.txt").touch()
    return tmp_path


def test_a_directory_is_read_in_sorted_order_without_hidden_files(tree: Path) -> None:
    assert list(documents(text(tree), None)) == ["a-b.txt", "a/b/c.txt", "a/z.md", "b.txt"]
    assert list(documents(text(tree), 2)) == ["a-b.txt", "a/b/c.txt"]


def test_paths_keep_their_order_and_no_file_is_read_twice(tree: Path) -> None:
    found = list(documents(text(tree / "b.txt", f"{tree}/**/*.txt", tree / "a"), None))
    assert found == ["b.txt", "a-b.txt", "a/b/c.txt", "a/z.md"]


def test_line_ends_are_kept(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\r")
    assert list(documents(text(tmp_path / "dos.txt"), None)) == ["a\r\nb\r"]


@pytest.mark.parametrize("missing", ["nothing.txt", "*.rst", "hollow"])
def test_what_matches_nothing_is_named(tree: Path, missing: str) -> None:
    (tree / "hollow").mkdir()
    with pytest.raises(PsycheError, match=r"data\.source\.paths: no file matches"):
        list(documents(text(tree / "b.txt", tree / missing), None))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(PsycheError, match=r"image\.png is not UTF-8 text \(byte 0\)"):
        list(documents(text(tmp_path), None))


def test_a_file_too_large_for_one_document_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_FILE_BYTES", 10)
    (tmp_path / "book.txt").write_text("eleven byte")
    with pytest.raises(PsycheError, match=r"book\.txt is one document .*kind: dataset, path: text"):
        list(documents(text(tmp_path), None))


def test_standard_library_is_the_same_every_time() -> None:
    first = list(documents(StdlibSource(), 50))
    assert first == list(documents(StdlibSource(), 50))
    assert len(first) == 50
    assert all(first)


ROWS = [{"text": f"document {number} " * 9, "id": number} for number in range(60)]


def write_rows(path: Path) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in ROWS))
        case ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        case ".csv":
            path.write_text("text,id\n" + "\n".join(f"{row['text']},{row['id']}" for row in ROWS))
        case ".txt":
            path.write_text("\n".join(str(row["text"]) for row in ROWS))
    return path


@pytest.mark.parametrize(
    ("builder", "suffix"), [("json", "jsonl"), ("parquet", "parquet"), ("csv", "csv"), ("text", "txt")]
)
def test_local_datasets(tmp_path: Path, builder: str, suffix: str) -> None:
    source = hub(builder, write_rows(tmp_path / f"rows.{suffix}"))
    assert list(documents(source, None)) == [row["text"] for row in ROWS]
    assert list(documents(source, 3)) == [row["text"] for row in ROWS[:3]]


def test_a_dataset_becomes_a_store(tmp_path: Path) -> None:
    source = hub("json", write_rows(tmp_path / "rows.jsonl"))
    store = prepare(Data(source=source, heldout_fraction=0.3, sequence_length=16), tmp_path, vocab_limit=4096)
    assert len(store.train) > len(store.heldout) > 0


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": ""}\n{"text": "two"}\n')
    assert list(documents(hub("json", tmp_path / "rows.jsonl"), None)) == ["one", "two"]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"text_column": "body"}, "column 'body' of json is not there; its columns are id, text"),
        ({"text_column": "id"}, "column 'id' of json holds int, not text"),
        ({"split": "verse"}, "split verse.* cannot be read"),
    ],
)
def test_a_wrong_field_is_named(tmp_path: Path, more: dict[str, str], reason: str) -> None:
    with pytest.raises(PsycheError, match=reason):
        list(documents(hub("json", write_rows(tmp_path / "rows.jsonl"), **more), None))


def test_several_files_in_their_order(tmp_path: Path) -> None:
    files = [str(write_rows(tmp_path / f"{name}.jsonl")) for name in "ba"]
    found = list(documents(HubSource(kind="dataset", path="json", data_files=tuple(files)), None))
    assert found == [row["text"] for row in ROWS] * 2


def test_a_directory_of_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write_rows(tmp_path / "sub" / "rows.jsonl")
    source = HubSource(kind="dataset", path="json", data_dir=str(tmp_path / "sub"))
    assert list(documents(source, None)) == [row["text"] for row in ROWS]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train[10:20]", ROWS[10:20]), ("train[55:]", ROWS[55:]), ("train[:5]", ROWS[:5]), ("train[7:3]", [])],
)
def test_a_slice_of_a_split(tmp_path: Path, split: str, expected: list[dict[str, object]]) -> None:
    source = hub("json", write_rows(tmp_path / "rows.jsonl"), split=split)
    assert list(documents(source, None)) == [row["text"] for row in expected]


@pytest.mark.parametrize("split", ["train[:10%]", "train[-5:]", "train+test", ""])
def test_what_cannot_be_streamed_is_no_split(split: str) -> None:
    with pytest.raises(ValidationError, match="split"):
        HubSource(kind="dataset", path="json", split=split)


FILTERED = [
    {"text": "zero", "id": 0, "lang": "en", "tags": ["a"]},
    {"text": "one", "id": 1, "lang": "de", "tags": []},
    {"text": "three", "id": 3, "lang": None, "tags": ["a", "b"]},
    {"text": "four", "id": 4, "lang": "fr", "tags": None},
]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([("id", "==", 1)], "one"),
        ([("id", "!=", 1)], "zero three four"),
        ([("id", "<", 3)], "zero one"),
        ([("id", "<=", 3)], "zero one three"),
        ([("id", ">", 0.5), ("id", "<", 4)], "one three"),
        ([("id", ">=", 3)], "three four"),
        ([("lang", "in", ["en", "fr"])], "zero four"),
        ([("lang", "not in", ["en"])], "one four"),  # no value passes no filter
        ([("text", "min_length", 4)], "zero three four"),
        ([("tags", "max_length", 1)], "zero one"),
    ],
)
def test_filters(tmp_path: Path, filters: list[tuple[str, str, object]], expected: str) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, FILTERED)))
    conditions = [{"column": column, "op": op, "value": value} for column, op, value in filters]
    tree = {"kind": "dataset", "path": "json", "data_files": str(tmp_path / "rows.jsonl"), "filters": conditions}
    assert list(documents(HubSource.model_validate(tree), None)) == expected.split()


@pytest.mark.parametrize(
    ("condition", "reason"),
    [
        (Filter(column="language", op="==", value="en"), "no column 'language'; the columns are id, text"),
        (Filter(column="text", op="<", value=3), "column 'text' holds str, to which '<' 3 does not apply"),
        (Filter(column="id", op="min_length", value=3), "column 'id' holds int"),
    ],
)
def test_a_filter_that_does_not_fit_is_named(tmp_path: Path, condition: Filter, reason: str) -> None:
    source = HubSource(
        kind="dataset", path="json", data_files=str(write_rows(tmp_path / "rows.jsonl")), filters=(condition,)
    )
    with pytest.raises(PsycheError, match=reason):
        list(documents(source, None))


@pytest.mark.parametrize(("op", "value"), [("in", "en"), ("==", ["en"]), ("min_length", "3"), ("~", 1), ("in", [])])
def test_a_filter_without_sense_is_refused(op: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Filter.model_validate({"column": "x", "op": op, "value": value})


def test_a_dataset_that_is_not_there_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(PsycheError, match=r"nowhere\.jsonl.* cannot be read"):
        list(documents(hub("json", tmp_path / "nowhere.jsonl"), None))
    (tmp_path / "broken.jsonl").write_text('{"text": "one"}\n{"text": ')
    with pytest.raises(PsycheError, match=r"broken\.jsonl.* cannot be read"):
        list(documents(hub("json", tmp_path / "broken.jsonl"), None))

"""Preparation: what goes in comes out, on one side of the split, to the same bytes, whatever dies on the way."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from psyche.config import BpeTokenizer, Data, StdlibSource, TextSource
from psyche.data import encoding
from psyche.data.encoding import document_hash
from psyche.data.prepare import Progress, is_heldout, prepare
from psyche.data.token_store import TokenStore, store_path
from psyche.durable import disk_errors
from psyche.errors import PsycheError
from tests.data.dying import endings
from tests.data.stores import decoded, staged

Spawn = Callable[..., "subprocess.Popen[str]"]


def read_documents(corpus: Path) -> list[str]:
    return [path.read_bytes().decode() for path in sorted(corpus.iterdir())]


def encoded(store: TokenStore, texts: list[str], fraction: float, heldout: bool) -> list[list[int]]:
    """The documents of a split, by another way: encoded one at a time."""
    tokenizer = Tokenizer.from_file(str(store.tokenizer_path / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    side = [text for text in texts if is_heldout(document_hash(text), fraction) == heldout]
    return [[*tokenizer.encode(text).ids, store.index.eos] for text in side]


def check(store: TokenStore, texts: list[str], fraction: float) -> None:
    """Every token is there, in order, but for less than a sequence at the end; no document is on both sides."""
    for name, heldout in (("train", False), ("heldout", True)):
        expected = [token for document in encoded(store, texts, fraction, heldout) for token in document]
        rows = staged(store, name)
        assert len(rows) == len(expected) // store.sequence_length
        assert rows.ravel().tolist() == expected[: rows.size]
    train, heldout_texts = decoded(store, "train"), decoded(store, "heldout")
    assert set(train).isdisjoint(heldout_texts)
    assert set(train) | set(heldout_texts) <= set(texts)


def test_every_token_is_there_in_order(data: Data, corpus: Path, tmp_path: Path) -> None:
    store = prepare(data, tmp_path, vocab_limit=400, shard_bytes=4096)
    assert len(store.train.shards) > 3
    check(store, read_documents(corpus), data.heldout_fraction)
    assert 0.1 < len(store.heldout) / (len(store.heldout) + len(store.train)) < 0.3


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=60), min_size=1, max_size=30),
    st.integers(8, 40),
    st.sampled_from([1, 64, 1000]),
)
def test_any_text_survives(texts: list[str], length: int, shard_bytes: int) -> None:
    """Also control characters, copies, and text that spells the end of a document."""
    texts = [*texts, *texts[::-1], *(f"plain document {n} <|endoftext|>" * 3 for n in range(12))]
    with tempfile.TemporaryDirectory() as directory:
        corpus = Path(directory) / "corpus"
        corpus.mkdir()
        for number, text in enumerate(texts):
            (corpus / f"{number:04d}").write_bytes(text.encode())
        data = Data(
            source=TextSource(kind="text", paths=(str(corpus),)),
            tokenizer=BpeTokenizer(vocab_size=270),
            sequence_length=length,
            heldout_fraction=0.5,
        )
        check(prepare(data, Path(directory), vocab_limit=300, shard_bytes=shard_bytes), texts, 0.5)


def test_same_corpus_same_root(data: Data, corpus: Path, tmp_path: Path) -> None:
    first = prepare(data, tmp_path / "a", vocab_limit=400)
    moved = corpus.rename(tmp_path / "elsewhere")
    again = data.model_copy(update={"source": TextSource(kind="text", paths=(str(moved),))})
    assert prepare(again, tmp_path / "b", vocab_limit=400).root == first.root
    longer = data.model_copy(update={"source": again.source, "sequence_length": 64})
    assert prepare(longer, tmp_path / "b", vocab_limit=400).root != first.root


def test_root_does_not_depend_on_how_text_is_batched(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(data, tmp_path / "a", vocab_limit=400)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 1)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert prepare(data, tmp_path / "b", vocab_limit=400).root == first.root


def test_second_run_reads_no_document(data: Data, corpus: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    first = prepare(data, tmp_path, vocab_limit=400, progress=seen.append)
    last = {at.stage: (at.done, at.total) for at in seen}
    sequences = len(first.train) + len(first.heldout)
    assert last.pop("merges") == (0, None)
    assert last == {"tokenizer": (120, None), "tokens": (120, 120), "shuffle": (sequences, sequences)}
    assert not (first.path / "staging").exists()
    for path in corpus.iterdir():
        path.unlink()
    seen.clear()
    assert prepare(data, tmp_path, vocab_limit=400, progress=seen.append).root == first.root
    assert not seen


def test_max_documents(data: Data, corpus: Path, tmp_path: Path) -> None:
    store = prepare(data.model_copy(update={"max_documents": 40}), tmp_path, vocab_limit=400)
    check(store, read_documents(corpus)[:40], data.heldout_fraction)


def test_vocabulary_larger_than_the_model_is_refused(data: Data, tmp_path: Path) -> None:
    with pytest.raises(PsycheError, match=r"400 tokens.*399.*model\.settings\.vocab_size"):
        prepare(data, tmp_path, vocab_limit=399)
    prepare(data, tmp_path, vocab_limit=400)


def test_one_document_cannot_fill_two_splits(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("all there is " * 100)
    data = Data(source=TextSource(kind="text", paths=(str(tmp_path / "one.txt"),)), sequence_length=8)
    with pytest.raises(PsycheError, match="split is empty: provide more or smaller documents"):
        prepare(data, tmp_path / "cache", vocab_limit=4096)


def test_standard_library(tmp_path: Path) -> None:
    data = Data(source=StdlibSource(), tokenizer=BpeTokenizer(vocab_size=512), max_documents=60, sequence_length=128)
    store = prepare(data, tmp_path, vocab_limit=512)
    assert store.vocab_size == 512
    assert any(text.startswith('"""') for text in decoded(store, "train"))


def test_padded_sequences_hold_one_document_each(data: Data, corpus: Path, tmp_path: Path) -> None:
    store = prepare(data.model_copy(update={"packing": "pad"}), tmp_path, vocab_limit=400, shard_bytes=4096)
    assert store.index.pad == store.index.eos
    for name, heldout in (("train", False), ("heldout", True)):
        expected = []
        for document in encoded(store, read_documents(corpus), data.heldout_fraction, heldout):
            pieces = [document[at : at + 32] for at in range(0, len(document) - 1, 32)]
            expected += [[*piece, *[store.index.eos] * (32 - len(piece))] for piece in pieces]
        assert staged(store, name).tolist() == expected


# --------------------------------------------------------------------------------------- what dies


def test_killed_at_every_kind_of_moment_then_resumed(data: Data, tmp_path: Path) -> None:
    """SIGKILL just before chosen fsyncs and replaces, again and again on the same directory, then once to the end."""
    (whole,) = endings(data, tmp_path / "whole", [0])
    moments = [1, 3, 5, 2, 8, 13, *random.Random(4).sample(range(1, whole.calls), 6)]
    *killed, last = endings(data, tmp_path / "killed", [*moments, 0])
    assert {one.signal for one in killed[:6]} == {signal.SIGKILL}
    assert {one.signal for one in killed} <= {signal.SIGKILL, 0}  # 0: less was left to do than that many calls
    assert last.root == whole.root
    TokenStore.open(store_path(tmp_path / "killed", data), bytes.fromhex(whole.root)).verify()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_moment_then_resumed(data: Data, tmp_path: Path) -> None:
    """SIGKILL just before the n-th time that the disk changes for good, for every n; each time the same store."""
    few = data.model_copy(update={"max_documents": 30})
    (whole,) = endings(few, tmp_path / "whole", [0])
    assert whole.calls > 30
    deaths = [die_at for moment in range(1, whole.calls + 1) for die_at in (moment, 0)]
    found = endings(few, tmp_path / "killed", deaths, fresh=True)
    for moment, (killed, resumed) in enumerate(zip(found[::2], found[1::2], strict=True), 1):
        assert killed.signal == signal.SIGKILL, moment
        assert (resumed.signal, resumed.root) == (0, whole.root), moment


def test_killed_at_random_times_then_resumed(data: Data, tmp_path: Path, spawn: Spawn) -> None:
    root = prepare(data, tmp_path / "whole", vocab_limit=400, shard_bytes=4096).root
    waits = random.Random(5)
    for _ in range(3):
        child = spawn(data, tmp_path / "killed")
        assert child.stdout is not None
        for _ in range(waits.randint(1, 120)):  # lines of progress: a clock that loads no machine
            child.stdout.readline()
        child.kill()
        child.communicate()
    assert prepare(data, tmp_path / "killed", vocab_limit=400, shard_bytes=4096).root == root


def half_done(data: Data, cache: Path, spawn: Spawn) -> Path:
    """A preparation killed when some documents were encoded and journalled."""
    child = spawn(data, cache, die_at=40)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    path = store_path(cache, data)
    journal = json.loads((path / "staging" / "journal.json").read_bytes())
    assert journal["documents"] > 0
    assert not journal["encoded"]
    return path


def documents_read(seen: list[Progress]) -> int:
    return sum(at.stage in ("tokenizer", "tokens") for at in seen)


def test_encoded_documents_are_not_encoded_again(data: Data, tmp_path: Path, spawn: Spawn) -> None:
    path = half_done(data, tmp_path, spawn)
    done = json.loads((path / "staging" / "journal.json").read_bytes())["documents"]
    seen: list[Progress] = []
    prepare(data, tmp_path, vocab_limit=400, shard_bytes=4096, progress=seen.append)
    assert (seen[0].stage, seen[0].done) == ("tokens", done + 1)
    assert documents_read(seen) == 120 - done


def test_finished_shards_are_not_made_again(data: Data, corpus: Path, tmp_path: Path, spawn: Spawn) -> None:
    """Nor is the source needed once all is encoded."""
    child = spawn(data, tmp_path)
    out, _ = child.communicate()
    root, calls = out.split()[-2:]
    shutil.rmtree(store_path(tmp_path, data))
    child = spawn(data, tmp_path, die_at=int(calls) - 10)
    child.communicate()
    shutil.rmtree(corpus)
    path = store_path(tmp_path, data)
    before = (path / "train-00000.bin").stat()
    seen: list[Progress] = []
    store = prepare(data, tmp_path, vocab_limit=400, shard_bytes=4096, progress=seen.append)
    after = (path / "train-00000.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert store.root.hex() == root
    assert documents_read(seen) == 0


@pytest.mark.parametrize("harm", ["source", "tokens", "tokenizer", "journal"])
def test_what_cannot_be_resumed_starts_over(data: Data, corpus: Path, tmp_path: Path, spawn: Spawn, harm: str) -> None:
    path = half_done(data, tmp_path / "killed", spawn)
    match harm:
        case "source":
            (corpus / "000.txt").write_text("another text")
        case "tokens":
            os.truncate(path / "staging" / "train", 100)
        case "tokenizer":
            (path / "tokenizer" / "tokenizer.json").write_text("{}")
        case "journal":
            os.truncate(path / "staging" / "journal.json", 100)
    fresh = prepare(data, tmp_path / "fresh", vocab_limit=400, shard_bytes=4096)
    again = prepare(data, tmp_path / "killed", vocab_limit=400, shard_bytes=4096)
    assert again.root == fresh.root
    again.verify()


def test_two_processes_at_once(data: Data, tmp_path: Path, spawn: Spawn) -> None:
    children = [spawn(data, tmp_path) for _ in range(2)]
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    roots = {out.split()[-2] for out, _ in outputs}
    assert len(roots) == 1
    TokenStore.open(store_path(tmp_path, data), bytes.fromhex(roots.pop())).verify()


def test_waiting_is_said(data: Data, tmp_path: Path, spawn: Spawn) -> None:
    path = store_path(tmp_path, data)
    path.parent.mkdir(parents=True)
    with FileLock(f"{path}.lock"):
        child = spawn(data, tmp_path)
        assert child.stdout is not None
        assert child.stdout.readline().split()[0] == "waiting"
    child.communicate()
    assert child.returncode == 0


# ------------------------------------------------------------------------------------ what is full


def test_full_disk_is_named_and_mended(data: Data, tmp_path: Path, spawn: Spawn) -> None:
    """The kernel refuses to let a file grow past 30 kB; with the limit lifted, preparation goes on."""
    child = spawn(data, tmp_path / "full", shard_bytes=1 << 20, file_limit=30_000)
    _, error = child.communicate()
    assert child.returncode == 1, error
    assert re.search(r"^no space left for .* mounted at /.*: free disk space and run the command again", error)
    root = prepare(data, tmp_path / "roomy", vocab_limit=400).root
    assert prepare(data, tmp_path / "full", vocab_limit=400).root == root


def test_a_full_device_is_recognised(tmp_path: Path) -> None:
    def write() -> None:
        with disk_errors(tmp_path), open("/dev/full", "wb", buffering=0) as device:
            device.write(b"x")

    with pytest.raises(PsycheError, match=r"no space left for .*No space left on device.*MiB free"):
        write()


def test_unwritable_cache_is_named(data: Data, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(PsycheError, match=r"cannot write .*cache.*choose another directory with node\.cache"):
        prepare(data, tmp_path / "cache", vocab_limit=400)

"""Measure what it costs to prepare a corpus, and how fast its sequences are read beside a plain memory map."""

from __future__ import annotations

import json
import multiprocessing
import os
import string
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from psyche.bench.harness.resource_usage import peaks
from psyche.bench.harness.rows import Row, run_bench
from psyche.bench.harness.turns import say, take_turns
from psyche.config import BpeTokenizer, Data, HubSource, StdlibSource
from psyche.data.index import DTYPES
from psyche.data.prepare import prepare
from psyche.data.sources import documents
from psyche.data.token_store import TokenStore

VOCABULARY = 8192
BATCHES = 50
"""Batches that each way reads."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    text_bytes: int = 100_000_000
    sequence_length: int = 1024
    batch: int = 64
    """Sequences read at once."""


class PreparedRow(Row, frozen=True):
    """A corpus prepared by a process of its own."""

    text_bytes: int
    tokens: int
    seconds: float
    peak_bytes: int
    """Peak resident memory, libraries included."""


class ReadingRow(Row, frozen=True):
    """Random batches from the page cache, read one way."""

    way: str
    disk_gbps: float
    """1e9 bytes per second of tokens as stored on disk, for the median batch."""
    memory_gbps: float
    """The same for the int64 values returned."""


def main(json_file: Path | None, plan: Plan) -> None:
    """Run ``psyche bench data``. Raises ``PsycheError``."""
    run_bench(json_file, lambda: measure(plan), list, show)


def measure(plan: Plan) -> list[PreparedRow | ReadingRow]:
    """Write text, prepare it, and read it. Raises ``PsycheError``."""
    with tempfile.TemporaryDirectory(prefix="psyche-bench-") as name:
        directory = Path(name)
        say(f"writing {plan.text_bytes / 1e6:,.0f} MB of text, then preparing it")
        data = _corpus(directory / "text.jsonl", plan)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context) as process:  # its own process, for its own peak memory
            path, prepared = process.submit(_prepare, data, directory, plan.text_bytes).result()
        return [prepared, *_read(TokenStore.open(path), directory / "plain", plan.batch)]


def _corpus(path: Path, plan: Plan) -> Data:
    """Write the standard library repeatedly, with shifted letters each time, so that words do not repeat."""
    with path.open("w") as file:
        for text in _texts():
            file.write(json.dumps({"text": text}) + "\n")
            if file.tell() >= plan.text_bytes:
                break
    return Data(
        source=HubSource(kind="dataset", path="json", data_files=str(path)),
        tokenizer=BpeTokenizer(vocab_size=VOCABULARY),
        sequence_length=plan.sequence_length,
    )


def _texts() -> Iterator[str]:
    letters = string.ascii_lowercase
    for turn in count():
        moved = str.maketrans(letters, letters[turn % 26 :] + letters[: turn % 26])
        for text in documents(StdlibSource(), None):
            yield f"{turn}\n{text.translate(moved)}"


def _prepare(data: Data, cache: Path, text_bytes: int) -> tuple[Path, PreparedRow]:
    began = time.perf_counter()
    store = prepare(data, cache, vocab_limit=VOCABULARY)
    seconds = time.perf_counter() - began
    tokens = (len(store.train) + len(store.heldout)) * store.sequence_length
    return store.path, PreparedRow(text_bytes, tokens, seconds, peaks([os.getpid()])[os.getpid()])


def _read(store: TokenStore, plain: Path, size: int) -> list[ReadingRow]:
    """Read the training split through :class:`~psyche.data.token_store.Split`, and as one memory-mapped file."""
    with plain.open("wb") as file:
        for shard in store.index.train:
            file.write((store.path / shard.file).read_bytes())
    mapped = np.memmap(plain, DTYPES[store.index.dtype], mode="r").reshape(-1, store.sequence_length)
    ways: dict[str, Callable[[NDArray[np.int64]], NDArray[np.int64]]] = {
        "psyche": store.train.batch,
        "numpy.memmap, one file": lambda rows: mapped[rows].astype(np.int64),
    }
    store.train.batch(range(0, len(store.train), max(1, len(store.train) // 10_000)))  # shards are hashed at first use

    def timed(way: str, repeat: int) -> float:
        rows = np.random.default_rng(repeat).integers(0, len(store.train), size)
        began = time.perf_counter()
        ways[way](rows)
        return time.perf_counter() - began

    moved = size * store.sequence_length / 1e9
    return [
        ReadingRow(way, moved * mapped.itemsize / median(seconds), moved * 8 / median(seconds))
        for way, seconds in take_turns(list(ways), range(BATCHES), timed).items()
    ]


def show(rows: Sequence[PreparedRow | ReadingRow], console: Console) -> None:
    """Print one line for each number."""
    table = Table(title="Token store", title_justify="left", title_style="bold", show_header=False)
    for row in rows:
        if isinstance(row, ReadingRow):
            speed = f"{row.disk_gbps:.2f} GB/s of tokens on disk, {row.memory_gbps:.2f} GB/s as int64"
            table.add_row(f"random access, {row.way}", speed)
        else:
            table.add_row("text", f"{row.text_bytes / 1e6:,.0f} MB")
            table.add_row("prepared at", f"{row.text_bytes / 1e6 / row.seconds:,.1f} MB/s")
            table.add_row("tokens", f"{row.tokens:,}, {row.tokens / row.seconds:,.0f} per second")
            table.add_row("peak memory", f"{row.peak_bytes / 1e6:,.0f} MB")
    console.print(table)

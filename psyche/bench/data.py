"""What it costs to prepare a corpus, and how fast its sequences are read beside a plain gather of the same rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import string
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from psyche.bench.exchange.gauges import peaks
from psyche.bench.output import require_folder, write_rows
from psyche.bench.section import wide_console
from psyche.config import BpeTokenizer, Data, HubSource, StdlibSource
from psyche.data.index import DTYPES
from psyche.data.prepare import prepare
from psyche.data.sources import documents
from psyche.data.store import TokenStore

VOCABULARY = 8192
BATCHES = 50
"""Read in each way, one after the other, so that both have the same moments."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    text_bytes: int = 100_000_000
    sequence_length: int = 1024
    batch: int = 64
    """Sequences read at once."""


@dataclass(frozen=True)
class Prepared:
    """A corpus prepared by a process of its own."""

    text_bytes: int
    tokens: int
    seconds: float
    peak_bytes: int
    """The most that was resident, libraries included."""


@dataclass(frozen=True)
class Reading:
    """Random batches from the page cache, one way."""

    way: str
    disk_gbps: float
    """1e9 bytes of tokens as they are on the disk, a second; in the median batch."""
    memory_gbps: float
    """The same as the int64 that is handed out."""


def main(json_file: Path | None, plan: Plan) -> None:
    """``psyche bench data``: a table to stdout, rows to ``json_file``. Raises ``PsycheError``."""
    require_folder(json_file)
    with tempfile.TemporaryDirectory(prefix="psyche-bench-") as name:
        directory = Path(name)
        print(f"writing {plan.text_bytes / 1e6:,.0f} MB of text, then preparing it", file=sys.stderr, flush=True)
        data = _corpus(directory / "text.jsonl", plan)
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawned) as process:  # so that its memory is that of the work alone
            path, prepared = process.submit(_prepare, data, directory, plan.text_bytes).result()
        readings = _read(TokenStore.open(path), directory / "plain", plan.batch)
    if json_file is not None:
        write_rows(json_file, [asdict(prepared), *map(asdict, readings)])
    wide_console().print(_table(prepared, readings))


def _corpus(path: Path, plan: Plan) -> Data:
    """The standard library again and again, its letters moved on each time, so that no two words are the same."""
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


def _prepare(data: Data, cache: Path, text_bytes: int) -> tuple[Path, Prepared]:
    began = time.perf_counter()
    store = prepare(data, cache, vocab_limit=VOCABULARY)
    seconds = time.perf_counter() - began
    tokens = (len(store.train) + len(store.heldout)) * store.sequence_length
    return store.path, Prepared(text_bytes, tokens, seconds, peaks([os.getpid()])[os.getpid()])


def _read(store: TokenStore, plain: Path, size: int) -> list[Reading]:
    """The training split through :class:`~psyche.data.store.Split`, and as one memory-mapped file."""
    with plain.open("wb") as file:
        for shard in store.index.train:
            file.write((store.path / shard.file).read_bytes())
    mapped = np.memmap(plain, DTYPES[store.index.dtype], mode="r").reshape(-1, store.sequence_length)
    ways: dict[str, Callable[[NDArray[np.int64]], NDArray[np.int64]]] = {
        "psyche": store.train.batch,
        "numpy.memmap, one file": lambda rows: mapped[rows].astype(np.int64),
    }
    store.train.batch(range(0, len(store.train), max(1, len(store.train) // 10_000)))  # shards are hashed at first use
    draw = np.random.default_rng(0)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(BATCHES):
        rows = draw.integers(0, len(store.train), size)
        for way, read in ways.items():
            began = time.perf_counter()
            read(rows)
            seconds[way].append(time.perf_counter() - began)
    moved = size * store.sequence_length / 1e9
    return [
        Reading(way, moved * mapped.itemsize / median(times), moved * 8 / median(times))
        for way, times in seconds.items()
    ]


def _table(prepared: Prepared, readings: list[Reading]) -> Table:
    table = Table(title="Token store", title_justify="left", title_style="bold", show_header=False)
    rows: list[tuple[str, Any]] = [
        ("text", f"{prepared.text_bytes / 1e6:,.0f} MB"),
        ("prepared at", f"{prepared.text_bytes / 1e6 / prepared.seconds:,.1f} MB/s"),
        ("tokens", f"{prepared.tokens:,}, {prepared.tokens / prepared.seconds:,.0f} a second"),
        ("peak memory", f"{prepared.peak_bytes / 1e6:,.0f} MB"),
    ]
    for reading in readings:
        speed = f"{reading.disk_gbps:.2f} GB/s of tokens on disk, {reading.memory_gbps:.2f} GB/s as int64"
        rows.append((f"random access, {reading.way}", speed))
    for row in rows:
        table.add_row(*row)
    return table

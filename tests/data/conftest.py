"""A small real corpus, and children that prepare it and die on request."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from psyche.config import BpeTokenizer, Data, TextSource

CHILD = """
import resource, sys
from pathlib import Path
from psyche.config import Data
from psyche.data import prepare as module
from psyche.errors import PsycheError
from tests.data.dying import armed, in_little_pieces

in_little_pieces()
data = Data.model_validate_json(sys.argv[1])
cache, shard_bytes, die_at, file_limit = Path(sys.argv[2]), *map(int, sys.argv[3:6])
if file_limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
calls = armed(die_at)
try:
    report = lambda at: print(at.stage, at.done, flush=True)
    store = module.prepare(data, cache, vocab_limit=65536, shard_bytes=shard_bytes, progress=report)
except PsycheError as error:
    sys.exit(str(error))
print(store.root.hex(), calls())
"""

Spawn = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """120 documents of some hundred bytes to some kilobytes, every tenth a copy of an earlier one."""
    words = random.Random(1)
    lexicon = ["".join(words.choices("abcdefghij λé\n", k=words.randint(1, 9))) for _ in range(300)]
    directory = tmp_path / "corpus"
    directory.mkdir()
    texts: list[str] = []
    for number in range(120):
        text = texts[number // 2] if number % 10 == 9 else " ".join(words.choices(lexicon, k=words.randint(20, 900)))
        texts.append(text)
        (directory / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return directory


@pytest.fixture
def data(corpus: Path) -> Data:
    return Data(
        source=TextSource(kind="text", paths=(str(corpus),)),
        tokenizer=BpeTokenizer(vocab_size=400),
        sequence_length=32,
        heldout_fraction=0.2,
    )


@pytest.fixture
def spawn() -> Spawn:
    """Start a child that prepares ``data``; it dies at its ``die_at``-th fsync or replace (0: lives)."""

    def start(
        data: Data, cache: Path, shard_bytes: int = 4096, die_at: int = 0, file_limit: int = 0
    ) -> subprocess.Popen[str]:
        arguments = [data.model_dump_json(), str(cache), str(shard_bytes), str(die_at), str(file_limit)]
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    return start

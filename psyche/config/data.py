"""What a run trains on: sources, tokenizers, and how the token store is made of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from psyche.config.base import Count, Strict


class StdlibSource(Strict):
    """The Python standard library's own source text: a real corpus that every machine has."""

    kind: Literal["stdlib"] = "stdlib"


class TextSource(Strict):
    """Plain text files; ``paths`` are files, directories or glob patterns. One file is one document."""

    kind: Literal["text"]
    paths: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]


class HubSource(Strict):
    """Anything ``datasets.load_dataset(path, name, data_files=…, split=…, streaming=True)`` reads."""

    kind: Literal["dataset"]
    path: str
    name: str | None = None
    split: str = "train"
    text_column: str = "text"
    data_files: str | None = None


class BpeTokenizer(Strict):
    """A byte-level BPE, trained on the corpus itself."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=260)] = 4096


class NamedTokenizer(Strict):
    """A tokenizer that ``transformers.AutoTokenizer.from_pretrained`` loads: a hub name or a directory."""

    kind: Literal["pretrained"]
    name: str


Mirror = Annotated[
    str,
    StringConstraints(
        pattern=r"^(https?|s3|gs|hf)://[A-Za-z0-9._-]+(:\d+)?(/[A-Za-z0-9._~%@=+-]+)*/?$", max_length=512
    ),
]
"""A public place with the files of a token store. Contributors' machines open it: no local files, no chained URLs."""


class Data(Strict):
    """What the run trains on. The token store that comes of it is fixed by hash in the manifest."""

    source: Annotated[StdlibSource | TextSource | HubSource, Field(discriminator="kind")] = StdlibSource()
    tokenizer: Annotated[BpeTokenizer | NamedTokenizer, Field(discriminator="kind")] = BpeTokenizer()
    sequence_length: Annotated[int, Field(ge=8)] = 256
    heldout_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.02
    max_documents: Count | None = None
    mirrors: Annotated[tuple[Mirror, ...], Field(strict=False, max_length=8)] = ()
    """Copies of the prepared store's directory, as fsspec URLs, that nodes fetch shards from before they ask each
    other."""

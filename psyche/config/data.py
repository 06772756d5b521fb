"""What a run trains on: sources, tokenizers, and how the token store is made of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from psyche.config.base import Count, Positive, Strict

SPLIT = r"^(?P<name>[\w.-]+)(\[(?P<start>[0-9]*):(?P<stop>[0-9]*)\])?$"
"""A split's name, with or without a slice of its rows."""

Scalar = str | int | float | bool


class StdlibSource(Strict):
    """The Python standard library's own source text: a real corpus that every machine has."""

    kind: Literal["stdlib"] = "stdlib"


class TextSource(Strict):
    """Plain text files; ``paths`` are files, directories or glob patterns. One file is one document."""

    kind: Literal["text"]
    paths: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]


class Filter(Strict):
    """One condition on a row; ``column op value`` must hold. A row without a value in ``column`` does not pass.

    ``in`` and ``not in`` take a list; ``min_length`` and ``max_length`` compare the length of a text or list.
    """

    column: str
    op: Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in", "min_length", "max_length"]
    value: Scalar | Annotated[tuple[Scalar, ...], Field(min_length=1, strict=False)]

    @model_validator(mode="after")
    def _value_fits(self) -> Filter:
        if isinstance(self.value, tuple) != (self.op in ("in", "not in")):
            raise ValueError(f"{self.op} takes {'a list' if self.op in ('in', 'not in') else 'one value'}")
        if self.op.endswith("_length") and type(self.value) is not int:
            raise ValueError(f"{self.op} takes a whole number")
        return self


class HubSource(Strict):
    """Anything ``datasets.load_dataset(path, name, …, streaming=True)`` reads, on a hub or on this machine."""

    kind: Literal["dataset"]
    path: str
    name: str | None = None
    revision: str | None = None
    """Branch, tag or commit of a hub's dataset; a commit pins it."""
    data_dir: str | None = None
    data_files: str | Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    split: Annotated[str, StringConstraints(pattern=SPLIT)] = "train"
    """A split, or a slice of its rows: ``train``, ``train[1000:]``, ``train[:50000]``. How long a split is is not
    known while it streams, so there are no percentages and no counting from the end."""
    text_column: str = "text"
    filters: Annotated[tuple[Filter, ...], Field(strict=False)] = ()
    """All of them must hold."""


SingleSource = StdlibSource | TextSource | HubSource


class MixturePart(Strict):
    """A source and its weight among the others; only the weights' ratios matter."""

    weight: Positive
    source: Annotated[SingleSource, Field(discriminator="kind")]


class MixtureSource(Strict):
    """Sources mixed so that each has the share of the tokens that its weight says.

    ``stop`` is as in ``datasets.interleave_datasets``: the mixture ends with the first source that has no more
    documents, or when every source was read to its end, those that end earlier from their start again.
    """

    kind: Literal["mixture"]
    parts: Annotated[tuple[MixturePart, ...], Field(min_length=1, max_length=64, strict=False)]
    stop: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"


Source = SingleSource | MixtureSource


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

    source: Annotated[Source, Field(discriminator="kind")] = StdlibSource()
    tokenizer: Annotated[BpeTokenizer | NamedTokenizer, Field(discriminator="kind")] = BpeTokenizer()
    sequence_length: Annotated[int, Field(ge=8)] = 256
    packing: Literal["pack", "pad"] = "pack"
    """``pack``: documents one after the other, cut into sequences. ``pad``: no sequence holds two documents; what
    is left of one is filled up with its end token, on which nothing is learned."""
    heldout_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.02
    max_documents: Count | None = None
    mirrors: Annotated[tuple[Mirror, ...], Field(strict=False, max_length=8)] = ()
    """Copies of the prepared store's directory, as fsspec URLs, that nodes fetch shards from before they ask each
    other."""

"""The ``run.data`` section: sources, tokenizer, and how the token store is made from them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from psyche.config.base import Count, Positive, Strict

SPLIT = r"^(?P<name>[\w.-]+)(\[(?P<start>[0-9]*):(?P<stop>[0-9]*)\])?$"
"""The name of a split, with or without a slice of its rows."""

Scalar = str | int | float | bool


class StdlibSource(Strict):
    """The source code of the Python standard library: a real corpus that every machine has."""

    kind: Literal["stdlib"] = "stdlib"
    """Selects this source."""


class TextSource(Strict):
    """Plain text files on the coordinator's machine; each file is one document."""

    kind: Literal["text"]
    """Selects this source."""
    paths: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    """Files, directories or glob patterns."""


class Filter(Strict):
    """A condition on a row: ``column op value`` must hold. A row without a value in ``column`` is dropped."""

    column: str
    """Column to compare."""
    op: Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in", "min_length", "max_length"]
    """Comparison. ``in`` and ``not in`` take a list; ``min_length`` and ``max_length`` compare the length of a text or
    list."""
    value: Scalar | Annotated[tuple[Scalar, ...], Field(min_length=1, strict=False)]
    """Value, or list of values, to compare with."""

    @model_validator(mode="after")
    def _value_fits(self) -> Filter:
        if isinstance(self.value, tuple) != (self.op in ("in", "not in")):
            raise ValueError(f"{self.op} takes {'a list' if self.op in ('in', 'not in') else 'one value'}")
        if self.op.endswith("_length") and type(self.value) is not int:
            raise ValueError(f"{self.op} takes a whole number")
        return self


class HubSource(Strict):
    """A Hugging Face dataset, read with ``datasets.load_dataset(path, name, …, streaming=True)``."""

    kind: Literal["dataset"]
    """Selects this source."""
    path: str
    """Dataset on the hub, or a local directory or format name, as ``load_dataset`` takes it."""
    name: str | None = None
    """Configuration (subset) of the dataset. Default: the dataset's."""
    revision: str | None = None
    """Branch, tag or commit on the hub; a commit pins the data. Default: the main branch."""
    data_dir: str | None = None
    """Directory within the dataset. Default: all of it."""
    data_files: str | Annotated[tuple[str, ...], Field(min_length=1, strict=False)] | None = None
    """Files within the dataset. Default: all."""
    split: Annotated[str, StringConstraints(pattern=SPLIT)] = "train"
    """A split or a slice of its rows: ``train``, ``train[1000:]``, ``train[:50000]``. Percentages and negative
    indices are not possible, because the length of a streamed split is unknown."""
    text_column: str = "text"
    """Column that holds the text. Default: the name most datasets use."""
    filters: Annotated[tuple[Filter, ...], Field(strict=False)] = ()
    """Conditions on rows, all of which must hold. Default: none."""


SingleSource = StdlibSource | TextSource | HubSource


class MixturePart(Strict):
    """A source of a mixture."""

    weight: Positive
    """Share of the tokens, relative to the other weights."""
    source: Annotated[SingleSource, Field(discriminator="kind")]
    """Any source except a mixture."""


class MixtureSource(Strict):
    """Several sources, mixed by share of tokens."""

    kind: Literal["mixture"]
    """Selects this source."""
    parts: Annotated[tuple[MixturePart, ...], Field(min_length=1, max_length=64, strict=False)]
    """The sources and their weights."""
    stop: Literal["first_exhausted", "all_exhausted"] = "first_exhausted"
    """When the mixture ends, as in ``datasets.interleave_datasets``: with the first source that ends, or once every
    source was read to its end, shorter ones repeatedly. Default: nothing is repeated."""


Source = SingleSource | MixtureSource


class BpeTokenizer(Strict):
    """A byte-level BPE tokenizer, trained on the corpus."""

    kind: Literal["bpe"] = "bpe"
    """Selects this tokenizer."""
    vocab_size: Annotated[int, Field(ge=260)] = 4096
    """Tokens of the vocabulary. Default: for small tests."""


class NamedTokenizer(Strict):
    """An existing tokenizer, loaded with ``transformers.AutoTokenizer.from_pretrained``."""

    kind: Literal["pretrained"]
    """Selects this tokenizer."""
    name: str
    """Name on the hub, or a directory."""


Mirror = Annotated[
    str,
    StringConstraints(
        pattern=r"^(https?|s3|gs|hf)://[A-Za-z0-9._-]+(:\d+)?(/[A-Za-z0-9._~%@=+-]+)*/?$", max_length=512
    ),
]
"""A public URL of a token store. Contributors' machines open it, so local files and chained URLs are not allowed."""


class Data(Strict):
    """What the run trains on. The manifest fixes the resulting token store by its hash."""

    source: Annotated[Source, Field(discriminator="kind")] = StdlibSource()
    """The text: one of the sources below, chosen by its ``kind``. Default: needs no download."""
    tokenizer: Annotated[BpeTokenizer | NamedTokenizer, Field(discriminator="kind")] = BpeTokenizer()
    """``bpe`` or ``pretrained``. Default: needs no download."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    """Tokens per training sequence. Default: for small tests; DiLoCo has 1024."""
    packing: Literal["pack", "pad"] = "pack"
    """``pack``: concatenate documents and cut them into sequences. ``pad``: one document per sequence, padded with
    its end token, which is masked in the loss. Default: no token is wasted."""
    heldout_fraction: Annotated[float, Field(gt=0.0, le=0.5)] = 0.02
    """Share of the documents in the held-out split. Default: enough for small corpora; lower it for large ones."""
    max_documents: Count | None = None
    """Documents to read at most. Default: all."""
    mirrors: Annotated[tuple[Mirror, ...], Field(strict=False, max_length=8)] = ()
    """URLs of copies of the prepared store's directory (http, s3, gs, hf); nodes fetch shards from them before they ask
    each other. Default: none."""

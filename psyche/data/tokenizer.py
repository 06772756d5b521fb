"""Tokenizers: trained on the corpus or named; either way a directory that ``AutoTokenizer.from_pretrained`` loads."""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from psyche.config import BpeTokenizer, NamedTokenizer
from psyche.errors import PsycheError

END = "<|endoftext|>"
SAMPLE = 1 << 27
"""Characters a tokenizer is trained on at most: merges settle long before, and memory stays bounded."""

PIECE = 1 << 17
"""Characters of a text that are encoded by one core in one go."""

MAX_CHARACTERS = 1 << 19
"""Of all texts encoded at once: what they take on the way, 100 times their size (measured on Python), is little."""

_OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path")
"""Keys that ``save_pretrained`` adds to say where the tokenizer came from; they would change the store's root."""


@dataclass(frozen=True)
class Encoder:
    """Text to token ids, without the special tokens a chat or a classifier would add around it."""

    tokenizer: Tokenizer
    eos: int
    vocab_size: int
    """One more than the largest id."""

    @classmethod
    def load(cls, directory: Path) -> Encoder:
        """Read what :func:`tokenizer_files` made. Raises :class:`PsycheError` for a tokenizer without an end token."""
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text that spells "<|endoftext|>" is text, not the end of a document
        end = json.loads((directory / "tokenizer_config.json").read_bytes()).get("eos_token")
        eos = tokenizer.token_to_id(end["content"] if isinstance(end, dict) else end or "")
        if eos is None:
            raise PsycheError("the tokenizer has no eos_token to end documents with: choose one for causal models")
        return cls(tokenizer, eos, 1 + max(tokenizer.get_vocab(with_added_tokens=True).values()))

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, followed by ``eos``; on all cores unless ``TOKENIZERS_PARALLELISM`` says no.

        A text longer than ``PIECE`` characters is encoded piece by piece, so that memory and time stay bounded.
        """
        found: list[list[NDArray[np.uint32]]] = [[] for _ in texts]
        for group in _together(texts):
            encodings = self.tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (number, _), encoding in zip(group, encodings, strict=True):
                found[number].append(np.array(encoding.ids, dtype=np.uint32))
        end = np.array([self.eos], dtype=np.uint32)
        return [np.concatenate([*pieces, end]) for pieces in found]


def _together(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """The texts' pieces with the number of their text, as many at once as ``MAX_CHARACTERS`` allow."""
    group, size = [], 0
    for number, text in enumerate(texts):
        for at in range(0, len(text), PIECE):
            group.append((number, text[at : at + PIECE]))
            size += len(group[-1][1])
            if size >= MAX_CHARACTERS:
                yield group
                group, size = [], 0
    if group:
        yield group


def tokenizer_files(spec: BpeTokenizer | NamedTokenizer, texts: Iterable[str]) -> dict[str, bytes]:
    """Name and content of each file of the tokenizer; ``texts`` are read only where one is trained.

    Equal texts give equal bytes. Raises :class:`PsycheError` for a name that does not load.
    """
    return _train(spec.vocab_size, texts) if isinstance(spec, BpeTokenizer) else _named(spec.name)


def _train(vocab_size: int, texts: Iterable[str]) -> dict[str, bytes]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte, so that no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    _trim_heap()
    # Written by hand: what transformers reads is small, and importing it costs more than training does.
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
    }
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": _json(config)}


def _trim_heap() -> None:
    """Give back what training took, some hundred MB of small pieces, which glibc keeps unless it is told."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _sample(texts: Iterable[str]) -> Iterator[str]:
    left = SAMPLE
    for text in texts:
        yield text
        left -= len(text)
        if left <= 0:
            return


def _named(name: str) -> dict[str, bytes]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a wrong name, no network, a broken file: each its own type
        reason = " ".join(str(error).split())[:200]
        raise PsycheError(
            f"data.tokenizer.name: {name!r} is no directory or hub name that AutoTokenizer loads ({reason}): correct "
            "it, or copy the tokenizer to this machine and name its directory"
        ) from error
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir()) if path.is_file()}
    if "tokenizer.json" not in files:
        raise PsycheError(f"data.tokenizer.name: {name!r} has no tokenizer.json: choose one that `tokenizers` can run")
    config = json.loads(files["tokenizer_config.json"])
    files["tokenizer_config.json"] = _json({key: config[key] for key in config if key not in _OF_THIS_MACHINE})
    return files


def _json(tree: dict[str, object]) -> bytes:
    return json.dumps(tree, indent=2, sort_keys=True).encode()

"""Tokenizers, trained on the corpus or named: a directory that ``AutoTokenizer.from_pretrained`` loads."""

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
"""Most characters that a tokenizer is trained on: merges converge long before, and memory stays bounded."""

PIECE = 1 << 17
"""Characters of a text that one core encodes at once."""

MAX_CHARACTERS = 1 << 19
"""Characters encoded at once on all cores. Encoding takes 100 times their size in memory (measured on Python code)."""

_OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path")
"""Keys that ``save_pretrained`` adds about the tokenizer's origin; they would change the store's root."""


@dataclass(frozen=True)
class Encoder:
    """Encodes text as token ids, without the special tokens of chats or classifiers."""

    tokenizer: Tokenizer
    eos: int
    vocab_size: int
    """One more than the largest id."""

    @classmethod
    def load(cls, directory: Path) -> Encoder:
        """Load the files of :func:`tokenizer_files`. Raises :class:`PsycheError` if there is no end token."""
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # text that spells "<|endoftext|>" is text, not the end of a document
        end = json.loads((directory / "tokenizer_config.json").read_bytes()).get("eos_token")
        eos = tokenizer.token_to_id(end["content"] if isinstance(end, dict) else end or "")
        if eos is None:
            raise PsycheError("data.tokenizer has no eos_token to end documents with: choose one for causal models")
        return cls(tokenizer, eos, 1 + max(tokenizer.get_vocab(with_added_tokens=True).values()))

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, followed by ``eos``; on all cores unless ``TOKENIZERS_PARALLELISM=false``.

        A text longer than ``PIECE`` characters is encoded in pieces, so that memory and time stay bounded.
        """
        found: list[list[NDArray[np.uint32]]] = [[] for _ in texts]
        for group in _batched_pieces(texts):
            encodings = self.tokenizer.encode_batch_fast([piece for _, piece in group], add_special_tokens=False)
            for (number, _), encoding in zip(group, encodings, strict=True):
                found[number].append(np.array(encoding.ids, dtype=np.uint32))
        end = np.array([self.eos], dtype=np.uint32)
        return [np.concatenate([*pieces, end]) for pieces in found]


def _batched_pieces(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Group the texts' pieces, each with the number of its text, into batches of at most ``MAX_CHARACTERS``."""
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
    """Return name and content of each file of the tokenizer; ``texts`` are read only to train one.

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
    """Return the heap memory of the training, some hundred MB that glibc would keep, to the system."""
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
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a wrong name, no network, a broken file: each raises its own type
        reason = " ".join(str(error).split())[:200]
        raise PsycheError(
            f"data.tokenizer.name: AutoTokenizer cannot load {name!r} as a directory or hub name ({reason}): correct "
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

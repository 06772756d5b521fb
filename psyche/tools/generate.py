"""Text out of a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from psyche.errors import PsycheError
from psyche.tools.load import Trained


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    tokens: int = 100
    """At most so many."""
    temperature: float = 0.8
    """0: the likeliest token, always."""
    top_k: int = 40
    """0: among all tokens."""
    top_p: float = 1.0
    seed: int = 0


def generate(trained: Trained, prompt: str, sampling: Sampling, write: Callable[[str], None]) -> None:
    """Continue ``prompt``, and tell ``write`` the text as it comes, the prompt included.

    Raises :class:`PsycheError` where the model has no room for the prompt and a token more.
    """
    from transformers import TextStreamer

    class Writer(TextStreamer):  # type: ignore[misc]  # transformers has no types here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    inputs = trained.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(trained.device)
    positions = getattr(trained.model.config, "max_position_embeddings", None)
    given = inputs["input_ids"].shape[1]
    if not given:
        raise PsycheError("the prompt is empty: give the model something to continue")
    room = sampling.tokens if positions is None else min(sampling.tokens, positions - given)
    if room < 1:
        raise PsycheError(f"the prompt has {given} tokens, the model room for {positions}: shorten it")
    drawn: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        drawn |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        trained.model.generate(
            **inputs,
            **drawn,
            max_new_tokens=room,
            pad_token_id=trained.tokenizer.eos_token_id,
            streamer=Writer(trained.tokenizer, skip_special_tokens=True),
        )

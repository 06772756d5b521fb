"""Generate text with a trained model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from psyche.errors import PsycheError
from psyche.tools.load import Trained


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters."""

    tokens: int = 100
    """Maximum number of new tokens."""
    temperature: float = 0.8
    """0 is greedy decoding."""
    top_k: int = 40
    """Number of most likely tokens to sample from; 0: all."""
    top_p: float = 1.0
    """Cumulative probability of nucleus sampling."""
    seed: int = 0


def generate(trained: Trained, prompt: str, sampling: Sampling, write: Callable[[str], None]) -> None:
    """Continue ``prompt``; pass the text to ``write`` as it is generated, starting with the prompt.

    Raises :class:`PsycheError` if the prompt is empty or fills the model's context.
    """
    from transformers import TextStreamer

    class Writer(TextStreamer):  # type: ignore[misc]  # transformers is untyped here
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    inputs = trained.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(trained.device)
    positions = getattr(trained.model.config, "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if not length:
        raise PsycheError("the prompt is empty: give the model something to continue")
    room = sampling.tokens if positions is None else min(sampling.tokens, positions - length)
    if room < 1:
        raise PsycheError(f"the prompt has {length} tokens and the model a context of {positions}: shorten the prompt")
    options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
    if sampling.temperature > 0:
        options |= {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sampling.seed)
        trained.model.generate(
            **inputs,
            **options,
            max_new_tokens=room,
            pad_token_id=trained.tokenizer.eos_token_id,
            streamer=Writer(trained.tokenizer, skip_special_tokens=True),
        )

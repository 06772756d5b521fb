"""Export outer parameters to a directory that ``transformers`` loads, and sample text from it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from psyche.config import Model
from psyche.numerics.flat import FlatLayout
from psyche.training.models import build


def model_of(spec: Model, theta: Tensor) -> nn.Module:
    """Return the model whose parameters are ``theta``, the flat vector of its layout."""
    model = build(spec)
    layout = FlatLayout.of_model(model)
    with torch.no_grad():
        views = layout.views(theta)
        for name, parameter in model.named_parameters():
            if name in views:
                parameter.copy_(views[name])
    return model


def export(spec: Model, theta: Tensor, tokenizer: Path, directory: Path) -> None:
    """Write model (safetensors) and tokenizer so that ``AutoModelForCausalLM.from_pretrained`` loads them.

    ``theta`` is the flat vector of the model's layout.
    """
    from transformers.utils import logging

    model = model_of(spec, theta)
    directory.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # it would cut through our own view
    model.save_pretrained(directory)  # type: ignore[operator]
    for file in tokenizer.iterdir():
        shutil.copy2(file, directory / file.name)


def sample(directory: Path, prompts: Sequence[str], *, tokens: int = 60, seed: int = 0) -> list[str]:
    """Continue each of ``prompts`` by up to ``tokens`` tokens; returns the continuations, without the prompts.

    Top-20 at temperature 0.5: a model as small as the demo's needs its likely tokens to spell names right.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, trust_remote_code=False).eval()
    texts = []
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for prompt in prompts:
            inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=True, top_k=20, temperature=0.5)
            texts.append(str(tokenizer.decode(out[0], skip_special_tokens=True)).removeprefix(prompt))
    return texts

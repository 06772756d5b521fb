"""The ``run.model`` section: which model a run trains."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from psyche.config.base import Strict


class Model(Strict):
    """A causal language model of ``transformers``."""

    architecture: str = "llama"
    """``model_type`` of a ``transformers`` configuration, such as ``llama``, ``qwen3`` or ``gpt2``. Default:
    DiLoCo-like models are usually written as Llama."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Arguments of that architecture's configuration class. ``vocab_size`` is required; the rest defaults to the
    class."""

    @model_validator(mode="after")
    def _plain(self) -> Self:
        for name, value in self.settings.items():
            if not _is_plain(value):
                raise ValueError(
                    f"settings.{name}: only numbers, strings, true, false, null, and lists and maps of these"
                )
        size = self.settings.get("vocab_size", 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"settings.vocab_size: {size!r} is not a whole number above 0")
        return self

    @property
    def vocab_size(self) -> int:
        """The model's vocabulary size; 0 if the settings do not give it."""
        return int(self.settings.get("vocab_size", 0))


def _is_plain(value: object, depth: int = 8) -> bool:
    """Whether a value has a single encoding in a manifest and bounded depth. Manifests come from other machines."""
    match value:
        case None | bool() | float() | str():
            return True
        case int():
            return -(2**63) <= value < 2**63
        case list():
            return depth > 0 and all(_is_plain(one, depth - 1) for one in value)
        case dict():
            return depth > 0 and all(isinstance(k, str) and _is_plain(one, depth - 1) for k, one in value.items())
        case _:
            return False

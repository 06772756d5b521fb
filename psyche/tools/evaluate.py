"""Evaluate a trained model: loss on text, and scores on tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from psyche.data.token_store import BadShard
from psyche.errors import PsycheError
from psyche.tools.load import Trained
from psyche.training.engine import IGNORED, predicted_tokens, target_labels

BATCH = 8
"""Sequences per forward pass."""

Report = Callable[[int, int], None]
"""Takes the sequences done and their total."""


@dataclass(frozen=True)
class TextLoss:
    """Loss of next-token prediction over separate windows; the first token of each is not predicted."""

    tokens: int
    """Predicted tokens."""
    nats: float
    """Loss summed over the predicted tokens."""
    bytes: int
    """UTF-8 bytes of the predicted tokens' text."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        return exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte: unlike the loss comparable between tokenizers."""
        return self.nats / log(2) / self.bytes


def heldout_loss(trained: Trained, sequences: int | None, report: Report = lambda done, total: None) -> TextLoss:
    """Evaluate on the first ``sequences`` of the run's held-out split.

    The default is ``run.heldout_sequences``, which makes the loss comparable with the run's own curve. Raises
    :class:`PsycheError` if some sequences are not on this machine.
    """
    if trained.store is None:
        raise PsycheError("an exported model has no held-out split: give a text file with --text")
    split = trained.store.heldout
    count = trained.heldout_sequences if sequences is None else min(sequences, len(split))
    batches = (split.batch(range(at, min(at + BATCH, count))) for at in range(0, count, BATCH))
    try:
        return _loss(trained, batches, trained.store.index.pad, count, report)
    except BadShard as error:
        raise PsycheError(
            f"this machine does not have all of {count} held-out sequences ({error}): a node stores the first "
            f"{trained.heldout_sequences}; leave out --sequences, or run psyche data prepare"
        ) from None


def text_loss(trained: Trained, path: Path, report: Report = lambda done, total: None) -> TextLoss:
    """Evaluate on a UTF-8 file, cut into windows of the model's context length."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PsycheError(f"--text {path} cannot be read as UTF-8: {error}") from None
    ids = trained.tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    width = trained.window
    rows = [np.array(ids[at : at + width], dtype=np.int64) for at in range(0, len(ids), width)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise PsycheError(f"--text {path} has fewer than two tokens: give more text")
    whole, rest = [row for row in rows if len(row) == width], [row for row in rows if len(row) < width]
    batches = [np.stack(whole[at : at + BATCH]) for at in range(0, len(whole), BATCH)]
    return _loss(trained, [*batches, *(row[None] for row in rest)], None, len(rows), report)


@torch.no_grad()
def _loss(
    trained: Trained, batches: Iterable[NDArray[np.int64]], end: int | None, total: int, report: Report
) -> TextLoss:
    nats, tokens, size, done = 0.0, 0, 0, 0
    for batch in batches:
        targets = target_labels(batch, end)
        ids, wanted = (torch.from_numpy(one).to(trained.device) for one in (batch, targets))
        loss = trained.model(input_ids=ids, labels=wanted, use_cache=False).loss
        count = predicted_tokens(targets)
        nats, tokens, done = nats + float(loss) * count, tokens + count, done + len(batch)
        texts = [row[row != IGNORED] for row in targets[:, 1:]]
        size += sum(len(text.encode()) for text in trained.tokenizer.batch_decode(texts))
        report(done, total)
    return TextLoss(tokens, nats, size)


@dataclass(frozen=True)
class Score:
    """One metric of one benchmark task."""

    task: str
    metric: str
    value: float
    stderr: float | None


def task_scores(
    trained: Trained, tasks: Sequence[str], *, shots: int | None, limit: int | None, include: Path | None
) -> list[Score]:
    """Score the model with lm-evaluation-harness. ``include`` is a directory of additional tasks.

    Raises :class:`PsycheError` if the harness is not installed, a task is unknown, or its data cannot be loaded.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise PsycheError("--tasks needs lm-evaluation-harness: pip install 'psyche[eval]'") from None
    manager = TaskManager(include_path=None if include is None else str(include))
    if unknown := [task for task in tasks if not manager.match_tasks([task])]:
        raise PsycheError(f"--tasks {unknown[0]}: unknown to lm-evaluation-harness; `lm-eval ls tasks` lists the tasks")
    model = HFLM(pretrained=trained.model, tokenizer=trained.tokenizer, batch_size=BATCH, max_length=trained.window)
    try:
        found: dict[str, Any] = simple_evaluate(
            model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, bootstrap_iters=1000
        )
    except Exception as error:  # datasets, network and task code raise many types
        raise PsycheError(f"{', '.join(tasks)} cannot be scored: {' '.join(str(error).split())[:300]}") from error
    return list(_scores(found["results"]))


def _scores(results: dict[str, dict[str, Any]]) -> Iterator[Score]:
    """Convert ``{"task": {"acc,none": .5, "acc_stderr,none": .1, "alias": …}}``."""
    for task, values in sorted(results.items()):
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float | int) or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{variant}")
            name = metric if variant in ("", "none") else f"{metric} ({variant})"
            yield Score(task, name, float(value), float(stderr) if isinstance(stderr, float | int) else None)

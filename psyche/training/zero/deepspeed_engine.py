"""DeepSpeedEngine: several GPUs of one node behind the interface of one."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from psyche import config
from psyche.config import Inner
from psyche.training.engine import Batch, predicted_tokens, target_labels
from psyche.training.models import build, layout
from psyche.training.zero.rank_messages import Evaluate, Fit, Kind, Order, Read, Resume, Rows, Shift, Start, Step, Write
from psyche.training.zero.rank_processes import RankProcesses
from psyche.training.zero.shared_vector import SharedVector

MOMENTS: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """One model over several ranks by ZeRO, equal to TorchEngine up to fp32 rounding.

    Each rank is a process (``rank_processes.py``). Parameters and moments go between the ranks and this process through
    one flat vector in shared memory, from and to which each rank copies the part that it holds.
    """

    def __init__(
        self,
        spec: config.Model,
        seed: int,
        inner: Inner,
        *,
        devices: Sequence[str],
        stage: Literal[1, 2, 3],
        offload: bool,
        precision: str,
        micro_batch: int | None,
        threads: int,
        checkpoints: bool = False,
        end: int | None = None,
        memory_limit: int | None = None,
        directory: Path,
    ) -> None:
        """Start the ranks and build the model of ``spec`` with initial parameters of ``seed``.

        ``micro_batch``: sequences per forward pass of a rank, None: as many as fit. ``checkpoints``: recompute
        activations. ``end``: the token that precedes padding. ``threads`` and ``memory_limit`` (bytes of GPU memory)
        are per rank. The output of the ranks goes below ``directory``. Raises :class:`PsycheError`.
        """
        self.layout = layout(spec)
        self.steps = 0
        self._micro_batch = micro_batch
        self._end = end
        with closing(SharedVector.create(self.layout.size)) as shared:
            self.ranks = RankProcesses(devices, shared.descriptor, self.layout.size, directory)
        self._flat = shared.tensor
        start = Start(
            spec.model_dump_json(),
            inner.model_dump_json(),
            precision,
            stage,
            offload,
            threads,
            checkpoints,
            end,
            memory_limit,
        )
        self._all(start)
        with torch.no_grad():
            self.layout.gather(dict(build(spec, seed=seed).named_parameters()), self._flat)
        self._all(Write("theta", ((0, self.layout.size),)))

    def step(self, batch: Batch, lr: float) -> float:
        rows = self._rank_rows(batch)
        tokens = predicted_tokens(target_labels(batch, self._end))
        answers = self.ranks.ask([Step(one, tokens, lr) for one in rows])
        self.steps += 1
        return sum(answer.loss for answer in answers)

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        answers = self.ranks.ask([Evaluate(one) for one in self._rank_rows(batch)])
        return sum(answer.loss for answer in answers), sum(answer.tokens for answer in answers)

    def read(self, flat: Tensor) -> None:
        self._all(Read("theta"))
        flat.copy_(self._flat)

    def write(self, flat: Tensor, parts: Sequence[slice] | None = None) -> None:
        ranges = self._put(flat, parts)
        self._all(Write("theta", ranges))

    def shift(self, flat: Tensor, parts: Sequence[slice]) -> None:
        ranges = self._put(flat, parts)
        self._all(Shift(ranges))

    def state(self) -> dict[str, Tensor]:
        if not self.steps:
            return {}
        tensors = {f"step/{span.name}": torch.tensor(float(self.steps)) for span in self.layout.spans}
        for kind in MOMENTS:
            self._all(Read(kind))
            tensors |= {f"{kind}/{name}": view for name, view in self.layout.views(self._flat.clone()).items()}
        return tensors

    def load_state(self, state: dict[str, Tensor]) -> None:
        steps = self._checked(state)
        if steps:
            for kind in MOMENTS:
                for name, view in self.layout.views(self._flat).items():
                    view.copy_(state[f"{kind}/{name}"])
                self._all(Write(kind, ((0, self.layout.size),)))
        self._all(Resume(steps))
        self.steps = steps

    def close(self) -> None:
        """End the ranks. They also end when this object is collected and when this process ends."""
        self.ranks.close()

    def _checked(self, state: dict[str, Tensor]) -> int:
        """Validate that a state fits this model, and return its number of steps."""
        wanted = {f"{kind}/{span.name}": span.shape for span in self.layout.spans for kind in MOMENTS}
        wanted |= {f"step/{span.name}": () for span in self.layout.spans}
        if unknown := set(state) - set(wanted):
            raise ValueError(f"the inner optimizer state has {min(unknown)}, which this model does not have")
        if not state:
            return 0
        for name, shape in wanted.items():
            if name not in state or state[name].shape != shape:
                raise ValueError(f"the inner optimizer state does not fit the shape of {name.partition('/')[2]}")
        steps = {int(state[f"step/{span.name}"]) for span in self.layout.spans}
        if len(steps) != 1:
            raise ValueError(
                "the inner optimizer state has tensors with different step counts, which ZeRO cannot represent"
            )
        return steps.pop()

    def _put(self, flat: Tensor, parts: Sequence[slice] | None) -> tuple[tuple[int, int], ...]:
        """Copy ranges of ``flat`` to the shared vector, and return them."""
        whole = [slice(0, self.layout.size)] if parts is None else parts
        for part in whole:
            self._flat[part].copy_(flat[part])
        return tuple((part.start, part.stop) for part in whole)

    def _rank_rows(self, batch: Batch) -> list[Rows]:
        """Distribute a batch evenly over the ranks. All make the same number of passes, some with fewer sequences."""
        ranks = len(self.ranks.pids)
        share = -(-len(batch) // ranks)
        if self._micro_batch is None:
            fits = self.ranks.ask([Fit(batch.shape[1])] * ranks)
            self._micro_batch = min(answer.sequences for answer in fits)
        passes = -(-share // self._micro_batch)
        parts = np.array_split(batch, ranks * passes)
        by_rank = [parts[rank * passes : (rank + 1) * passes] for rank in range(ranks)]
        return [
            Rows(np.concatenate(own).astype(np.int64).tobytes(), batch.shape[1], tuple(len(part) for part in own))
            for own in by_rank
        ]

    def _all(self, order: Order) -> None:
        self.ranks.ask([order] * len(self.ranks.pids))

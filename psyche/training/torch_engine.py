"""TorchEngine: one model on one device, with parameters that are views of one flat tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from psyche.errors import PsycheError
from psyche.numerics.flat import FlatLayout
from psyche.training.devices import limit_memory, memory_limit, pick_device, pick_precision
from psyche.training.engine import Batch, predicted_tokens, target_labels
from psyche.training.memory import free_memory, max_micro_batch, micro_batch_size, saved_bytes
from psyche.training.optimizers import Optimizers

if TYPE_CHECKING:
    from psyche.config import Inner, Node

REPEATS = 5
"""Timed passes. Few are enough: where compiling matters, speeds differ by a tenth or more."""
OUT_OF_MEMORY = "one sequence does not fit into the memory of this device: free some of it, or use a larger device"


@dataclass(frozen=True)
class MicroBatch:
    """The sequences of one forward pass, on the device."""

    tokens: Tensor
    """int64 ``[sequences, length]``."""
    labels: Tensor
    predicted: int
    """The number of tokens that the mean loss covers."""

    def first(self, rows: int) -> MicroBatch:
        """So many sequences of it."""
        return MicroBatch(self.tokens[:rows], self.labels[:rows], self.predicted)


class TorchEngine:
    """One model on one device.

    Parameters are views of one flat tensor, so all of them are read or written by one copy. A batch is split into as
    few micro-batches as fit into memory; their size is found at the first step unless ``node.micro_batch`` sets it.
    """

    def __init__(self, model: nn.Module, inner: Inner, node: Node, end: int | None = None) -> None:
        """``end`` is the token that precedes padding; None: sequences are not padded."""
        self.device = pick_device(node.device)
        limit_memory(memory_limit(node), self.device)
        self.layout = FlatLayout.of_model(model)
        self.model = model.to(self.device).train()
        self._forward: Callable[..., Any] = self.model
        self._flat = torch.zeros(self.layout.size, device=self.device)
        self._adopt_flat()
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._clip = inner.clip
        self.end = end
        self._compiled_rows = 0
        """The micro-batch size that ``_forward`` is compiled for; 0: it is not compiled."""
        self._max_rows = node.micro_batch
        """The maximum micro-batch size; None until it has been measured."""
        self._autocast_dtype = pick_precision(node.precision, self.device)
        self._optimizers = Optimizers(self.model, inner)
        self.checkpoints = False
        """Whether activations are recomputed in the backward pass instead of saved."""
        if node.activation_checkpointing:
            self._checkpoint_activations()
        self.steps = 0

    def step(self, batch: Batch, lr: float) -> float:
        self._fit_micro_batch(batch)
        loss = None
        while loss is None:
            self._optimizers.zero_grad()
            with suppress(torch.OutOfMemoryError):  # the optimizer has not stepped yet, so the step can be repeated
                loss = self._backward(batch)
            if loss is None and not self.halve_micro_batch(len(batch)):
                self.enable_activation_checkpointing()
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizers.step(lr)
        self.steps += 1
        return float(loss)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        self._fit_micro_batch(batch)
        found = None
        self.model.eval()
        try:
            while found is None:
                with suppress(torch.OutOfMemoryError):
                    found = self._eval_loss(batch)
                if found is None and not self.halve_micro_batch(len(batch)):
                    raise PsycheError(OUT_OF_MEMORY)
        finally:
            self.model.train()
        return found

    @torch.no_grad()
    def read(self, flat: Tensor) -> None:
        flat.copy_(self._flat)

    @torch.no_grad()
    def write(self, flat: Tensor, parts: Sequence[slice] | None = None) -> None:
        if parts is None:
            self._flat.copy_(flat)
        else:
            for part in parts:
                self._flat[part].copy_(flat[part])

    @torch.no_grad()
    def shift(self, flat: Tensor, parts: Sequence[slice]) -> None:
        for part in parts:
            self._flat[part].add_(flat[part].to(self.device))

    def state(self) -> dict[str, Tensor]:
        return self._optimizers.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.steps = self._optimizers.load_state(state)

    def rows(self, batch: Batch) -> int:
        """Return the micro-batch size for ``batch``."""
        self._fit_micro_batch(batch)
        return micro_batch_size(len(batch), self._max_rows or len(batch))

    def pass_seconds(self, batch: Batch, repeats: int = REPEATS) -> float:
        """Measure a forward and backward pass over ``batch`` as one micro-batch; changes no parameter.

        Returns the median of ``repeats`` in seconds, after one warm-up pass.
        """
        (micro_batch,) = self._micro_batches(batch)
        forward = self._forward if len(batch) == self._compiled_rows else self.model
        taken = [self._timed(forward, micro_batch) for _ in range(repeats + 1)]
        return median(taken[1:])

    def use_compiled(self, batch: Batch) -> None:
        """Compile the model for micro-batches of the shape of ``batch``; other shapes stay eager. Changes no parameter.

        Passes on the exceptions of the compiler, without having changed anything.
        """
        (micro_batch,) = self._micro_batches(batch)
        compiled: Callable[..., Any] = torch.compile(self.model, dynamic=False)
        self._timed(compiled, micro_batch)
        self._forward, self._compiled_rows = compiled, len(batch)

    def _timed(self, forward: Callable[..., Any], micro_batch: MicroBatch) -> float:
        began = perf_counter()
        try:
            self._loss(forward, micro_batch).backward()  # type: ignore[no-untyped-call]
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self._optimizers.zero_grad()
        return perf_counter() - began

    @contextmanager
    def other_precision(self) -> Iterator[None]:
        """Inside this context, swap bf16 and fp32, and compile nothing."""
        own = self._autocast_dtype, self._forward, self._compiled_rows
        other = torch.bfloat16 if self._autocast_dtype is None else None
        self._autocast_dtype, self._forward, self._compiled_rows = other, self.model, 0
        try:
            yield
        finally:
            self._autocast_dtype, self._forward, self._compiled_rows = own

    @property
    def compiled(self) -> bool:
        """Whether ``torch.compile`` is in use."""
        return self._forward is not self.model

    # ------------------------------------------------------------------------------ the parts of a step

    def _backward(self, batch: Batch) -> Tensor:
        """Accumulate the gradient of the mean loss. Returns the loss as a tensor on the device."""
        total = torch.zeros((), device=self.device)
        tokens = predicted_tokens(target_labels(batch, self.end))
        for micro_batch in self._micro_batches(batch):
            compiled = len(micro_batch.tokens) == self._compiled_rows
            forward = self._forward if compiled else self.model  # another shape would be recompiled
            loss = self._loss(forward, micro_batch) * (micro_batch.predicted / tokens)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _eval_loss(self, batch: Batch) -> tuple[float, int]:
        """Sum of the loss over the predicted tokens, and their number."""
        total, tokens = 0.0, 0
        for micro_batch in self._micro_batches(batch):
            total += float(self._loss(self.model, micro_batch)) * micro_batch.predicted
            tokens += micro_batch.predicted
        return total, tokens

    def _loss(self, forward: Callable[..., Any], micro_batch: MicroBatch) -> Tensor:
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._autocast_dtype is not None:
            autocast = torch.autocast(self.device.type, dtype=self._autocast_dtype)
        with autocast:
            loss: Tensor = forward(input_ids=micro_batch.tokens, labels=micro_batch.labels, use_cache=False).loss
        return loss

    def _micro_batches(self, batch: Batch) -> Iterator[MicroBatch]:
        """Yield ``batch`` as micro-batches on the device."""
        size = micro_batch_size(len(batch), self._max_rows or len(batch))
        for at in range(0, len(batch), size):
            rows = batch[at : at + size]
            targets = target_labels(rows, self.end)
            tokens = self._moved(rows)
            yield MicroBatch(tokens, tokens if targets is rows else self._moved(targets), predicted_tokens(targets))

    def _moved(self, rows: Batch) -> Tensor:
        tokens = torch.from_numpy(rows)
        if self.device.type == "cuda":  # a copy from pinned memory is asynchronous
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens

    # --------------------------------------------------------------------------------------- memory

    def _fit_micro_batch(self, batch: Batch) -> None:
        """Measure how many sequences fit at once, from the first sequence of ``batch``: batch sizes may vary."""
        if self._max_rows is not None:
            return

        def kept(rows: int) -> int:
            (micro_batch,) = self._micro_batches(batch[:1].repeat(rows, axis=0))
            return saved_bytes(lambda: self._loss(self.model, micro_batch), [self._flat])

        try:
            with torch.enable_grad():
                one, two = kept(1), kept(2)
        except torch.OutOfMemoryError:
            self._max_rows = 1
            return
        gradients = sum(p.numel() * p.element_size() for p in self._parameters if p.grad is None)
        free = free_memory(self.device) - gradients - self._optimizers.unallocated_bytes
        self._max_rows = max_micro_batch(two - one, free, once=2 * one - two)

    def halve_micro_batch(self, rows: int) -> bool:
        """Halve the micro-batch size after a batch of ``rows`` sequences did not fit. Returns False if it was 1."""
        self._optimizers.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        size = micro_batch_size(rows, self._max_rows or rows)
        if size == 1:
            return False
        self._max_rows = size // 2
        self._forward, self._compiled_rows = self.model, 0
        return True

    def enable_activation_checkpointing(self) -> None:
        """Recompute activations from now on, because one sequence does not fit.

        Raises :class:`PsycheError` if that is already so.
        """
        if self.checkpoints:
            raise PsycheError(OUT_OF_MEMORY)
        self._checkpoint_activations()
        self._forward, self._compiled_rows = self.model, 0

    def _checkpoint_activations(self) -> None:
        """Save only the input of each layer and recompute the rest (Chen et al., arXiv 1604.06174)."""
        self.model.activation_checkpointing_enable()  # type: ignore[operator]
        self.checkpoints = True

    # ---------------------------------------------------------------------------------------- flat

    @torch.no_grad()
    def _adopt_flat(self) -> None:
        views = self.layout.views(self._flat)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                views[name].copy_(parameter)
                parameter.data = views[name]

"""TorchEngine: one model on one device, its parameters views of one flat tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from psyche.config import Inner, Node
from psyche.errors import PsycheError
from psyche.numerics.flat import FlatLayout
from psyche.training.compiling import Prospect, compiled_if_it_pays
from psyche.training.devices import limit_memory, pick_device, pick_precision
from psyche.training.engine import Batch
from psyche.training.memory import free_memory, kept_by, rows_that_fit
from psyche.training.optimizers import Optimizers

OUT_OF_MEMORY = "one sequence does not fit into this device's memory: free some of it, or train on a bigger one"


class TorchEngine:
    """One model on one device.

    Parameters are views of one flat tensor, so reading and writing them all is one copy. A batch is taken in as few
    pieces as fit into memory, which is found at the first step unless the node says how many sequences to take.
    """

    def __init__(self, model: nn.Module, inner: Inner, node: Node) -> None:
        self.device = pick_device(node.device)
        limit_memory(node, self.device)
        self.layout = FlatLayout.of_model(model)
        self.model = model.to(self.device).train()
        self._forward: Callable[..., Any] = self.model
        self._flat = torch.zeros(self.layout.size, device=self.device)
        self._adopt_flat()
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._clip = inner.clip
        self._compile = node.compile
        self._micro_batch = node.micro_batch
        self._autocast_dtype = pick_precision(node.precision, self.device)
        self._optimizers = Optimizers(self.model, inner)
        self._checkpoints = False
        if node.activation_checkpointing:
            self._checkpoint_activations()
        self.steps = 0

    def step(self, batch: Batch, lr: float) -> float:
        tokens = self._tokens(batch)
        self._fit(tokens)
        loss = None
        while loss is None:
            self._optimizers.zero_grad()
            with suppress(torch.OutOfMemoryError):  # nothing has been stepped yet, so it can be tried again
                loss = self._backward(tokens)
            if loss is None:
                self._take_less_memory(len(tokens))
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip)
        self._optimizers.step(lr)
        self.steps += 1
        return float(loss)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        tokens = self._tokens(batch)
        self._fit(tokens)
        self.model.eval()
        total, predicted = 0.0, 0
        for piece in _pieces(tokens, self._micro_batch or len(tokens)):
            count = len(piece) * (piece.shape[1] - 1)
            total += float(self._loss(self.model, piece)) * count
            predicted += count
        self.model.train()
        return total, predicted

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

    def choose_compilation(self, batch: Batch, steps: int, memory: Path) -> str:
        """Use ``torch.compile`` for ``steps`` steps on batches like ``batch`` if that pays; says why, or why not.

        What was measured on this machine is remembered in the directory ``memory``. Changes no parameter.
        """
        tokens = self._tokens(batch)
        self._fit(tokens)
        piece = tokens[: self._micro_batch or len(tokens)]

        def through(forward: Callable[..., Any], rows: int) -> Callable[[], None]:
            def once() -> None:
                self._optimizers.zero_grad()
                self._loss(forward, piece[:rows]).backward()  # type: ignore[no-untyped-call]
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)

            return once

        passes = steps * -(-len(tokens) // len(piece))
        prospect = Prospect(self._compile, len(piece), passes, self._shape(piece), memory)
        compiled, why = compiled_if_it_pays(self.model, through, prospect)
        self._optimizers.zero_grad()
        self._forward = self.model if compiled is None else compiled
        return why

    # ------------------------------------------------------------------------------ one step's parts

    def _backward(self, tokens: Tensor) -> Tensor:
        """Accumulate the gradient of the mean loss. Returns that loss, still on the device."""
        total = torch.zeros((), device=self.device)
        rows = self._micro_batch or len(tokens)
        for piece in _pieces(tokens, rows):
            forward = self._forward if len(piece) == rows else self.model  # another shape would be compiled anew
            loss = self._loss(forward, piece) * (len(piece) / len(tokens))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _loss(self, forward: Callable[..., Any], tokens: Tensor) -> Tensor:
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._autocast_dtype is not None:
            autocast = torch.autocast(self.device.type, dtype=self._autocast_dtype)
        with autocast:
            loss: Tensor = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    def _tokens(self, batch: Batch) -> Tensor:
        tokens = torch.from_numpy(batch)
        if self.device.type == "cuda":  # from pinned memory the copy runs while the CPU goes on
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens

    # --------------------------------------------------------------------------------------- memory

    def _fit(self, tokens: Tensor) -> None:
        """Find how many sequences to take at once, at the first batch."""
        if self._micro_batch is None:
            with torch.enable_grad():
                each = kept_by(lambda: self._loss(self.model, tokens[:1]), [self._flat])
            gradients = sum(p.numel() * p.element_size() for p in self._parameters if p.grad is None)
            free = free_memory(self.device) - gradients - self._optimizers.bytes_to_come
            self._micro_batch = rows_that_fit(len(tokens), each, free)

    def _take_less_memory(self, rows: int) -> None:
        """After a step that did not fit: smaller pieces; at one sequence, activations are computed twice instead of
        kept. Raises :class:`PsycheError` where nothing is left to try."""
        self._optimizers.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        at_once = min(self._micro_batch or rows, rows)
        if at_once > 1:
            self._micro_batch = at_once // 2
        elif not self._checkpoints:
            self._checkpoint_activations()
        else:
            raise PsycheError(OUT_OF_MEMORY)
        self._forward = self.model

    def _checkpoint_activations(self) -> None:
        """Keep each layer's input and compute the rest again (Chen et al., arXiv 1604.06174)."""
        self.model.activation_checkpointing_enable()  # type: ignore[operator]
        self._checkpoints = True

    # ---------------------------------------------------------------------------------------- flat

    def _shape(self, piece: Tensor) -> str:
        """What the speed of a compiled model depends on, in words."""
        where = f"{torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            where = torch.cuda.get_device_name(self.device)
        settings = getattr(self.model, "config", self.model)
        kind = f"{self._autocast_dtype}, {tuple(piece.shape)}, checkpoints {self._checkpoints}"
        return f"{torch.__version__}, {where}, {kind}, {settings}"

    @torch.no_grad()
    def _adopt_flat(self) -> None:
        views = self.layout.views(self._flat)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                views[name].copy_(parameter)
                parameter.data = views[name]


def _pieces(tokens: Tensor, rows: int) -> list[Tensor]:
    return [tokens[at : at + rows] for at in range(0, len(tokens), rows)]

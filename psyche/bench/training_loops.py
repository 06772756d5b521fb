"""Train one way in its own process: ``python -m psyche.bench.training_loops WAY < plan.json`` prints seconds.

All ways train on the same batches of the same token store with the same optimizer, clipping and precision, and read
the loss of every step, as loss curves need it.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from psyche.bench.engine_speed import WARM_UP, Plan
from psyche.bench.plain_loop import PlainLoop, adamw
from psyche.config import Config
from psyche.data.prepare import prepare
from psyche.data.token_store import TokenStore
from psyche.training.devices import pick_device, pick_precision
from psyche.training.models import build
from psyche.training.torch_engine import TorchEngine


def loop(config: Config, store: TokenStore, steps: int) -> float:
    """Time ``steps`` steps of a plain PyTorch loop."""
    run = config.run
    model, device = build(run.model, seed=run.seed), pick_device(config.node.device)
    one = PlainLoop(model, device, run.inner, config.node.precision)
    return _seconds(steps, lambda step: one.step(torch.from_numpy(store.train.batch(_rows(config, step)))))


def engine(config: Config, store: TokenStore, steps: int) -> float:
    """Time psyche's engine outside of a node."""
    run = config.run
    one = TorchEngine(build(run.model, seed=run.seed), run.inner, config.node)
    return _seconds(steps, lambda step: one.step(store.train.batch(_rows(config, step)), run.inner.lr))


def _seconds(steps: int, train: Callable[[int], object]) -> float:
    """Time ``steps`` steps after the warm-up."""
    for step in range(WARM_UP):
        train(step)
    began = time.perf_counter()
    for step in range(WARM_UP, WARM_UP + steps):
        train(step)
    return time.perf_counter() - began


def trainer(config: Config, store: TokenStore, steps: int) -> float:
    """Time ``transformers.Trainer`` with logging and saving switched off."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    run, device = config.run, pick_device(config.node.device)
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            marks.append(time.perf_counter())

    class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return (WARM_UP + steps) * run.inner.batch_size

        def __getitem__(self, row: int) -> dict[str, Any]:
            tokens = torch.from_numpy(store.train.batch([row % len(store.train)])[0])
            return {"input_ids": tokens, "labels": tokens}

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=WARM_UP + steps,
            per_device_train_batch_size=run.inner.batch_size,
            max_grad_norm=run.inner.clip or 0.0,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            bf16=pick_precision(config.node.precision, device) is torch.bfloat16,
            dataloader_pin_memory=device.type == "cuda",
        )
        model = build(run.model, seed=run.seed)
        optimizer = adamw(model.to(device), run.inner)
        with contextlib.redirect_stdout(sys.stderr):
            Trainer(model, arguments, train_dataset=Rows(), callbacks=[Clock()], optimizers=(optimizer, None)).train()
    return marks[-1] - marks[WARM_UP - 1]


def _rows(config: Config, step: int) -> range:
    size = config.run.inner.batch_size
    return range(step * size, (step + 1) * size)


WAYS: dict[str, Callable[[Config, TokenStore, int], float]] = {"loop": loop, "trainer": trainer, "engine": engine}


def main() -> None:
    plan = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    config = plan.load()
    torch.set_num_threads(plan.threads)
    store = prepare(config.run.data, config.node.cache.expanduser(), vocab_limit=config.run.model.vocab_size)
    print(WAYS[sys.argv[1]](config, store, plan.steps))


if __name__ == "__main__":
    main()

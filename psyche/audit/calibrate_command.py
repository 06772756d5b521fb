"""``psyche audit calibrate``: what honest nodes of a run differ by, of the kinds that this machine can be."""

from __future__ import annotations

import json as text
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from psyche.audit.calibration import (
    Calibration,
    NodeKind,
    ReplayErrors,
    ReportProgress,
    available_node_kinds,
    total_steps,
)
from psyche.audit.calibration_report import IGNORED, plot, snippet, table, to_json, words
from psyche.audit.thresholds import thresholds
from psyche.config import Config, Node, load_config
from psyche.data.prepare import Report, prepare
from psyche.data.token_store import TokenStore
from psyche.diloco.launch import check_fit
from psyche.durable import disk_errors, write_durably
from psyche.training.models import build
from psyche.training.torch_engine import TorchEngine

LINE_EVERY = 5.0
"""Percent between progress lines where there is no terminal."""


def prepared(path: Path, report: Report | None) -> tuple[Config, TokenStore]:
    """Return a configuration and its text, which is prepared where it is not here. Raises :class:`PsycheError`."""
    config = load_config(path)
    cache = config.node.cache.expanduser()
    store = prepare(config.run.data, cache, vocab_limit=config.run.model.vocab_size, progress=report)
    check_fit(config.run, store)
    return config, store


def calibrate(
    config: Config, store: TokenStore, rounds: int, *, json: Path | None = None, picture: Path | None = None
) -> None:
    """Measure, then print a table and what to write into the configuration; progress goes to stderr.

    Raises :class:`PsycheError`.
    """
    for file in (json, picture):
        if file is not None:
            with disk_errors(file, "another path"):
                file.parent.mkdir(parents=True, exist_ok=True)
    measured = measure(config, store, available_node_kinds(config.node.threads), rounds)
    found = thresholds(measured.honest, measured.hostile, IGNORED)
    if json is not None:
        write_durably(json, text.dumps(to_json(measured, found), indent=2).encode() + b"\n")
    if picture is not None:
        plot(measured, found, f"{config.run.name}: what honest work and frauds look like to an audit", picture)
    console = Console()
    console.width = max(console.width, 132)
    console.print(table(measured))
    console.print(words(measured, found), highlight=False)
    console.print(f"\n{snippet(found)}", highlight=False)


def measure(config: Config, store: TokenStore, kinds: Sequence[NodeKind], rounds: int) -> ReplayErrors:
    """Return the errors of ``kinds`` on a run's model and data."""
    with (
        tempfile.TemporaryDirectory(prefix="psyche-calibrate-") as folder,
        _progress(total_steps(config.run, rounds, len(kinds))) as told,
    ):
        return Calibration(config.run, store, Path(folder), told).measure(kinds, rounds, maker(config, store))


def maker(config: Config, store: TokenStore) -> Callable[[NodeKind], TorchEngine | None]:
    """Makes engines of a run's model, with its initial parameters."""

    def make(kind: NodeKind) -> TorchEngine | None:
        run, settings = config.run, node_of(config.node, kind)
        engine = TorchEngine(build(run.model, seed=run.seed), run.inner, settings, store.index.pad)
        if kind.compiled:
            batch = np.zeros((run.inner.batch_size, run.data.sequence_length), np.int64)
            try:
                engine.use_compiled(batch[: engine.rows(batch)])
            except Exception as error:  # Dynamo, Inductor, Triton and the C++ compiler have each their own
                reason = " ".join(str(error).split())[:200]
                _say(f"{kind.name} is left out, because torch.compile does not work here: {reason}")
                return None
        return engine

    return make


def node_of(node: Node, kind: NodeKind) -> Node:
    """Return the settings of a node of that kind."""
    changes = {
        "device": kind.device,
        "threads": kind.threads,
        "precision": kind.precision,
        "compile": "on" if kind.compiled else "off",
    }
    return node.model_copy(update=changes)


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)


@contextmanager
def _progress(total: int) -> Iterator[ReportProgress]:
    """Yield a bar on a terminal, a line now and then elsewhere; all on stderr."""
    console, last, said = Console(stderr=True), "", 0.0
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def told(what: str, steps: int) -> None:
            nonlocal last, said
            bar.update(task, advance=steps, description=what)
            done = bar.tasks[0].percentage
            if not console.is_terminal and (what != last or done >= said + LINE_EVERY):
                last, said = what, done
                print(f"{done:3.0f} %  {what}", file=sys.stderr, flush=True)

        yield told

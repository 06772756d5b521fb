"""How fast and how exact the codecs are, beside everybody else's in the same run.

A codec is bound by memory, so its speed is given twice: in GB of fp32 parameters a second, and as a share of what a
plain copy moves on the same machine in the same moments. The share counts the bytes that a fused pass has to move;
who reads things twice gets a lower share for it.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from psyche.bench.codec.data import INNER_STEPS, ROUNDS, default_setting, gaussian, pseudo_gradient
from psyche.bench.codec.measure import PROBE, Bench
from psyche.bench.codec.rivals import rival_steppers, rivals
from psyche.bench.codec.systems import Coder, PsycheCoder, PsycheStepper, Stepper, backends, codec_names
from psyche.bench.codec.table import Row, against_rival, codec_table, outer_table, percent, speed, to_json
from psyche.bench.output import require_folder, write_rows
from psyche.bench.section import Preparing, prepare_corpus, wide_console
from psyche.bench.trials import Setting
from psyche.errors import PsycheError
from psyche.numerics.flat import ALIGNMENT, SLICE
from psyche.telemetry.formatting import amount, plural

MENDED = "hivemind    its 8-bit decoders raise TypeError with NumPy 2.4 or newer; that one call is mended here"
DEFAULT_SIZE = 1 << 24
"""Parameters: vectors of 64 MiB, larger than the last-level cache of most CPUs."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    size: int = DEFAULT_SIZE
    """Parameters that passes are timed on."""
    codecs: Sequence[str] = ()
    """psyche's; the usual ones where empty."""
    backends: Sequence[str] = ()
    """psyche's; all that work here where empty."""
    rivals: bool = True


@dataclass
class Result:
    """What was measured, and what to know of it."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """A sentence for each thing that was left out, and one where the machine was busy."""


def main(
    json: Path | None,
    plan: Plan,
    *,
    threads: int | None = None,
    preparing: Preparing = nullcontext,
) -> None:
    """``psyche bench codec``: tables to stdout, progress to stderr, rows to ``json`` (a list of flat dicts).

    ``threads`` are torch's; all cores where None. ``preparing`` shows how the corpus is prepared, which happens once.
    Raises ``PsycheError``.
    """
    check(plan)
    setting = default_setting()
    require_folder(json)
    prepare_corpus(setting, preparing)
    if threads is not None:
        torch.set_num_threads(threads)
    result = measure(plan, setting)
    if json is not None:
        write_rows(json, to_json(result.rows))
    show(result, wide_console())


def check(plan: Plan) -> None:
    """Raise :class:`PsycheError` for a name that does not exist here or a size that cannot be measured."""
    if plan.size < PROBE or plan.size % ALIGNMENT:
        raise PsycheError(f"--size must be a multiple of {ALIGNMENT} parameters, and {PROBE} or more")
    codec_names(plan.codecs)
    backends(plan.backends)


def measure(plan: Plan, setting: Setting) -> Result:
    """Measure all of ``plan``; real pseudo-gradients come from ``setting``. Raises :class:`PsycheError`."""
    check(plan)
    result = Result()
    with _quiet():
        coders, steppers, absent = _planned(plan)
        result.notes += [*_busy(), *absent]
        with _progress(len(coders) + len(steppers)) as (say, done):
            say("training a small model for real pseudo-gradients")
            samples = gaussian(), pseudo_gradient(setting)
            for device in sorted({*(coder.device for coder in coders), *(stepper.device for stepper in steppers)}):
                bench = Bench(plan.size, device, *samples)
                for coder in coders:
                    if coder.device == device:
                        done(*_rows(bench, coder, result))
                for stepper in steppers:
                    if stepper.device == device:
                        result.rows.append(bench.stepper(stepper))
                        done(result.rows[-1])
    result.rows.sort(key=lambda row: row.pass_ == "outer")
    return result


def _planned(plan: Plan) -> tuple[list[Coder], list[Stepper], list[str]]:
    used = backends(plan.backends)
    coders: list[Coder] = [PsycheCoder(backend, name) for name in codec_names(plan.codecs) for backend in used]
    steppers: list[Stepper] = [PsycheStepper(backend) for backend in used]
    if not plan.rivals:
        return coders, steppers, []
    others, absent = rivals()
    return coders + others, steppers + rival_steppers(), absent


def _busy() -> list[str]:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= cores / 2:
        return []
    return [f"the machine was busy when this began (load average {load:.1f} on {cores} cores): speeds say little"]


def _rows(bench: Bench, coder: Coder, result: Result) -> list[Row]:
    """Rows of a coder, which are also added to ``result``. A rival that fails is left out with a word."""
    try:
        rows = bench.coder(coder)
    except Exception as error:  # other people's code, on a platform that they may never have tried
        if coder.system == "psyche":
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        result.notes.append(f"{coder.system} {coder.codec} is left out: it fails here ({reason})")
        return []
    result.rows += rows
    return rows


def show(result: Result, console: Console) -> None:
    """Print the tables, what to know to read them, and how psyche compares with hivemind."""
    console.print(_preface(result.rows), highlight=False, markup=False)
    console.print()
    console.print(codec_table(result.rows))
    console.print()
    console.print(outer_table(result.rows))
    for line in [*against_rival(result.rows), *result.notes]:
        console.print(line, highlight=False, markup=False)


def _preface(rows: Sequence[Row]) -> str:
    copies = [row.copy_gbps for row in rows]
    size = max(row.parameters for row in rows)
    return "\n".join(
        [
            f"{amount(size)} parameters in slices of {amount(min(size, SLICE))}, {plural(rows[0].threads, 'thread')}; "
            "a codec too slow for that is timed on fewer.",
            "GB/s        of fp32 parameters, 4 bytes each, in the median repetition",
            "% of copy   bytes that a fused pass has to move, against a copy in the same moments: median "
            f"{median(copies):.1f} GB/s, read + written,",
            f"            {min(copies):.1f} to {max(copies):.1f} in this run. A copy also fetches the lines that it "
            "overwrites, so passes in place may exceed 100 %.",
            "encode      base − local, error feedback (psyche's codecs but fp32), quantize, make the payload. Rivals "
            "have no error",
            "            feedback, and all but hivemind stop at tensors: making bytes of them is not charged.",
            "decode+add  out += weight × decoded; a sparse codec touches only what it kept, so it has no share",
            "rel. L2     ‖x − D(Q(x))‖ / ‖x‖ without error feedback, which sends later what is lost here",
            f"real        a pseudo-gradient of a small Llama trained just now (H = {INNER_STEPS}, round {ROUNDS})",
            *([MENDED] if any(row.system == "hivemind" for row in rows) else []),
        ]
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notices of rivals about what else could be installed."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _progress(total: int) -> Iterator[tuple[Callable[[str], None], Callable[..., None]]]:
    """Two functions: say a line, and say that one of ``total`` is done, with its rows. All on stderr, with a bar."""
    console = Console(stderr=True)
    columns = (TextColumn("measuring"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        ended = 0

        def say(line: str) -> None:
            if console.is_terminal:
                bar.console.print(line, highlight=False, markup=False)
            else:
                print(line, file=sys.stderr, flush=True)

        def done(*rows: Row) -> None:
            nonlocal ended
            ended += 1
            bar.advance(task)
            for row in rows:
                name = f"{row.system} {row.codec or 'outer step'} ({row.backend})"
                share = "" if row.share_of_copy is None else f"  {percent(row.share_of_copy):>5} % copy"
                say(f"{ended:3}/{total}  {name:32} {row.pass_:10} {speed(row.gbps):>7} GB/s{share}")

        yield say, done

"""Measure how fast and how exact the codecs are, beside those of other systems in the same run.

Codecs are bound by memory bandwidth, so speed is given twice: in GB of fp32 parameters per second, and as a share of
what a plain copy moves on the same machine in turns with it. The share counts the bytes that a fused pass must move;
a codec that reads data twice has a lower share.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from rich.console import Console

from psyche.bench.codec.coders import Coder, Stepper, backends, codec_names, psyche_coder, psyche_stepper
from psyche.bench.codec.passes import PROBE, CodecRow, Pass, PassBench, gbps_text
from psyche.bench.codec.rival_coders import rival_steppers, rivals
from psyche.bench.codec.samples import INNER_STEPS, ROUNDS, default_setting, gaussian, pseudo_gradient
from psyche.bench.convergence.section import Preparing, prepare_corpus
from psyche.bench.convergence.trial import Setting
from psyche.bench.harness.progress_lines import progress_lines
from psyche.bench.harness.rows import Column, Result, Row, percent, run_bench, table, times
from psyche.bench.harness.turns import busy_note
from psyche.errors import PsycheError
from psyche.numerics.flat import ALIGNMENT, SLICE
from psyche.telemetry.formatting import amount, plural

RIVAL = ("hivemind", "Uniform8Bit")
"""The codec that others are compared with: the 8-bit one of the library that volunteer training runs on."""
PATCHED = "hivemind    its 8-bit decoders raise TypeError with NumPy 2.4 or newer; the bench patches that one call"
DEFAULT_SIZE = 1 << 24
"""Parameters: vectors of 64 MiB, larger than the last-level cache of most CPUs."""


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    size: int = DEFAULT_SIZE
    """Parameters that passes are timed on."""
    codecs: Sequence[str] = ()
    """psyche's codecs. Empty: the usual ones."""
    backends: Sequence[str] = ()
    """psyche's backends. Empty: all that work here."""
    rivals: bool = True


def main(json: Path | None, plan: Plan, *, threads: int | None = None, preparing: Preparing = nullcontext) -> None:
    """Run ``psyche bench codec`` on ``threads`` CPU threads (``None``: all cores). Raises ``PsycheError``."""

    def measure_prepared() -> Result[CodecRow]:
        setting = default_setting()
        prepare_corpus(setting, preparing)
        if threads is not None:
            torch.set_num_threads(threads)
        return measure(plan, setting)

    check(plan)
    run_bench(json, measure_prepared, lambda found: found.rows, show)


def check(plan: Plan) -> None:
    """Raise :class:`PsycheError` for a name that is unknown here or a size that cannot be measured."""
    if plan.size < PROBE or plan.size % ALIGNMENT:
        raise PsycheError(f"--size must be a multiple of {ALIGNMENT} parameters, and {PROBE} or more")
    codec_names(plan.codecs)
    backends(plan.backends)


def measure(plan: Plan, setting: Setting) -> Result[CodecRow]:
    """Measure all of ``plan``; the real pseudo-gradient is trained in ``setting``. Raises :class:`PsycheError`."""
    check(plan)
    with _quiet():
        coders, steppers, missing = _planned(plan)
        total, ended = len(coders) + len(steppers), 0
        result: Result[CodecRow] = Result(notes=[*busy_note(), *missing])
        with progress_lines("measuring", total) as say:
            say("training a small model for real pseudo-gradients", 0)
            samples = gaussian(), pseudo_gradient(setting)
            for device in sorted({*(coder.device for coder in coders), *(stepper.device for stepper in steppers)}):
                bench = PassBench(plan.size, device, *samples)
                everything: list[Coder | Stepper] = [*coders, *steppers]
                for measured in (one for one in everything if one.device == device):
                    ended += 1
                    rows = _rows(bench, measured, result)
                    say("\n".join(f"{ended:3}/{total}  {_line(row)}" for row in rows), 1)
    result.rows.sort(key=lambda row: row.pass_ == "outer")
    return result


def _line(row: CodecRow) -> str:
    name = f"{row.system} {row.codec or 'outer step'} ({row.backend})"
    share = "" if row.share_of_copy is None else f"  {percent(row.share_of_copy):>5} % copy"
    return f"{name:32} {row.pass_:10} {gbps_text(row.gbps):>7} GB/s{share}"


def _planned(plan: Plan) -> tuple[list[Coder], list[Stepper], list[str]]:
    used = backends(plan.backends)
    coders = [psyche_coder(backend, name) for name in codec_names(plan.codecs) for backend in used]
    steppers = [psyche_stepper(backend) for backend in used]
    if not plan.rivals:
        return coders, steppers, []
    others, missing = rivals()
    return coders + others, steppers + rival_steppers(), missing


def _rows(bench: PassBench, measured: Coder | Stepper, result: Result[CodecRow]) -> list[CodecRow]:
    """Measure a coder or stepper, and add its rows to ``result``. A rival that fails is left out with a note."""
    try:
        rows = bench.coder(measured) if isinstance(measured, Coder) else [bench.stepper(measured)]
    except Exception as error:  # a rival may raise anything on a platform where it was not tested
        if measured.system == "psyche":
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        result.notes.append(f"{measured.system} {measured.codec} is left out: it fails here ({reason})")
        return []
    result.rows += rows
    return rows


# ----------------------------------------------------------------------------------------- for people


class CodecLine(Row, frozen=True):
    """Both passes of a codec, for the table only."""

    system: Annotated[str, Column("system", left=True)]
    codec: Annotated[str | None, Column("codec", left=True)]
    backend: Annotated[str, Column("backend", left=True)]
    bits_per_param: Annotated[float | None, Column("bits\n/param", ".3f")]
    ratio: Annotated[float | None, Column("ratio", "{:.1f}×".format)]
    encode: Annotated[float, Column("encode\nGB/s", gbps_text)]
    encode_share: Annotated[float | None, Column("% of\ncopy", percent)]
    decode: Annotated[float, Column("decode+add\nGB/s", gbps_text)]
    decode_share: Annotated[float | None, Column("% of\ncopy", percent)]
    rel_l2_gaussian: Annotated[float | None, Column("rel. L2\nGaussian", ".4f")]
    rel_l2_real: Annotated[float | None, Column("rel. L2\nreal", ".4f")]
    parameters: Annotated[int, Column("parameters\ntimed", amount)]


def codec_lines(rows: Sequence[CodecRow]) -> list[CodecLine]:
    """Join the two rows of each codec."""
    coded = [row for row in rows if row.pass_ != "outer"]
    pairs = [list(pair) for _, pair in groupby(coded, key=lambda row: (row.system, row.codec, row.backend))]
    return [
        CodecLine.of(
            encode,
            ratio=32 / encode.bits_per_param if encode.bits_per_param else None,
            encode=encode.gbps,
            encode_share=encode.share_of_copy,
            decode=decode.gbps,
            decode_share=decode.share_of_copy,
        )
        for encode, decode in pairs
    ]


def show(result: Result[CodecRow], console: Console) -> None:
    """Print the tables, how to read them, and how psyche compares with hivemind."""
    console.print(_preface(result.rows), highlight=False, markup=False)
    console.print(table("Codecs", codec_lines(result.rows), section=lambda line: line.system))
    console.print()
    outer = [row for row in result.rows if row.pass_ == "outer"]
    console.print(table("Outer step (Nesterov) with copy to local parameters", outer))
    for line in [*against_rival(result.rows), *result.notes]:
        console.print(line, highlight=False, markup=False)


def against_rival(rows: Sequence[CodecRow]) -> list[str]:
    """``int8 (native): encode 22×, decode_add 14× hivemind Uniform8Bit`` for each codec, on its fastest backend.

    Empty if the rival was not measured.
    """
    rival = {row.pass_: row.gbps for row in rows if (row.system, row.codec) == RIVAL}
    if not rival:
        return []
    ours: dict[str, dict[str, dict[Pass, float]]] = {}
    for row in rows:
        if row.system == "psyche" and row.codec is not None:
            ours.setdefault(row.codec, {}).setdefault(row.backend, {})[row.pass_] = row.gbps
    lines = []
    for codec, of_backend in ours.items():
        backend = max(of_backend, key=lambda name: of_backend[name]["encode"])
        compared = ", ".join(f"{which} {times(of_backend[backend][which] / rival[which])}" for which in rival)
        lines.append(f"{codec} ({backend}): {compared} {' '.join(RIVAL)}")
    return lines


def _preface(rows: Sequence[CodecRow]) -> str:
    copies = [row.copy_gbps for row in rows]
    size = max(row.parameters for row in rows)
    return f"""\
{amount(size)} parameters in slices of {amount(min(size, SLICE))}, {plural(rows[0].threads, "thread")}; slow codecs on \
fewer.
GB/s        of fp32 parameters, 4 bytes each, in the median repetition
% of copy   bytes that a fused pass must move, against a copy in turns with it: median {median(copies):.1f} GB/s,
            {min(copies):.1f} to {max(copies):.1f}, read + written. A copy also reads what it overwrites, so that a pass
            in place may exceed 100 %
encode      base − local, error feedback (psyche's codecs but fp32), quantize, make the payload. Rivals have no error
            feedback, and all but hivemind stop at tensors: making bytes of them is not timed.
decode+add  out += weight × decoded; a sparse codec touches only the kept values, so it has no share
rel. L2     ‖x − D(Q(x))‖ / ‖x‖ without error feedback, which would send the loss later
real        a pseudo-gradient of a small Llama trained in this run (H = {INNER_STEPS}, round {ROUNDS})
{PATCHED if any(row.system == "hivemind" for row in rows) else ""}"""


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the notices of rivals about optional packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)

"""The codec bench's rows, and the tables and sentences made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import msgspec
from rich.table import Table

from psyche.bench.codec.timing import Pass
from psyche.telemetry.formatting import amount, number

RIVAL = ("hivemind", "Uniform8Bit")
"""What others are compared with: the 8-bit codec of the library that volunteer training runs on."""


class Row(msgspec.Struct, frozen=True, kw_only=True, rename={"pass_": "pass"}):
    """One pass of one codec, or one outer step; a flat dict of JSON has these fields. None: it has no meaning there."""

    system: str
    codec: str | None
    """As its system calls it; None: psyche's outer step, which has no codec."""
    backend: str
    """``torch``, ``native`` or ``cuda``; ``cpu`` for others."""
    pass_: Pass
    gbps: float
    """1e9 bytes of fp32 parameters (4 each) a second, in the median repetition."""
    share_of_copy: float | None
    """Bytes that the pass has to move, fused, over bytes that a copy moves in the same time; see
    :func:`~psyche.bench.codec.timing.bytes_per_parameter`. Median over pairs of neighbouring repetitions."""
    bits_per_param: float | None
    """Of a payload of Gaussian values, header and scales included. Entropy coding finds more to save in real ones."""
    rel_l2_gaussian: float | None
    rel_l2_real: float | None
    """‖x − D(Q(x))‖ / ‖x‖ without error feedback, of the real pseudo-gradient."""
    parameters: int
    """On which it was timed."""
    threads: int
    copy_gbps: float
    """Bytes read and written by the copies between this row's repetitions."""
    seconds: float
    """Of the median repetition."""


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [msgspec.to_builtins(row) for row in rows]


def codec_table(rows: Sequence[Row]) -> Table:
    """Both passes of a codec on one line."""
    table = Table(title="Codecs", title_justify="left", title_style="bold", header_style="dim")
    for heading in ("system", "codec", "backend"):
        table.add_column(heading)
    for heading in ("bits\n/param", "ratio", "encode\nGB/s", "% of\ncopy", "decode+add\nGB/s", "% of\ncopy"):
        table.add_column(heading, justify="right")
    for heading in ("rel. L2\nGaussian", "rel. L2\nreal", "parameters\ntimed"):
        table.add_column(heading, justify="right")
    coded = [row for row in rows if row.pass_ != "outer"]
    for _, of_system in groupby(coded, key=lambda row: row.system):
        for _, of_codec in groupby(of_system, key=lambda row: (row.codec, row.backend)):
            table.add_row(*_cells({row.pass_: row for row in of_codec}))
        table.add_section()
    return table


def _cells(passes: dict[Pass, Row]) -> list[str]:
    encode, decode = passes["encode"], passes["decode_add"]
    bits = encode.bits_per_param
    return [
        encode.system,
        encode.codec or "–",
        encode.backend,
        number(bits),
        f"{32 / bits:.1f}×" if bits else "–",
        speed(encode.gbps),
        percent(encode.share_of_copy),
        speed(decode.gbps),
        percent(decode.share_of_copy),
        number(encode.rel_l2_gaussian, ".4f"),
        number(encode.rel_l2_real, ".4f"),
        amount(encode.parameters),
    ]


def outer_table(rows: Sequence[Row]) -> Table:
    """The outer steps."""
    title = "Outer step (Nesterov) with copy to local parameters"
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for heading in ("system", "as", "backend"):
        table.add_column(heading)
    for heading in ("GB/s", "% of copy", "parameters"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.pass_ == "outer":
            cells = [speed(row.gbps), percent(row.share_of_copy), amount(row.parameters)]
            table.add_row(row.system, row.codec or "–", row.backend, *cells)
    return table


def against_rival(rows: Sequence[Row]) -> list[str]:
    """``int8 (native): encode 22×, decode_add 14× hivemind Uniform8Bit`` for each codec, on its fastest backend.

    Empty where the rival was not measured.
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


def speed(gbps: float) -> str:
    """Three digits or so."""
    return f"{gbps:.3f}" if gbps < 1 else f"{gbps:.2f}"


def times(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio >= 1 else f"{ratio:.2g}×"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"

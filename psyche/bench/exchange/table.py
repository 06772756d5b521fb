"""The exchange bench's rows, and the table and sentences made of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from rich.table import Table

from psyche.bench.codec.table import percent, times
from psyche.telemetry.formatting import number


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One system, the median over its exchanges; a flat dict of JSON has these fields. None: not known, or no sense."""

    system: str
    """``psyche``, ``hivemind`` or ``gloo``."""
    exchange: str
    codec: str
    peers: int
    params: int
    rate_mbit: float | None
    """Of each link; None: not shaped."""
    up_mbit: float | None
    """Of each link's way up, where that is slower."""
    slow_mbit: float | None
    """Of the one slow peer's link, where there is one."""
    repeats: int
    seconds: float
    """From the word to begin until the last peer is done; the slow peer is not waited for."""
    slow_seconds: float | None
    """Until the slow peer is done, too. None: there is none, or it gave up and took over the others' state."""
    ideal_seconds: float | None
    """What the bytes take that must cross the busiest link."""
    share_of_line: float | None
    """ideal_seconds / seconds."""
    encode_seconds: float | None
    """Psyche's parts of an exchange, the slowest peer's: until its commitment is ready,"""
    wire_seconds: float | None
    """until all payloads are here, checked, voted on and certified,"""
    apply_seconds: float | None
    """until the outer step is taken and the new state hashed."""
    payload_bytes: int
    """Of one peer's vector, encoded."""
    bytes_up: int | None
    """TCP payload bytes of a peer, the median over peers."""
    bytes_up_max: int | None
    bytes_down: int | None
    bytes_down_max: int | None
    cpu_seconds: float
    """Of a peer's processes, the most over peers."""
    peak_rss_mb: float
    """Memory of a peer's processes, pages that they share counted once; the most over peers. 1e6 bytes."""
    rss_growth_mb: float
    """Peak less what was there before the exchange. The vectors were."""
    averaged: int
    """Peers whose vectors are in the result, the least over exchanges."""
    relative_error: float
    """‖result − mean‖ / ‖mean‖ over those peers."""
    matchmaking_seconds: float
    """What finding a group took before, where that is a system's way. Not in ``seconds``."""


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A list of flat dicts."""
    return [msgspec.to_builtins(row) for row in rows]


def table(rows: Sequence[Row]) -> Table:
    """One line a system."""
    shown = Table(title="Exchanges", title_justify="left", title_style="bold", header_style="dim")
    for heading in ("system", "exchange", "codec"):
        shown.add_column(heading)
    for heading in ("seconds", "ideal", "% of\nline", "encode", "wire", "apply", "MB up", "MB\ndown"):
        shown.add_column(heading, justify="right")
    for heading in ("CPU\nseconds", "peak\nMB", "growth\nMB", "in the\nmean", "relative\nerror"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(*_cells(row))
    return shown


def against_rivals(rows: Sequence[Row]) -> list[str]:
    """``psyche gather int8: 3.1× hivemind fp32, 0.9× gloo fp32`` (times as fast); empty without rivals."""
    rivals = [row for row in rows if row.system != "psyche"]
    lines = []
    for row in rows:
        if row.system == "psyche" and rivals:
            compared = ", ".join(f"{times(one.seconds / row.seconds)} {one.system} {one.codec}" for one in rivals)
            lines.append(f"psyche {row.exchange} {row.codec}: as fast as {compared}")
    return lines


def _cells(row: Row) -> list[str]:
    return [
        row.system,
        row.exchange,
        row.codec,
        _seconds(row.seconds) + ("" if row.slow_mbit is None else f" ({_seconds(row.slow_seconds)})"),
        _seconds(row.ideal_seconds),
        percent(row.share_of_line),
        _seconds(row.encode_seconds),
        _seconds(row.wire_seconds),
        _seconds(row.apply_seconds),
        _megabytes(row.bytes_up),
        _megabytes(row.bytes_down),
        number(row.cpu_seconds, ".2f"),
        number(row.peak_rss_mb, ".0f"),
        number(row.rss_growth_mb, ".0f"),
        f"{row.averaged} of {row.peers}",
        number(row.relative_error, ".1e"),
    ]


def _seconds(value: float | None) -> str:
    return number(value, ".3f" if value is not None and value < 10 else ".1f")


def _megabytes(count: int | None) -> str:
    return number(None if count is None else count / 1e6, ".1f")

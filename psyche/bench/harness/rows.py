"""Rows of a measurement: each field is declared once, with its JSON key, its heading and its format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, get_type_hints

import msgspec
from rich.console import Console
from rich.table import Table

from psyche.bench.harness.child_processes import sigterm_as_ctrl_c
from psyche.durable import disk_errors, write_durably
from psyche.telemetry.formatting import number

DASH = "–"


@dataclass(frozen=True)
class Column:
    """How a field of a row is shown. A field without one is in the JSON only."""

    heading: str
    form: str | Callable[[Any], str] = ""
    """A format specification, or a function from the value to its text. ``None`` is shown as a dash."""
    fold: Callable[[Sequence[Any]], str] | None = None
    """Makes one text of the values of a group of rows. Without it, the first row's value is shown."""
    after: str | None = None
    """For a property: the field whose column it follows. Without it, the property follows all fields."""
    left: bool = False
    """Whether the text is aligned to the left."""
    ends_section: bool = False
    """Whether a rule follows this line of a transposed table."""

    def text(self, values: Sequence[Any]) -> str:
        """Return the cell for the ``values`` of one group of rows."""
        if self.fold is not None:
            known = [value for value in values if value is not None]
            return self.fold(known) if known else DASH
        if values[0] is None:
            return DASH
        if callable(self.form):
            return self.form(values[0])
        return number(values[0], self.form) if self.form else str(values[0])


class Row(msgspec.Struct, frozen=True):
    """One result. Fields are the JSON keys; ``Annotated[type, Column(…)]`` fields and properties are columns."""

    @classmethod
    def of(cls, *sources: object, **given: object) -> Self:
        """Make a row. A field that is not ``given`` is read from the first source with an attribute of that name."""
        for name in cls.__struct_fields__:
            if name not in given:
                source = next((source for source in sources if hasattr(source, name)), None)
                given[name] = getattr(source, name)
        return cls(**given)


R = TypeVar("R", bound=Row)


@dataclass
class Result(Generic[R]):
    """The rows of a measurement, and sentences about what was left out or may have disturbed it."""

    rows: list[R] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def columns_of(kind: type[Row]) -> dict[str, Column]:
    """Return the columns of a kind of row by attribute name, in the order of the table."""
    # globalns: by default the names that a function in an annotation uses are looked up in the class only.
    hints = get_type_hints(kind, globalns=vars(sys.modules[kind.__module__]), include_extras=True)
    found = {name: _column(hints[name]) for name in kind.__struct_fields__}
    order = list(found)
    for name, member in ((name, member) for base in reversed(kind.__mro__) for name, member in vars(base).items()):
        if not isinstance(member, property) or member.fget is None:
            continue
        found[name] = column = _column(get_type_hints(member.fget, include_extras=True).get("return"))
        order.insert(order.index(column.after) + 1 if column and column.after else len(order), name)
    return {name: column for name in order if (column := found[name]) is not None}


def _column(hint: Any) -> Column | None:
    return next((item for item in getattr(hint, "__metadata__", ()) if isinstance(item, Column)), None)


def table(
    title: str, rows: Sequence[R], *, group: Callable[[R], Any] | None = None, section: Callable[[R], Any] | None = None
) -> Table:
    """Return a table with one line for each row, or for each run of neighbours whose ``group`` is equal.

    A rule is drawn where ``section`` changes.
    """
    made = _empty(title)
    columns = columns_of(type(rows[0]))
    for column in columns.values():
        made.add_column(column.heading, justify="left" if column.left else "right")
    lines = [list(found) for _, found in groupby(rows, key=group)] if group else [[row] for row in rows]
    for before, line in zip([None, *lines], lines, strict=False):
        if before is not None and section is not None and section(before[0]) != section(line[0]):
            made.add_section()
        made.add_row(*(column.text([getattr(row, name) for row in line]) for name, column in columns.items()))
    return made


def transposed_table(title: str, rows: Sequence[R], corner: str, heading: Callable[[R], str]) -> Table:
    """Return a table with one column for each row and one line for each field."""
    made = _empty(title)
    made.add_column(corner)
    for row in rows:
        made.add_column(heading(row), justify="right")
    for name, column in columns_of(type(rows[0])).items():
        cells = (column.text([getattr(row, name)]) for row in rows)
        made.add_row(column.heading, *cells, end_section=column.ends_section)
    return made


def _empty(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="dim")


# ------------------------------------------------------------------------------------------- formats


def percent(share: float) -> str:
    """``0.123`` as ``12.3``."""
    return f"{100 * share:.1f}"


def thousands(count: float) -> str:
    """``1234567`` as ``1,234,567``."""
    return f"{count:,.0f}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"


def times(ratio: float) -> str:
    """``3.14159`` as ``3.1×``."""
    return f"{ratio:.1f}×" if ratio >= 1 else f"{ratio:.2g}×"


# -------------------------------------------------------------------------------------------- output


def to_json(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows as flat dicts."""
    return [msgspec.to_builtins(row) for row in rows]


def write_json(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as a list of flat dicts. Raises ``PsycheError``."""
    with disk_errors(path):
        write_durably(path, msgspec.json.format(msgspec.json.encode(to_json(rows))) + b"\n")


def require_folder(path: Path | None) -> None:
    """Create the folder of ``path`` before the measurement rather than after it. Raises ``PsycheError``."""
    if path is not None:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)


def wide_console(columns: int = 132) -> Console:
    """Return a console on stdout with at least ``columns`` columns: a wrapped line is easier to read than a narrow
    cell."""
    console = Console()
    console.width = max(console.width, columns)
    return console


Measured = TypeVar("Measured")


def run_bench(
    json: Path | None,
    measure: Callable[[], Measured],
    rows: Callable[[Measured], Sequence[Row]],
    show: Callable[[Measured, Console], None],
    *,
    columns: int = 132,
) -> None:
    """Measure, write the rows to ``json``, and show them on stdout. SIGTERM stops it like Ctrl-C.

    Raises ``PsycheError``.
    """
    require_folder(json)
    with sigterm_as_ctrl_c():
        measured = measure()
    if json is not None:
        write_json(json, rows(measured))
    show(measured, wide_console(columns))

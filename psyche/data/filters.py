"""Which rows of a dataset are kept: conditions that a configuration states, none of them code."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from psyche.config import Filter
from psyche.errors import PsycheError

_OPERATORS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda found, values: found in values,
    "not in": lambda found, values: found not in values,
    "min_length": lambda found, length: len(found) >= length,
    "max_length": lambda found, length: len(found) <= length,
}


def passes(row: Mapping[str, Any], filters: Sequence[Filter]) -> bool:
    """Whether ``row`` meets all conditions. Raises :class:`PsycheError` for a column that is not there or that
    cannot be compared."""
    return all(_holds(row, condition) for condition in filters)


def _holds(row: Mapping[str, Any], condition: Filter) -> bool:
    if condition.column not in row:
        raise PsycheError(
            f"data.source.filters: there is no column {condition.column!r}; the columns are {', '.join(sorted(row))}"
        )
    found = row[condition.column]
    try:
        return found is not None and bool(_OPERATORS[condition.op](found, condition.value))
    except TypeError:
        raise PsycheError(
            f"data.source.filters: column {condition.column!r} holds {type(found).__name__}, which "
            f"{condition.op!r} {condition.value!r} cannot be asked of: correct the filter"
        ) from None

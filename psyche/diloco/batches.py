"""The sequences of the run's text that one node trains on: of a round those that it was dealt, before its first round
some of those that come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from psyche.config import Run
from psyche.data.store import Split
from psyche.errors import PsycheError
from psyche.protocol.assignment import positions, sequences
from psyche.protocol.messages import Plan
from psyche.telemetry.events import PrivacySpent
from psyche.training.engine import Batch


class DataAssignment:
    """One node's."""

    def __init__(self, run: Run, split: Split, node: str) -> None:
        self._run, self._split, self._node = run, split, node
        self._dealt: tuple[Plan, range] | None = None
        """Its positions in the round that was asked for last: they take a sort of the members to find."""

    def of_round(self, plan: Plan, step: int) -> Batch:
        """Of inner step ``step`` in round ``plan``. Raises :class:`~psyche.data.store.BadShard`."""
        size = self._run.inner.batch_size
        if self._dealt is None or self._dealt[0] is not plan:
            self._dealt = plan, positions(plan, self._node, size, self._run.overlap.overlap_steps)
        return self._at(self._dealt[1][step * size : (step + 1) * size])

    def to_warm_up(self, position: int, step: int) -> Batch:
        """Of step ``step`` before the first round, where the run stands at ``position``: what it trains on next is
        here already."""
        start = position + step * self._run.inner.batch_size
        return self._at(range(start, start + self._run.inner.batch_size))

    def _at(self, span: range) -> Batch:
        return self._split.batch(sequences(span, self._split.shape, self._run.seed))


class PrivacyBudgetSpent(PsycheError):
    """The node's privacy budget allows no further round."""


class PrivateData(Protocol):
    """A node's own text in federated mode, and the rules for publishing what was trained on it.

    ``psyche/federated/`` implements this; a replica without one trains on the run's text.
    """

    def batch(self, size: int) -> Batch:
        """Return the next ``size`` sequences to train on."""

    def require_budget(self) -> None:
        """Raise :class:`PrivacyBudgetSpent` if the budget allows no further round."""

    def privatise(self, theta: Tensor, local: Tensor, parts: Sequence[slice]) -> None:
        """Charge the budget for one release, then clip and noise θ − ``local`` in ``parts``, in place in ``local``."""

    def account(self, round_number: int) -> PrivacySpent:
        """Report the budget spent after ``round_number``, and what is left."""

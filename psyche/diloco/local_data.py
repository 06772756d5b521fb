"""Where one node's training sequences come from: the run's data assignment, or private text in federated mode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from psyche.config import Run
from psyche.data.token_store import Split
from psyche.errors import PsycheError
from psyche.protocol.assignment import positions, sequences
from psyche.protocol.messages import Plan
from psyche.telemetry.events import PrivacySpent
from psyche.training.engine import Batch


class DataAssignment:
    """The sequences of the run's training split that are assigned to one node."""

    def __init__(self, run: Run, split: Split, node: str) -> None:
        self._run, self._split, self._node = run, split, node
        self._positions: tuple[Plan, range] | None = None
        """The node's positions in the last round asked for. Finding them sorts the members, so they are kept."""

    def round_batch(self, plan: Plan, step: int) -> Batch:
        """Return the batch of inner step ``step`` in ``plan``'s round. Raises ``BadShard``."""
        size = self._run.inner.batch_size
        if self._positions is None or self._positions[0] is not plan:
            self._positions = plan, positions(plan, self._node, size, self._run.overlap.overlap_steps)
        return self._batch(self._positions[1][step * size : (step + 1) * size])

    def warm_up_batch(self, position: int, step: int) -> Batch:
        """Return the batch of warm-up step ``step`` for a node that joins a run at ``position`` in the data.

        It is text that the run trains on next, so its shards are here or being fetched.
        """
        start = position + step * self._run.inner.batch_size
        return self._batch(range(start, start + self._run.inner.batch_size))

    def _batch(self, span: range) -> Batch:
        return self._split.batch(sequences(span, self._split.layout, self._run.seed))


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

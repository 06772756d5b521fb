"""Federated mode (DESIGN §9): a node that trains on its own text, and what of it leaves the node's replica."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from psyche.config import Manifest, Node
from psyche.data.store import TokenStore
from psyche.errors import ConfigError, PsycheError
from psyche.federated.gaussian_mechanism import privatise
from psyche.federated.privacy_budget import NAME, Budget, noise_for
from psyche.federated.private_text import PrivateText, prepare_private
from psyche.telemetry.events import PrivacySpent
from psyche.training.engine import Batch

DIRECTORY = "private"
"""Of the tokens, in the node's directory."""


class Private:
    """A node's own text, the norm that its pseudo-gradients are clipped to, and the budget that they are paid from."""

    def __init__(self, text: PrivateText, budget: Budget, clip: float, rounds: int) -> None:
        """``rounds`` are those of the run."""
        self._text, self._budget, self._clip, self._rounds = text, budget, clip, rounds

    def batch(self, size: int) -> Batch:
        """The next sequences to train on."""
        return self._text.batch(size)

    def require_budget(self) -> None:
        """Raise :class:`~psyche.diloco.local_data.PrivacyBudgetSpent` where no round is left in the budget."""
        self._budget.require()

    def privatise(self, theta: Tensor, local: Tensor, parts: Sequence[slice]) -> None:
        """Pay for one release, then put it in place of what was trained: ``privatise`` says how."""
        self._budget.charge()
        privatise(theta, local, parts, clip=self._clip, noise_multiplier=self._budget.noise_multiplier)

    def account(self, round_number: int) -> PrivacySpent:
        """What is spent after ``round``, and what is left."""
        budget = self._budget
        return PrivacySpent(
            round=round_number,
            epsilon=budget.spent,
            budget=budget.epsilon,
            delta=budget.delta,
            rounds_left=budget.rounds_left(self._rounds),
        )


def check_private(manifest: Manifest, node: Node, directory: Path) -> Budget | None:
    """The budget of a node that trains on text of its own; None for another.

    Raises :class:`PsycheError` where run or directory do not allow it, or the budget is spent.
    """
    run, private = manifest.run, node.private
    if private is None:
        if (directory / NAME).exists():
            raise PsycheError(
                f"the node in {directory} has trained on private data, which its optimizer has not forgotten: join "
                "with --private-data again, or with another --directory"
            )
        return None
    if run.federated is None:
        raise ConfigError(
            f"run {run.name} takes no contributions from private data: its author allows them with run.federated"
        )
    noise = private.noise_multiplier or noise_for(private.epsilon, private.delta, run.rounds.total)
    budget = Budget(directory, private.epsilon, private.delta, noise)
    budget.require()
    return budget


def open_private(manifest: Manifest, node: Node, directory: Path, store: TokenStore, budget: Budget) -> Private:
    """The node's own text, encoded like the run's. Raises :class:`PsycheError` where it cannot be."""
    assert node.private is not None
    assert manifest.run.federated is not None
    text = prepare_private(node.private.path, directory / DIRECTORY, store.index, store.tokenizer_path)
    return Private(text, budget, manifest.run.federated.clip, manifest.run.rounds.total)

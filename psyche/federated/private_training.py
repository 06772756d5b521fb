"""The private data of a node in federated mode: its text, the clipping norm, and the privacy budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from psyche.config import Manifest, Node
from psyche.data.token_store import TokenStore
from psyche.errors import ConfigError, PsycheError
from psyche.federated.gaussian_mechanism import privatise
from psyche.federated.privacy_budget import NAME, Budget, noise_for
from psyche.federated.private_text import PrivateText, prepare_private
from psyche.telemetry.events import PrivacySpent
from psyche.training.engine import Batch

DIRECTORY = "private"
"""Directory of the tokens in the node's directory."""


class PrivateTraining:
    """Implements :class:`~psyche.diloco.local_data.PrivateData` for one node."""

    def __init__(self, text: PrivateText, budget: Budget, clip: float, rounds: int) -> None:
        """``clip`` is the L2 norm that pseudo-gradients are clipped to, ``rounds`` the total rounds of the run."""
        self._text, self._budget, self._clip, self._rounds = text, budget, clip, rounds

    def batch(self, size: int) -> Batch:
        """Return the next ``size`` sequences to train on."""
        return self._text.batch(size)

    def require_budget(self) -> None:
        """Raise :class:`~psyche.diloco.local_data.PrivacyBudgetSpent` if the budget allows no further round."""
        self._budget.require()

    def privatise(self, theta: Tensor, local: Tensor, parts: Sequence[slice]) -> None:
        """Charge the budget for one release, then clip and noise θ − ``local`` in ``parts``, in place in ``local``."""
        self._budget.charge()
        privatise(theta, local, parts, clip=self._clip, noise_multiplier=self._budget.noise_multiplier)

    def account(self, round_number: int) -> PrivacySpent:
        """Report the budget spent after ``round_number``, and the rounds left."""
        budget = self._budget
        return PrivacySpent(
            round=round_number,
            epsilon=budget.spent,
            budget=budget.epsilon,
            delta=budget.delta,
            rounds_left=budget.rounds_left(self._rounds),
        )


def open_privacy_budget(manifest: Manifest, node: Node, directory: Path) -> Budget | None:
    """Open the privacy budget of a node with private data; return None for any other node.

    Raises :class:`PsycheError` if the run or the directory does not allow private data, or the budget is spent.
    """
    run, private = manifest.run, node.private
    if private is None:
        if (directory / NAME).exists():
            raise PsycheError(
                f"the node in {directory} has trained on private data, which its optimizer state may reveal: join with "
                "--private-data again, or use another --directory"
            )
        return None
    if run.federated is None:
        raise ConfigError(
            f"run {run.name} does not accept contributions from private data: its author must set run.federated"
        )
    noise = private.noise_multiplier or noise_for(private.epsilon, private.delta, run.rounds.total)
    budget = Budget(directory, private.epsilon, private.delta, noise)
    budget.require()
    return budget


def open_private_training(
    manifest: Manifest, node: Node, directory: Path, store: TokenStore, budget: Budget
) -> PrivateTraining:
    """Tokenise the node's text like the run's data. Raises :class:`PsycheError`."""
    assert node.private is not None
    assert manifest.run.federated is not None
    text = prepare_private(node.private.path, directory / DIRECTORY, store.index, store.tokenizer_path)
    return PrivateTraining(text, budget, manifest.run.federated.clip, manifest.run.rounds.total)

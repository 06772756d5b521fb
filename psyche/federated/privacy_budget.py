"""The privacy budget that a node has spent, on disk before each release.

Opacus' accountant computes it: Rényi DP of the Gaussian mechanism (arXiv 1702.07476), converted to (ε, δ) by Balle et
al. (arXiv 1905.09982, Theorem 21). It is a closed-form upper bound for any noise and any number of rounds.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from psyche.diloco.local_data import PrivacyBudgetSpent
from psyche.durable import disk_errors, make_private_directory, write_durably
from psyche.errors import PsycheError

NAME = "privacy.json"
"""File in a node's directory. If it exists, the node has trained on private data."""


class Charge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number of releases with the same noise multiplier."""

    noise_multiplier: Annotated[float, Meta(gt=0)]
    releases: Annotated[int, Meta(ge=1)]


class Budget:
    """The privacy budget (ε, δ) of one node in one run. Each round's release is charged to it."""

    def __init__(self, directory: Path, epsilon: float, delta: float, noise_multiplier: float) -> None:
        """Continue from what was spent in ``directory`` before, whatever budget and noise were configured then.

        ``directory`` is closed to other users of the machine: checkpoints hold the inner optimizer's moments, which can
        reveal the text. Raises :class:`PsycheError` if it cannot be closed, if the file cannot be read, or if Opacus is
        not installed.
        """
        self.epsilon, self.delta, self.noise_multiplier = epsilon, delta, noise_multiplier
        self._path = directory / NAME
        with disk_errors(directory, "--directory"):
            make_private_directory(directory)
        there = _read(self._path)
        self._charges = [] if there is None else there
        if there is None:
            self._write()

    @property
    def spent(self) -> float:
        """ε spent so far."""
        return epsilon_of(self._charges, self.delta)

    def rounds_left(self, most: int) -> int:
        """Return how many more releases the budget allows, up to ``most``."""

        def after(releases: int) -> float:
            return epsilon_of(_with(self._charges, self.noise_multiplier, releases), self.delta)

        return max(0, bisect_right(range(most + 1), self.epsilon, key=after) - 1)

    def require(self) -> None:
        """Raise :class:`PrivacyBudgetSpent` if the budget allows no further release."""
        if not self.rounds_left(1):
            raise PrivacyBudgetSpent(
                f"the privacy budget is spent: ε is {self.spent:.3g} of {self.epsilon:g} at δ = {self.delta:g}, and "
                "one more round would take it above; this node trains no more on its private data in this run"
            )

    def charge(self) -> None:
        """Charge one release. It is on disk when this returns: a crash afterwards refunds nothing.

        Raises :class:`PrivacyBudgetSpent` if the budget allows no further release.
        """
        self.require()
        self._charges = _with(self._charges, self.noise_multiplier, 1)
        self._write()

    def _write(self) -> None:
        with disk_errors(self._path, "--directory"):
            write_durably(self._path, msgspec.json.encode(self._charges))


def epsilon_of(charges: list[Charge], delta: float) -> float:
    """Return ε of all ``charges`` together at ``delta``, by Opacus' RDP accountant."""
    if not charges:
        return 0.0
    accountant = _accountant()
    accountant.history = [(charge.noise_multiplier, 1.0, charge.releases) for charge in charges]
    with warnings.catch_warnings():
        # At the ends of the range of orders the bound is looser but still valid.
        warnings.filterwarnings("ignore", "Optimal order")
        return float(accountant.get_epsilon(delta))


def noise_for(epsilon: float, delta: float, releases: int) -> float:
    """Return the noise multiplier with which ``releases`` spend at most ``epsilon``, to within min(0.01, ε / 1000)."""
    _accountant()
    from opacus.accountants.utils import get_noise_multiplier

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order")
        tolerance = min(0.01, epsilon / 1000)
        try:
            return float(
                get_noise_multiplier(
                    target_epsilon=epsilon,
                    target_delta=delta,
                    sample_rate=1.0,
                    steps=releases,
                    accountant="rdp",
                    epsilon_tolerance=tolerance,
                )
            )
        except ValueError as error:  # raised if no noise can keep the budget
            raise PsycheError(f"a privacy budget of ε = {epsilon:g} at δ = {delta:g} is too low: {error}") from None


def _accountant() -> Any:
    try:  # imported here because it takes a second or two
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise PsycheError(
            f"training on private data needs Opacus for privacy accounting ({error}): pip install 'psyche[private]'"
        ) from None
    return RDPAccountant()


def _with(charges: list[Charge], noise_multiplier: float, releases: int) -> list[Charge]:
    if not releases:
        return charges
    if charges and charges[-1].noise_multiplier == noise_multiplier:
        return [*charges[:-1], Charge(noise_multiplier, charges[-1].releases + releases)]
    return [*charges, Charge(noise_multiplier, releases)]


def _read(path: Path) -> list[Charge] | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Charge])
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PsycheError(
            f"cannot read the spent privacy budget from {path} ({error}): restore the file from a backup, or do not "
            "train on this text in this run again"
        ) from None

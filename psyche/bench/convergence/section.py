"""A section of the convergence bench: trials to run, the rows made of their outcomes, and the table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from rich.console import Console

from psyche.bench.convergence.trial import CENTRE, Outcome, Setting, Trial
from psyche.bench.convergence.trial_pool import run_all
from psyche.bench.harness.progress_lines import progress_lines
from psyche.bench.harness.rows import Row, run_bench
from psyche.bench.harness.turns import percent_above
from psyche.data.prepare import Report, prepare
from psyche.errors import PsycheError
from psyche.telemetry.formatting import amount

R = TypeVar("R", bound=Row)
Preparing = Callable[[], AbstractContextManager[Report | None]]
"""Shows the progress of preparing the corpus, which happens once."""
Outcomes = Mapping[Trial, Outcome]


@dataclass(frozen=True)
class Item:
    """A planned row: a trial, and the trial that it is compared with."""

    trial: Trial
    reference: Trial | None = None
    comparison: str = ""
    """The table in which the row stands, if the section has several."""

    @property
    def name(self) -> str:
        """The name that ``--only`` searches: ``equal-tokens/diloco-int8/k4/1280-steps/lr0.7/mu0.7/H10/seed0``."""
        return "/".join(filter(None, [self.comparison.replace(" ", "-"), self.trial.label]))

    def against_reference(self, outcomes: Outcomes) -> float | None:
        """By how many percent the loss is above the reference's. ``None`` if ``--only`` left out the reference."""
        reference = outcomes.get(self.reference) if self.reference else None
        return percent_above(outcomes[self.trial].heldout_loss, reference.heldout_loss) if reference else None


@dataclass(frozen=True)
class Section(ABC, Generic[R]):
    """One size of a section."""

    setting: Setting

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """Yield all rows to measure in the order of the tables; seeds of one setting are neighbours."""

    def tokens_of(self, steps: int) -> int:
        """Tokens of a trial of ``CENTRE`` nodes that take ``steps`` inner steps each."""
        return CENTRE * steps * self.setting.inner.batch_size * self.setting.data.sequence_length

    def preface(self, parameters: int, steps: int, seeds: Sequence[int], details: str) -> str:
        """Describe what all trials have in common, followed by ``details``."""
        setting, inner, tokens = self.setting, self.setting.inner, self.tokens_of(steps)
        return (
            f"{amount(parameters)} parameters, {amount(tokens)} tokens ({tokens / parameters:.1f} per parameter) at "
            f"equal tokens; a node's batch is {inner.batch_size} sequences of {setting.data.sequence_length}; inner lr "
            f"{inner.lr:g}, {inner.schedule}, warm-up {setting.warmup:.0%}. Seeds {', '.join(map(str, seeds))}: losses "
            f"± half their range. Loss: nats per token on {setting.heldout_sequences} held-out sequences. {details}\n"
        )

    @abstractmethod
    def rows(self, items: Sequence[Item], outcomes: Outcomes) -> list[R]:
        """Make the rows of ``items``."""

    @abstractmethod
    def show(self, rows: Sequence[R], console: Console) -> None:
        """Print the tables and how to read them."""

    def measure(self, only: str | None = None) -> list[R]:
        """Run every different trial once, on all cores. The corpus should be prepared.

        ``only`` keeps the rows whose name contains it. Raises :class:`PsycheError` if none does.
        """
        items = list(self.items())
        wanted = [item for item in items if only is None or only in item.name]
        if not wanted:
            raise PsycheError(f"no row has {only!r} in its name; names are like {items[0].name} and {items[-1].name}")
        return self.rows(wanted, self._outcomes({item.trial for item in wanted}))

    def _outcomes(self, trials: set[Trial]) -> Outcomes:
        width, ended = max(len(trial.label) for trial in trials), 0
        with progress_lines("training", sum(trial.batches for trial in trials)) as say:

            def done(trial: Trial, outcome: Outcome) -> None:
                nonlocal ended
                ended += 1
                line = f"{trial.label:{width}} loss {outcome.heldout_loss:.4f}  {outcome.seconds:4.0f} s"
                say(f"{ended:3}/{len(trials)}  {line}", trial.batches)

            return run_all(self.setting, trials, done)

    def prepare_and_measure(self, only: str | None, preparing: Preparing) -> list[R]:
        """Prepare the corpus and :meth:`measure`. Raises ``PsycheError``."""
        prepare_corpus(self.setting, preparing)
        return self.measure(only)

    def main(self, json: Path | None, *, only: str | None = None, preparing: Preparing = nullcontext) -> None:
        """Prepare the corpus, measure, write the rows to ``json`` and print the tables. Raises ``PsycheError``."""
        run_bench(json, lambda: self.prepare_and_measure(only, preparing), list, self.show)


def prepare_corpus(setting: Setting, preparing: Preparing) -> None:
    """Prepare the setting's corpus unless it is in the cache. Raises ``PsycheError``."""
    with preparing() as report:
        prepare(setting.data, setting.cache.expanduser(), vocab_limit=setting.model.vocab_size, progress=report)

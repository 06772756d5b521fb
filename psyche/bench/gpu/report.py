"""The report, as Markdown for people and JSON for programs, saved after every result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from psyche.bench.gpu.environment import Budget
from psyche.bench.gpu.equality import Difference
from psyche.bench.gpu.timing import BAR, Timing
from psyche.bench.gpu.training import LOOP, Speed
from psyche.durable import write_durably


class Report:
    """``gpu_check.md`` and ``gpu_check.json`` in a directory. Every change is followed by :meth:`save`."""

    def __init__(self, directory: Path, budget: Budget, *, timed: bool) -> None:
        """Without ``timed``, the Markdown leaves out times, which say nothing about a GPU."""
        self._directory, self._budget, self._timed = directory, budget, timed
        self._saving = Lock()
        self.system: dict[str, str] = {}
        self.expected: dict[str, int] = {}
        """Number of planned comparisons, by codec."""
        self.compared: dict[str, list[int]] = {}
        """Sizes at which a codec, or the outer step, was compared."""
        self.differences: dict[str, list[Difference]] = {}
        self.timings: list[Timing] = []
        self.speeds: list[Speed] = []
        self.left_out: list[str] = []
        self.failures: list[str] = []
        self.running: str | None = "starting"
        """The running step. ``None`` when the check is done."""
        self.stopped: str | None = None
        """Why the check ended early."""

    @property
    def all_compared(self) -> bool:
        return bool(self.expected) and all(
            len(self.compared.get(name, [])) == number for name, number in self.expected.items()
        )

    def save(self) -> str:
        """Write both files atomically. Returns the Markdown."""
        with self._saving:  # the thread that watches the time saves, too
            text = "\n".join(self._lines()).rstrip() + "\n"
            self._directory.mkdir(parents=True, exist_ok=True)
            content = json.dumps(self._content(), indent=1, ensure_ascii=False) + "\n"
            write_durably(self._directory / "gpu_check.json", content.encode())
            write_durably(self._directory / "gpu_check.md", text.encode())
            return text

    def verdict(self) -> str:
        """Summarise the comparisons in a sentence."""
        if any(self.differences.values()):
            return "Some bits differ from the definition."
        done, planned = sum(map(len, self.compared.values())), sum(self.expected.values())
        if not planned:
            return "Kernels were not compared with the definition."
        if not self.all_compared:
            return f"No difference in {done} of {planned} comparisons with the definition; the others were not made."
        return "Every bit is as defined."

    def bits(self, name: str) -> str:
        """``equal``, ``DIFFERENT``, or ``not compared``."""
        if self.differences.get(name):
            return "DIFFERENT"
        return "equal" if self.compared.get(name) else "not compared"

    def _content(self) -> dict[str, Any]:
        wrong = {name: [str(one) for one in found] for name, found in self.differences.items() if found}
        return {
            "system": self.system,
            "verdict": self.verdict(),
            "running": self.running,
            "stopped": self.stopped,
            "seconds": round(self._budget.used, 1),
            "budget_seconds": self._budget.seconds,
            "left_out": self.left_out,
            "failures": self.failures,
            "compared": self.compared,
            "differences": wrong,
            "rows": [self._timing_row(timing) for timing in self.timings],
            "training": [_speed_row(speed) for speed in self.speeds],
        }

    def _timing_row(self, timing: Timing) -> dict[str, Any]:
        return {
            "system": "psyche",
            "codec": timing.codec,
            "backend": "cuda",
            "device": self.system.get("device"),
            "pass": timing.step,
            "bits": self.bits(timing.codec),
            "elements": timing.elements,
            "bytes_moved": timing.bytes_moved,
            "milliseconds": timing.seconds * 1e3,
            "gbps": timing.gbps,
            "copy_gbps": timing.copy_gbps,
            "share_of_copy": timing.share_of_copy,
        }

    # -------------------------------------------------------------------------------------- Markdown

    def _lines(self) -> Iterator[str]:
        yield from ("# GPU check", "", *(f"- {key}: {value}" for key, value in self.system.items()))
        yield from (f"- time: {self._budget.used:.0f} s of {self._budget.seconds:.0f} s", "")
        if self.stopped or self.running:
            yield from (f"**Not finished: {self.stopped or f'this was written during {self.running}'}.**", "")
        yield from (self.verdict(), "")
        yield from _list("Failed", self.failures)
        yield from _list("Left out", self.left_out)
        if self.compared:
            yield from ("## Kernels against the definition", "", "| codec | elements | bits |", "|---|---|---|")
            for name, sizes in self.compared.items():
                yield f"| {name} | {', '.join(f'{size:,}' for size in sizes)} | {self.bits(name)} |"
            yield ""
        found = [f"{name}: {one}" for name, some in self.differences.items() for one in some]
        yield from _list("Differences", found)
        if self.timings:
            yield from self._timing_lines()
        if self.speeds:
            yield from self._speed_lines()

    def _timing_lines(self) -> Iterator[str]:
        yield from (f"## Kernel times, {self.timings[0].elements:,} elements", "")
        if self._timed:
            best = max(timing.copy_gbps for timing in self.timings)
            yield from (f"The fastest device-to-device copy reads and writes {best:,.0f} GB/s.", "")
        yield from _head("codec", "pass", "bits", "ms", "GB/s of fp32", "share of copy", left=3)
        for timing in self.timings:
            times = [f"{timing.seconds * 1e3:.3f}", f"{timing.gbps:.1f}", _share(timing)] if self._timed else ["–"] * 3
            yield _line(timing.codec, timing.step, self.bits(timing.codec), *times)
        yield ""

    def _speed_lines(self) -> Iterator[str]:
        loops = {speed.model: speed.tokens_per_second for speed in self.speeds if speed.way == LOOP}
        headings = ("model", "way", "parameters", "precision", "batch", "micro-batch", "tokens/s", "of the loop")
        yield from ("## Training speed", "")
        yield from _head(*headings, "ms per step", "peak memory", "FLOP utilisation", "first loss", "last loss", left=2)
        for one in self.speeds:
            times = ["–"] * 3
            if self._timed:
                loop = loops.get(one.model)
                ratio = f"{one.tokens_per_second / loop:.2f}×" if loop else "–"
                times = [f"{one.tokens_per_second:,.0f}", ratio, f"{one.seconds / one.steps * 1e3:.1f}"]
            batch, parameters = f"{one.sequences} × {one.length}", f"{one.parameters:,}"
            peak = "–" if one.peak_bytes is None else f"{one.peak_bytes / 2**30:.2f} GiB"
            used = "–" if one.utilisation is None else f"{one.utilisation:.1%}"
            settings = [one.model, one.way, parameters, one.precision, batch, str(one.micro_batch)]
            yield _line(*settings, *times, peak, used, f"{one.first_loss:.4f}", f"{one.last_loss:.4f}")
        yield ""


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*headings: str, left: int) -> list[str]:
    """Return the first two lines of a table; the first ``left`` columns are text."""
    return [_line(*headings), _line(*["---"] * left, *["---:"] * (len(headings) - left))]


def _list(title: str, entries: list[str]) -> Iterator[str]:
    if entries:
        yield from (f"## {title}", "", *(f"- {entry}" for entry in entries), "")


def _share(timing: Timing) -> str:
    share = timing.share_of_copy
    judged = timing.step != "check"  # where little is read, the launch is what takes time
    return f"{share:.0%} (below {BAR:.0%})" if judged and share < BAR else f"{share:.0%}"


def _speed_row(speed: Speed) -> dict[str, Any]:
    return asdict(speed) | {"tokens_per_second": speed.tokens_per_second}

"""Measure replay errors between honest nodes, and of frauds.

A reference node and a peer train some rounds together. Each segment between two trace points of the reference is then
replayed from the same state on the same batches by every kind of node available here, and claimed by every kind of
fraud. An error is that of an audit: ``audit/replay.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from psyche.audit.replay_error import NEGLIGIBLE_ERROR, drift_without_gradients, relative_error, tolerant_error
from psyche.config import Run
from psyche.data.token_store import TokenStore
from psyche.diloco.trace import trace_point_steps
from psyche.numerics.outer import OuterState, outer_step
from psyche.protocol.assignment import sequences
from psyche.training.engine import Batch, Engine
from psyche.training.optimizer_state import Moments, muon_parameters, pack_state
from psyche.training.schedules import learning_rate

ONE_STEP, TENTH, HALF = "one step left out", "a tenth left out", "half the steps"
OTHER, COPY, NOISE = "other data", "a copied peer", "noise"
FRAUDS = (ONE_STEP, TENTH, HALF, OTHER, COPY, NOISE)
"""Frauds, by how much of the work was done. Omitted steps are compensated by scaling; noise has the norm of
honest work."""


@dataclass(frozen=True)
class NodeKind:
    """A kind of node: the hardware and settings that change what a step computes."""

    name: str
    device: str
    threads: int
    precision: str
    compiled: bool = False


def available_node_kinds(threads: int | None) -> list[NodeKind]:
    """Return the kinds that this machine can run, the reference first. ``threads`` is a node's usual number, or None
    for all cores."""
    cores = len(os.sched_getaffinity(0))
    usual = threads or cores
    other = cores if usual != cores else max(1, cores // 2)
    found = [NodeKind(f"fp32, {_counted(usual)}", "cpu", usual, "fp32")]
    if other != usual:
        found.append(NodeKind(f"fp32, {_counted(other)}", "cpu", other, "fp32"))
    found += [NodeKind("bf16", "cpu", usual, "bf16"), NodeKind("fp32, compiled", "cpu", usual, "fp32", compiled=True)]
    if torch.cuda.is_available():
        found += [NodeKind("fp32, GPU", "cuda", usual, "fp32"), NodeKind("bf16, GPU", "cuda", usual, "bf16")]
        found.append(NodeKind("bf16, GPU, compiled", "cuda", usual, "bf16", compiled=True))
    return found


def _counted(threads: int) -> str:
    return f"{threads} thread{'s' * (threads > 1)}"


@dataclass(frozen=True)
class Segment:
    """Inner steps ``start`` to ``stop`` of round ``round``, 0-based, of the reference node."""

    round: int
    start: int
    stop: int
    lrs: tuple[float, ...]


@dataclass
class ReplayErrors:
    """Relative errors, one per segment, in order."""

    kinds: list[str]
    segments: list[Segment]
    errors: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """Errors by claim (honest work of a kind of node, or a fraud on the reference kind) and by kind of auditor."""

    @property
    def honest(self) -> dict[str, list[float]]:
        """Errors of honest work, by pair of kinds."""
        return {f"{one} | {other}": found for (one, other), found in self.errors.items() if one in self.kinds}

    @property
    def hostile(self) -> dict[str, list[list[float]]]:
        """Errors of each fraud, by the kind that audits."""
        return {fraud: [self.errors[fraud, kind] for kind in self.kinds] for fraud in FRAUDS}


Make = Callable[[NodeKind], Engine | None]
"""Returns an engine with the run's initial parameters; None if this kind is not available."""
ReportProgress = Callable[[str, int], None]
"""Called with the current activity and the number of inner steps just done."""


class Calibration:
    """Measures replay errors with one run's model, optimizer and data."""

    def __init__(
        self, run: Run, store: TokenStore, folder: Path, progress: ReportProgress = lambda what, steps: None
    ) -> None:
        """``folder`` needs space for a dozen vectors of the model's size per segment."""
        self._run, self._store, self._folder, self._progress = run, store, folder, progress
        self._by_muon = muon_parameters(run)
        self._segments: list[Segment] = []

    def measure(self, kinds: Sequence[NodeKind], rounds: int, make: Make) -> ReplayErrors:
        """Measure errors over the first ``rounds`` of the run, for the available kinds."""
        done: list[NodeKind] = []
        for kind in kinds:
            engine = make(kind)
            if engine is None:
                continue
            torch.set_num_threads(kind.threads)
            if done:
                self._train_again(engine, kind.name)
            else:
                self._train(engine, kind.name, rounds)
            done.append(kind)
            layout = engine.layout
            del engine  # before the next one takes as much memory
        found = ReplayErrors([kind.name for kind in done], self._segments)
        for segment in self._segments:
            before = self._get(segment, START)
            moments = Moments.unpack(self._path(segment, OPTIMIZER).read_bytes(), layout)
            drift = drift_without_gradients(layout, self._run.inner, self._by_muon, before, moments, segment.lrs)
            for auditor in found.kinds:
                replayed = self._get(segment, auditor)
                other = _of_other_precision(auditor, done)
                for claim in (*found.kinds, *FRAUDS):
                    if claim != auditor:
                        after = self._get(segment, claim)
                        error = relative_error(before, after, replayed, drift)
                        if error > NEGLIGIBLE_ERROR and other is not None:
                            error = tolerant_error(before, after, replayed, self._get(segment, other), drift)
                        found.errors.setdefault((claim, auditor), []).append(error)
        return found

    # ------------------------------------------------------------------------------- training

    def _train(self, engine: Engine, name: str, rounds: int) -> None:
        """Train the reference and its peer, and save what each fraud would claim of each segment."""
        theta = torch.empty(engine.layout.size)
        engine.read(theta)
        outer, run = OuterState.initial(theta), self._run
        own: State = {}
        peer: State = {}
        for round_number in range(rounds):
            points = trace_point_steps(0, run.rounds.inner_steps, run.audits.trace_steps)
            at, peer = self._walk(engine, name, round_number, outer.theta, peer, points)
            engine.write(outer.theta)
            engine.load_state(own)
            for number, (start, stop) in enumerate(pairwise(points)):
                self._segment(engine, name, Segment(round_number, start, stop, ()), at[number + 1] - at[number])
            own, end = _copied(engine), torch.empty_like(theta)
            engine.read(end)
            gradient = outer.theta - (end + at[-1]) / 2
            outer_step(outer.theta, outer.momentum, gradient, run.outer.settings)

    def _walk(
        self, engine: Engine, name: str, round_number: int, theta: Tensor, state: State, points: Sequence[int]
    ) -> tuple[list[Tensor], State]:
        """Train the peer's round. Return the parameters at the trace points and the final optimizer state."""
        engine.write(theta)
        engine.load_state(state)
        at = [theta.clone()]
        for start, stop in pairwise(points):
            for _ in self._steps(engine, f"{name}, peer", round_number, range(start, stop), PEERS):
                pass
            at.append(torch.empty_like(theta))
            engine.read(at[-1])
        return at, _copied(engine)

    def _segment(self, engine: Engine, name: str, segment: Segment, copied: Tensor) -> None:
        """Train the reference through ``segment`` and save all ends; ``copied`` is the peer's displacement."""
        before, state, at = torch.empty(engine.layout.size), _copied(engine), torch.empty(engine.layout.size)
        engine.read(before)
        steps, length = range(segment.start, segment.stop), segment.stop - segment.start
        tenth = max(1, round(length / 10))
        lazy = {ONE_STEP: length - 1, TENTH: length - tenth, HALF: length // 2}
        lrs: list[float] = []
        self._put(segment, START, before)
        self._path(segment, OPTIMIZER).write_bytes(pack_state(engine))
        at.copy_(before)
        for done in range(length + 1):
            for fraud in (fraud for fraud, taken in lazy.items() if taken == done):
                self._put(segment, fraud, before + (at - before) * (length / max(1, done)))
            if done < length:
                lrs += self._steps(engine, name, segment.round, steps[done : done + 1], OWN)
                engine.read(at)
        self._put(segment, name, at)
        self._segments.append(Segment(segment.round, segment.start, segment.stop, tuple(lrs)))
        self._put(segment, COPY, before + copied)
        noise = torch.randn(at.shape, generator=torch.Generator().manual_seed(len(self._segments)))
        self._put(segment, NOISE, before + noise * (torch.dist(at, before) / noise.norm()))
        after, ended = _copied(engine), at.clone()
        engine.write(before)
        engine.load_state(state)
        list(self._steps(engine, f"{name}, {OTHER}", segment.round, steps, OTHERS))
        engine.read(at)
        self._put(segment, OTHER, at)
        engine.write(ended)
        engine.load_state(after)

    def _train_again(self, engine: Engine, name: str) -> None:
        """Replay every segment from the reference's state."""
        at = torch.empty(engine.layout.size)
        for segment in self._segments:
            engine.write(self._get(segment, START))
            moments = Moments.unpack(self._path(segment, OPTIMIZER).read_bytes(), engine.layout)
            engine.load_state(moments.state(engine.layout, self._by_muon))
            list(self._steps(engine, name, segment.round, range(segment.start, segment.stop), OWN))
            engine.read(at)
            self._put(segment, name, at)

    def _steps(self, engine: Engine, what: str, round_number: int, steps: range, whose: int) -> Iterator[float]:
        """Take inner steps and yield their learning rates."""
        run = self._run
        for step in steps:
            lr = learning_rate(run.inner, round_number * run.rounds.inner_steps + step, run.total_steps, engine.steps)
            engine.step(self._batch(round_number, step, whose), lr)
            self._progress(what, 1)
            yield lr

    def _batch(self, round_number: int, step: int, whose: int) -> Batch:
        """Return sequences that no other node has in any round."""
        size, steps = self._run.inner.batch_size, self._run.rounds.inner_steps
        position = ((round_number * DEALT + whose) * steps + step) * size
        split = self._store.train
        return split.batch(sequences(range(position, position + size), split.layout, self._run.seed))

    # --------------------------------------------------------------------------------- on disk

    def _path(self, segment: Segment, name: str) -> Path:
        return self._folder / f"{segment.round}-{segment.start}-{name.replace(' ', '-')}"

    def _put(self, segment: Segment, name: str, flat: Tensor) -> None:
        self._path(segment, name).write_bytes(flat.numpy().data)

    def _get(self, segment: Segment, name: str) -> Tensor:
        return torch.frombuffer(bytearray(self._path(segment, name).read_bytes()), dtype=torch.float32)


State = dict[str, Tensor]
OWN, PEERS, OTHERS = range(3)
"""The node whose share of the round's data a batch comes from."""
DEALT = 3
START, OPTIMIZER = "start", "optimizer"


def total_steps(run: Run, rounds: int, kinds: int) -> int:
    """Return the number of inner steps that :meth:`Calibration.measure` takes."""
    return rounds * run.rounds.inner_steps * (DEALT + kinds - 1)


def _of_other_precision(name: str, kinds: Sequence[NodeKind]) -> str | None:
    """Return the kind on the same device in the other precision, uncompiled; None if there is none."""
    own = next(kind for kind in kinds if kind.name == name)
    wanted = (own.device, own.precision == "fp32", False)
    same = (kind.name for kind in kinds if (kind.device, kind.precision != "fp32", kind.compiled) == wanted)
    return next(same, None)


def _copied(engine: Engine) -> State:
    return {name: value.clone() for name, value in engine.state().items()}

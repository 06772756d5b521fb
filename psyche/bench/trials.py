"""One training run of the bench: large-batch AdamW, or DiLoCo over k nodes through the code of a real run.

Both see the same sequences in the same order, start from the same parameters, follow the same inner schedule and
are judged on the same held-out sequences. What differs is what the row is about.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from psyche.bench.curves import Point, Recorder, heldout_loss
from psyche.config import (
    CodecSpec,
    Config,
    Data,
    ExchangeSpec,
    Federated,
    Inner,
    Model,
    Node,
    Outer,
    Overlap,
    Rounds,
    Run,
)
from psyche.config.trust import Audits
from psyche.data.store import TokenStore
from psyche.diloco.launch import Launch, launch
from psyche.diloco.reference import play
from psyche.diloco.replica import Replica
from psyche.federated.gaussian_mechanism import privatise
from psyche.federated.private_text import PrivateText
from psyche.federated.private_training import Private
from psyche.protocol.assignment import sequences
from psyche.telemetry.run_report import ddp_bytes
from psyche.training.models import build
from psyche.training.schedules import learning_rate
from psyche.training.torch_engine import TorchEngine

COORDINATOR = "12D3KooWAfPDpPRRRBrmqy9is2zjU5srQ4hKuZitiGmh4NTTpS2d"
"""A manifest names its coordinators; these runs meet none. Any well-formed PeerID would do."""


UNCLIPPED = 1e30
"""A norm that no pseudo-gradient has."""


@dataclass(frozen=True)
class Setting:
    """What every trial of a bench has in common."""

    model: Model
    data: Data
    inner: Inner
    """``batch_size`` is that of one node; ``warmup_steps`` is set by each trial, as a share of its steps."""
    warmup: float
    """Share of a trial's steps over which the inner lr rises."""
    heldout_sequences: int
    cache: Path
    curve_points: int = 0
    """How often a DiLoCo trial is judged on its way, on ``curve_sequences`` held-out sequences."""
    curve_sequences: int = 256

    @property
    def curve_range(self) -> range:
        """Which: spread over all held-out sequences, because neighbours are of one document."""
        spacing = max(1, self.heldout_sequences // self.curve_sequences)
        return range(0, spacing * self.curve_sequences, spacing)


@dataclass(frozen=True)
class Own:
    """Every node trains on a consecutive part of the corpus that is its own, and on that only."""

    clip: float | None = None
    """L2 norm that its pseudo-gradients are clipped to, if any."""
    noise_multiplier: float = 0.0
    """Of the noise that is then added; with it equal trials give unequal losses."""

    @property
    def label(self) -> str:
        """``own, clipped, noised``."""
        return "own" + ", clipped" * (self.clip is not None) + ", noised" * (self.noise_multiplier > 0)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is trained. Equal trials give equal losses on one machine, so that tables may share them."""

    system: Literal["adamw", "diloco"]
    codec: str
    """Of what is sent; ``fp32`` gradients for AdamW."""
    nodes: int
    """k; for AdamW the factor by which the batch is larger, as with k data-parallel workers."""
    steps: int
    """Inner steps of each node."""
    outer: Outer | None = None
    inner_steps: int | None = None
    """H; None, like ``outer``, for AdamW."""
    seed: int = 0
    """Of the initial parameters and of the order of the data."""
    error_feedback: float | None = None
    """β; None is what the codec is made for."""
    nudge: float = 0.0
    """The initial parameters are scaled by 1 + nudge: what a change that small does to the loss is noise."""
    fragments: int = 1
    """What is exchanged at once is so many times less, so many times as often; H is that of each parameter."""
    late: int = 0
    """τ: inner steps that every node takes while a round is on the wire."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Inner, of DiLoCo."""
    inner_lr: float | None = None
    """None is the setting's."""
    due: tuple[int, ...] = ()
    """Inner steps a round of each node, where they differ; H is the most of them, and ``steps`` are that node's."""
    own: Own | None = None
    """None: all nodes share the corpus."""
    mix: float | None = None
    """Steps taken meanwhile are not kept by re-basing but mixed: x ← αx + (1−α)θ (Streaming DiLoCo, §2.3)."""

    @property
    def variant(self) -> str:
        """The codec, or ``nudged``: fp32 from nudged parameters."""
        return "nudged" if self.nudge else self.codec

    @property
    def batches(self) -> int:
        """Trained on by all nodes together."""
        return self.steps * sum(self.due) // max(self.due) if self.due else self.steps * self.nodes

    @property
    def label(self) -> str:
        """``diloco-int8/k4/1280-steps/lr0.7/mu0.7/H10/seed0``."""
        parts = [f"{self.system}-{self.variant}", f"k{self.nodes}", f"{self.steps}-steps"]
        if self.outer is not None:
            parts += [f"lr{self.outer.lr:g}", f"mu{self.outer.momentum:g}"]
            parts += [] if self.error_feedback is None else [f"beta{self.error_feedback:g}"]
            parts += [f"H{self.inner_steps}"]
            parts += [self.optimizer] if self.optimizer != "adamw" else []
            parts += [] if self.inner_lr is None else [f"inner-lr{self.inner_lr:g}"]
            parts += [f"P{self.fragments}"] if self.fragments > 1 else []
            parts += [f"late{self.late}"] if self.late else []
            parts += ["-".join(map(str, self.due))] if self.due else []
            parts += [] if self.own is None else ["own"]
            parts += [] if self.own is None or self.own.clip is None else [f"clip{self.own.clip:g}"]
            parts += [f"sigma{self.own.noise_multiplier:g}"] if self.own and self.own.noise_multiplier else []
            parts += [] if self.mix is None else [f"alpha{self.mix:g}"]
        return "/".join([*parts, f"seed{self.seed}"])


@dataclass(frozen=True)
class Outcome:
    """What a trial measured."""

    heldout_loss: float
    """Nats a token under the final parameters, for DiLoCo the outer ones."""
    tokens: int
    """Trained on, all nodes together."""
    bytes_per_token: float
    """Sent by a node for each token it trains on; over all nodes the ratio is the same."""
    payload_ratio: float
    """fp32 parameters over what one message of a node carries."""
    parameters: int
    seconds: float
    curve: tuple[Point, ...] = ()


def run_trial(setting: Setting, trial: Trial) -> Outcome:
    """Train and judge. Takes ``trial.nodes × trial.steps`` batches of work, on the threads torch was given."""
    started = time.perf_counter()
    run = run_of(setting, trial)
    launched = launch(Config(run=run, node=_node(setting)), COORDINATOR)
    parameters = launched.manifest.resolved.parameters
    recorder = Recorder(run, setting.curve_points, setting.curve_range)
    tokens = trial.batches * run.tokens_per_step
    if trial.system == "diloco":
        loss = _diloco(setting, trial, launched, recorder)
        sent = (trial.nodes - 1) * recorder.payload_bytes
        payload_ratio = 4 * parameters * trial.nodes * run.rounds.total / recorder.payload_bytes
    else:
        loss = _adamw(setting, trial, launched)
        sent = trial.nodes * trial.steps * ddp_bytes(trial.nodes, parameters, 1)
        payload_ratio = 1.0
    return Outcome(
        heldout_loss=loss,
        tokens=tokens,
        bytes_per_token=sent / tokens,
        payload_ratio=payload_ratio,
        parameters=parameters,
        seconds=time.perf_counter() - started,
        curve=tuple(recorder.points),
    )


def run_of(setting: Setting, trial: Trial) -> Run:
    """The run that a trial is. For AdamW its codec, outer optimizer and rounds are there but not used.

    Raises ``ValueError`` where the steps are not whole rounds.
    """
    period = trial.inner_steps or trial.steps
    inner_steps = period // trial.fragments
    if trial.steps % inner_steps or period % trial.fragments:
        raise ValueError(f"{trial.steps} steps are not whole rounds of {period} / {trial.fragments}")
    inner = setting.inner.model_copy(
        update={
            "warmup_steps": round(setting.warmup * trial.steps),
            "optimizer": trial.optimizer,
            "lr": trial.inner_lr or setting.inner.lr,
        }
    )
    return Run(
        name="bench",
        seed=trial.seed,
        model=setting.model,
        data=setting.data,
        codec=_codec(trial),
        inner=inner,
        outer=trial.outer or Outer(),
        federated=None if trial.own is None else Federated(clip=trial.own.clip or UNCLIPPED, max_share=1.0),
        overlap=Overlap(fragments=trial.fragments, overlap_steps=trial.late),
        exchange=ExchangeSpec(kind="gather"),
        audits=Audits(rate=0.0),  # nobody is there who might check, so nothing is hashed for it
        rounds=Rounds(total=trial.steps // inner_steps, inner_steps=inner_steps, start_members=trial.nodes),
    )


def _codec(trial: Trial) -> CodecSpec:
    if trial.error_feedback is None:
        return CodecSpec(name=trial.codec)
    return CodecSpec(name=trial.codec, error_feedback=trial.error_feedback)


def _diloco(setting: Setting, trial: Trial, launched: Launch, recorder: Recorder) -> float:
    """The whole protocol in one process, with one engine (hence one inner optimizer) for each node."""
    manifest, store, genesis = launched.manifest, launched.store, launched.genesis
    if trial.nudge:
        genesis.theta.mul_(1 + trial.nudge)
        resolved = manifest.resolved.model_copy(update={"genesis": genesis.index().root.hex()})
        manifest = manifest.model_copy(update={"resolved": resolved})
    replicas = {}
    for number in range(trial.nodes):
        node = f"node-{number}"
        engine = _engine(setting, manifest.run)
        kind = Replica if trial.mix is None else partial(MixingReplica, trial.mix)
        replicas[node] = kind(manifest, engine, store, genesis.clone(), node, node.encode())
        if trial.own is not None:
            replicas[node].private = Unpaid(trial, store, number)
    replica = replicas["node-0"]
    due = dict(zip(sorted(replicas), trial.due, strict=True)) if trial.due else {}
    for _, works in play(manifest, replicas, lambda round_number, node: trial.late, due):
        with replica.outer_params():
            recorder.saw(works, replica.engine, store)
    replica.engine.write(replica.outer.theta)
    return heldout_loss(replica.engine, store, range(setting.heldout_sequences))


class Unpaid(Private):
    """A node's own part of the corpus, in an order of ``trial.seed``; no budget is asked what it costs."""

    def __init__(self, trial: Trial, store: TokenStore, number: int) -> None:
        assert trial.own is not None
        own, length = trial.own, len(store.train) // trial.nodes
        self._clip, self._noise = own.clip or UNCLIPPED, own.noise_multiplier
        sequences = store.train.batch(range(number * length, (number + 1) * length)).astype("<u4")
        self._text = PrivateText(sequences, np.random.default_rng([trial.seed, number]))

    def require_budget(self) -> None:
        return

    def privatise(self, theta: Tensor, local: Tensor, parts: Sequence[slice]) -> None:
        privatise(theta, local, parts, clip=self._clip, noise_multiplier=self._noise)


class MixingReplica(Replica):
    """A replica that takes over the others' work by a factor, instead of keeping all of its own."""

    def __init__(self, alpha: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._alpha = alpha

    def apply_outer_update(self, round_number: int) -> None:
        local, parts = torch.empty_like(self.outer.theta), self.slices_of(round_number)
        self.engine.read(local)
        self.engine.write(local.lerp_(self.outer.theta, 1 - self._alpha), parts)


def _adamw(setting: Setting, trial: Trial, launched: Launch) -> float:
    """What k data-parallel workers compute together: plain AdamW on a batch k times as large."""
    run, store = launched.manifest.run, launched.store
    engine = _engine(setting, run)
    batch = trial.nodes * run.inner.batch_size
    for step in range(trial.steps):
        indices = sequences(range(step * batch, (step + 1) * batch), store.train.shape, run.seed)
        engine.step(store.train.batch(indices), learning_rate(run.inner, step, trial.steps))
    return heldout_loss(engine, store, range(setting.heldout_sequences))


def _engine(setting: Setting, run: Run) -> TorchEngine:
    return TorchEngine(build(run.model, seed=run.seed), run.inner, _node(setting))


def _node(setting: Setting) -> Node:
    # Models of the bench are so small that a GPU would mostly wait for its next kernel.
    return Node(device="cpu", precision="fp32", threads=1, cache=setting.cache)

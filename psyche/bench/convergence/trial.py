"""One training run: large-batch AdamW, or DiLoCo over k nodes through the code of a real run.

Both see the same sequences in the same order, start from the same parameters, follow the same inner schedule and
are evaluated on the same held-out sequences.
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

from psyche.bench.convergence.loss_curve import Point, Recorder, heldout_loss
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
from psyche.config.run_config import Audits
from psyche.data.token_store import TokenStore
from psyche.diloco.launch import Launch, launch
from psyche.diloco.reference import simulate_rounds
from psyche.diloco.replica import Replica
from psyche.federated.gaussian_mechanism import privatise
from psyche.federated.private_text import PrivateText
from psyche.federated.private_training import PrivateTraining
from psyche.protocol.assignment import sequences
from psyche.protocol.messages import Record
from psyche.telemetry.run_report import ddp_bytes
from psyche.training.models import build
from psyche.training.schedules import learning_rate
from psyche.training.torch_engine import TorchEngine

COORDINATOR = "12D3KooWAfPDpPRRRBrmqy9is2zjU5srQ4hKuZitiGmh4NTTpS2d"
"""A manifest needs a well-formed PeerID; no coordinator takes part in these runs."""

CENTRE = 4
"""Nodes of a trial, unless it says otherwise."""
UNCLIPPED = 1e30
"""A clipping norm that no pseudo-gradient reaches."""


@dataclass(frozen=True)
class Setting:
    """What all trials of a section have in common."""

    model: Model
    data: Data
    inner: Inner
    """``batch_size`` is per node; each trial sets ``warmup_steps`` from ``warmup``."""
    warmup: float
    """Share of a trial's steps in which the inner lr rises."""
    heldout_sequences: int
    cache: Path
    curve_points: int = 0
    """Number of evaluations during a DiLoCo trial, on ``curve_sequences`` held-out sequences each."""
    curve_sequences: int = 256

    @property
    def curve_range(self) -> range:
        """Indices of the curve's sequences. They are spread out, because neighbours are from the same document."""
        spacing = max(1, self.heldout_sequences // self.curve_sequences)
        return range(0, spacing * self.curve_sequences, spacing)


@dataclass(frozen=True)
class PrivateCorpora:
    """Each node trains on its own consecutive part of the corpus only."""

    clip: float | None = None
    """L2 norm to which pseudo-gradients are clipped. ``None``: no clipping."""
    noise_multiplier: float = 0.0
    """Noise added after clipping, over ``clip``. With noise, equal trials give different losses."""

    @property
    def label(self) -> str:
        """``own, clipped, noised``."""
        return "own" + ", clipped" * (self.clip is not None) + ", noised" * (self.noise_multiplier > 0)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is trained. Equal trials give equal losses on one machine, so tables share them."""

    system: Literal["adamw", "diloco"] = "diloco"
    codec: str = "fp32"
    """Codec of the payloads; ``fp32`` for the gradients of AdamW."""
    nodes: int = CENTRE
    """k nodes; for AdamW the batch is k times as large, as with k data-parallel workers."""
    steps: int
    """Inner steps of each node."""
    outer: Outer | None = None
    inner_steps: int | None = None
    """H. ``None``, like ``outer``, for AdamW."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the data."""
    error_feedback: float | None = None
    """β. ``None``: the codec's usual one."""
    nudge: float = 0.0
    """The initial parameters are scaled by 1 + nudge. The effect of so small a change on the loss is noise."""
    fragments: int = 1
    """Fragments that are exchanged in turn. H is the number of steps between two exchanges of one parameter."""
    overlap_steps: int = 0
    """τ: inner steps that every node takes during an exchange."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Inner optimizer of DiLoCo."""
    inner_lr: float | None = None
    """``None``: that of the setting."""
    quotas: tuple[int, ...] = ()
    """Inner steps per round of each node, if they differ. H is the largest; ``steps`` are those of that node."""
    private: PrivateCorpora | None = None
    """``None``: all nodes share the corpus."""
    alpha: float | None = None
    """Mix overlap steps by x ← αx + (1−α)θ (Streaming DiLoCo, §2.3) instead of re-basing them."""

    @property
    def outer_lr(self) -> float | None:
        return self.outer.lr if self.outer else None

    @property
    def momentum(self) -> float | None:
        """Momentum of the outer optimizer."""
        return self.outer.momentum if self.outer else None

    @property
    def variant(self) -> str:
        """The codec, or ``nudged`` for fp32 from nudged parameters."""
        return "nudged" if self.nudge else self.codec

    @property
    def batches(self) -> int:
        """Batches that all nodes together train on."""
        return self.steps * sum(self.quotas) // max(self.quotas) if self.quotas else self.steps * self.nodes

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
            parts += [f"overlap{self.overlap_steps}"] if self.overlap_steps else []
            parts += ["-".join(map(str, self.quotas))] if self.quotas else []
            if self.private is not None:
                parts += ["own"]
                parts += [] if self.private.clip is None else [f"clip{self.private.clip:g}"]
                parts += [f"sigma{self.private.noise_multiplier:g}"] if self.private.noise_multiplier else []
            parts += [] if self.alpha is None else [f"alpha{self.alpha:g}"]
        return "/".join([*parts, f"seed{self.seed}"])


@dataclass(frozen=True)
class Outcome:
    """What a trial measured."""

    heldout_loss: float
    """Nats per token with the final parameters; for DiLoCo the outer ones."""
    tokens: int
    """Tokens that all nodes together trained on."""
    bytes_per_token: float
    """Bytes that a node sends for each token it trains on."""
    payload_ratio: float
    """Bytes of the fp32 parameters over those of a payload."""
    parameters: int
    seconds: float
    curve: tuple[Point, ...] = ()


def run_trial(setting: Setting, trial: Trial) -> Outcome:
    """Train and evaluate. Takes ``trial.batches`` training steps."""
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
        seconds=round(time.perf_counter() - started, 1),
        curve=tuple(recorder.points),
    )


def run_of(setting: Setting, trial: Trial) -> Run:
    """Return the run of a trial. AdamW does not use its codec, outer optimizer and rounds.

    Raises ``ValueError`` if the steps are not whole rounds.
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
        federated=None if trial.private is None else Federated(clip=trial.private.clip or UNCLIPPED, max_share=1.0),
        overlap=Overlap(fragments=trial.fragments, overlap_steps=trial.overlap_steps),
        exchange=ExchangeSpec(kind="gather"),
        audits=Audits(rate=0.0),  # no auditor takes part, so nothing is hashed for one
        rounds=Rounds(total=trial.steps // inner_steps, inner_steps=inner_steps, start_members=trial.nodes),
    )


def _codec(trial: Trial) -> CodecSpec:
    if trial.error_feedback is None:
        return CodecSpec(name=trial.codec)
    return CodecSpec(name=trial.codec, error_feedback=trial.error_feedback)


def _diloco(setting: Setting, trial: Trial, launched: Launch, recorder: Recorder) -> float:
    """Run the whole protocol in one process, with one engine, hence one inner optimizer, for each node."""
    manifest, store, genesis = launched.manifest, launched.store, launched.genesis
    if trial.nudge:
        genesis.theta.mul_(1 + trial.nudge)
        resolved = manifest.resolved.model_copy(update={"genesis": genesis.index().root.hex()})
        manifest = manifest.model_copy(update={"resolved": resolved})
    replicas = {}
    for number in range(trial.nodes):
        node = f"node-{number}"
        engine = _engine(setting, manifest.run)
        kind = Replica if trial.alpha is None else partial(MixingReplica, trial.alpha)
        replicas[node] = kind(manifest, engine, store, genesis.clone(), node, node.encode())
        if trial.private is not None:
            replicas[node].private = UnlimitedBudget(trial, store, number)
    replica = replicas["node-0"]
    quotas = dict(zip(sorted(replicas), trial.quotas, strict=True)) if trial.quotas else {}
    for _, works in simulate_rounds(manifest, replicas, lambda round_number, node: trial.overlap_steps, quotas):
        with replica.outer_params():
            recorder.record(works, replica.engine, store)
    replica.engine.write(replica.outer.theta)
    return heldout_loss(replica.engine, store, range(setting.heldout_sequences))


class UnlimitedBudget(PrivateTraining):
    """A node's own part of the corpus, in the order of ``trial.seed``, without a privacy budget."""

    def __init__(self, trial: Trial, store: TokenStore, number: int) -> None:
        assert trial.private is not None
        length = len(store.train) // trial.nodes
        self._clip, self._noise = trial.private.clip or UNCLIPPED, trial.private.noise_multiplier
        sequences = store.train.batch(range(number * length, (number + 1) * length)).astype("<u4")
        self._text = PrivateText(sequences, np.random.default_rng([trial.seed, number]))

    def require_budget(self) -> None:
        return

    def privatise(self, theta: Tensor, local: Tensor, parts: Sequence[slice]) -> None:
        privatise(theta, local, parts, clip=self._clip, noise_multiplier=self._noise)


class MixingReplica(Replica):
    """A replica that mixes the outer parameters into its own instead of re-basing its overlap steps."""

    def __init__(self, alpha: float, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._alpha = alpha

    def apply_record_update(self, record: Record) -> None:
        local, parts = torch.empty_like(self.outer.theta), self.slices_of(record.plan.round)
        self.engine.read(local)
        self.engine.write(local.lerp_(self.outer.theta, 1 - self._alpha), parts)


def _adamw(setting: Setting, trial: Trial, launched: Launch) -> float:
    """Train as k data-parallel workers do: AdamW on a batch k times as large."""
    run, store = launched.manifest.run, launched.store
    engine = _engine(setting, run)
    batch = trial.nodes * run.inner.batch_size
    for step in range(trial.steps):
        indices = sequences(range(step * batch, (step + 1) * batch), store.train.layout, run.seed)
        engine.step(store.train.batch(indices), learning_rate(run.inner, step, trial.steps))
    return heldout_loss(engine, store, range(setting.heldout_sequences))


def _engine(setting: Setting, run: Run) -> TorchEngine:
    return TorchEngine(build(run.model, seed=run.seed), run.inner, _node(setting))


def _node(setting: Setting) -> Node:
    # The models are so small that a GPU would mostly wait for its next kernel.
    return Node(device="cpu", precision="fp32", threads=1, cache=setting.cache)

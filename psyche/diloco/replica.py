"""A node's replica of the run: the DiLoCo tensors, the node's data, and its position in the chain of records.

A worker drives one replica with what arrives from the network; the single-process reference drives several with what
they hand each other. Both must end with the same bits. There is no network and no clock here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from psyche.config import Manifest
from psyche.data.token_store import BadShard, TokenStore
from psyche.diloco.algorithm import DiLoCo, Slices
from psyche.diloco.local_data import DataAssignment, PrivateData
from psyche.diloco.trace import PrivateTrace, Trace
from psyche.diloco.trace_recorder import TraceRecorder
from psyche.exchange.aggregation import Aggregation
from psyche.numerics.aggregate import Gradient, reduce_slice, result_gradient
from psyche.numerics.backends.base import Backend
from psyche.numerics.backends.selection import fastest_backend
from psyche.numerics.digest import CHUNK, BlobIndex, digest, payload_root
from psyche.numerics.outer import OuterState
from psyche.protocol.acceptor import Chain
from psyche.protocol.assignment import next_position
from psyche.protocol.contributions import base_proof, weights
from psyche.protocol.messages import Contribution, Plan, Record
from psyche.training.engine import Batch, Engine
from psyche.training.schedules import learning_rate


class TrainingCancelled(Exception):
    """Training was cancelled before the round's last inner step; nothing was encoded."""


@dataclass(frozen=True)
class LocalUpdate:
    """The result of one round of local training: a contribution and its payload."""

    round: int
    contribution: Contribution
    payload: Slices
    loss: float
    """Mean over the inner steps, nats per token."""
    lr: float
    """Learning rate of the last inner step."""
    norm: float
    """‖D(payload)‖₂, the same value on every node that decodes it."""


@dataclass
class LocalSteps:
    """The inner steps of one round so far."""

    trace: Trace = field(default_factory=Trace)
    losses: list[float] = field(default_factory=list)
    lr: float = 0.0
    """Learning rate of the last step."""
    overlap_steps: int = 0
    """Steps that were taken while the previous round was being exchanged."""
    rebased: bool = False
    """Whether the previous round's outer step has reached x. No overlap step follows it: a replay has to know where it
    was applied."""


class Replica(DiLoCo):
    """One node's DiLoCo state in a run. x restarts from θ only if it has no local steps to keep."""

    host: OuterState
    """The outer state on the CPU, as it is hashed, served and saved: ``outer`` itself unless that is on a GPU."""
    index: BlobIndex
    """Chunk hashes of ``host``; their root is ``chain.state_root``."""
    chain: Chain
    """The last record applied, and the state root after it."""
    _steps: LocalSteps | None
    """Steps of the round that x is being trained for; None if that round has to start from θ."""

    def __init__(
        self,
        manifest: Manifest,
        engine: Engine,
        store: TokenStore,
        outer: OuterState,
        node: str,
        secret: bytes,
        backend: Backend | None = None,
    ) -> None:
        """``backend`` computes codec and outer step on its device; the default is the fastest one on the CPU.

        ``secret`` (32 bytes) makes the salt of this node's commitments.
        """
        run = manifest.run
        super().__init__(
            engine,
            outer,
            fastest_backend() if backend is None else backend,
            codec=run.codec.name,
            settings=run.outer.settings,
            error_feedback=run.codec.error_feedback,
            fragments=run.overlap.fragments,
            overlap_steps=run.overlap.overlap_steps,
        )
        self.manifest, self.run, self.store, self.node = manifest, run, store, node
        self._secret = secret
        self.trace_recorder = TraceRecorder(run, engine)
        self.adopt(outer, None)
        self._assignment = DataAssignment(run, store.train, node)
        self.private: PrivateData | None = None
        """The node's own text in federated mode. Then every round starts from θ, and only a clipped and noised
        pseudo-gradient leaves the node."""
        self.payout = b""
        """Address to which the node's credits are paid, if its owner has named one."""

    # ----------------------------------------------------------------------------- local training

    def train(
        self,
        plan: Plan,
        *,
        on_step: Callable[[int, float, float], None] = lambda step, loss, lr: None,
        cancelled: Callable[[], bool] = lambda: False,
        stop_early: Callable[[], bool] = lambda: False,
    ) -> LocalUpdate:
        """Take the remaining inner steps of this node's quota on its assigned data, then encode the pseudo-gradient.

        Calls ``on_step(step, loss, lr)`` after each step. Training ends with the steps taken so far, at least one, once
        ``stop_early()`` is true or the text of the next step is missing. Raises :class:`TrainingCancelled` once
        ``cancelled()`` is true, :class:`NonFiniteParameter`, :class:`BadShard` if no step could be taken, and
        :class:`PrivacyBudgetSpent` if the privacy budget allows no further round.
        """
        member = plan.member(self.node)
        assert member is not None, "only members train"
        if self.private is not None:
            self.private.require_budget()
        if self._steps is None:
            self.start_from_outer()
            self._steps = LocalSteps() if self.private is None else LocalSteps(PrivateTrace())
        steps, self._steps = self._steps, None
        self.trace_recorder.begin(plan.round, steps.trace, steps.overlap_steps, self.host.theta)
        for step in range(steps.overlap_steps, member.inner_steps):
            if cancelled():
                raise TrainingCancelled
            if steps.losses and stop_early():
                break
            self.trace_recorder.before_step(steps.trace, step)
            try:
                self._inner_step(steps, plan, step, self.schedule_step(plan) + step)
            except BadShard:
                if not steps.losses:
                    raise
                break
            on_step(step, steps.losses[-1], steps.lr)
        return self._encode_update(plan, steps)

    def remaining_steps(self, plan: Plan) -> int:
        """Count the inner steps of its quota that this node has not yet taken for the round it is about to train."""
        member = plan.member(self.node)
        taken = 0 if self._steps is None else self._steps.overlap_steps
        return 0 if member is None else max(0, member.inner_steps - taken)

    def overlapped_step(self, plan: Plan) -> bool:
        """Take one inner step of the next round while ``plan``'s round, for which this node trained, is exchanged.

        Returns False and does nothing if the run allows no more of them, has no next round, or the text is missing.
        """
        steps, member = self._steps, plan.member(self.node)
        if steps is None or steps.rebased or member is None:
            return False
        if steps.overlap_steps >= self.run.overlap.overlap_steps or plan.round == self.run.rounds.total:
            return False
        schedule_step = plan.round * self.run.rounds.inner_steps + steps.overlap_steps  # a step of the next round
        try:
            self._inner_step(steps, plan, member.inner_steps + steps.overlap_steps, schedule_step)
        except BadShard:
            return False
        steps.overlap_steps += 1
        return True

    def discard_local_steps(self) -> None:
        """Drop steps that were taken for a round which closed without this node: the next round starts from θ."""
        self._steps = None

    def schedule_step(self, plan: Plan) -> int:
        """Return the global step of the learning-rate schedule at the start of a round: H per round on every node,
        whatever its quota was."""
        return (plan.round - 1) * self.run.rounds.inner_steps

    # ------------------------------------------------------------------------------- outer step

    def gradient_of(self, record: Record, payloads: Mapping[str, Slices]) -> Gradient:
        """Aggregate the payloads that ``record`` accepted into the outer gradient; in a sharded round, as every node
        decodes it from the reducers' encoded result."""
        given = {one.node: one.contribution for one in record.accepted}
        merge = Aggregation.of(self.run)
        merged = self.aggregate(payloads, weights(record.plan, given, merge.caps), merge.rule)
        if not record.plan.is_sharded:
            return merged
        result_codec, parts = self.backend.codec(self.run.result_codec), self.slices_of(record.plan.round)

        def encoded(number: int) -> bytes:
            return reduce_slice(merged, result_codec, number, parts[number].stop - parts[number].start)

        return result_gradient(result_codec, encoded)

    def apply(self, record: Record, gradient: Gradient) -> None:
        """Take the outer step of a certified record. Afterwards ``chain`` is at the record, with the new state root.

        The three parts may run on different threads, one after the other; only :meth:`apply_record_update` touches x.
        """
        self.outer_step(record.plan.round, gradient)
        self.apply_record_update(record)
        self.commit_state(record)

    def apply_record_update(self, record: Record) -> None:
        """Move x by what the outer step of ``record`` changed. Inner steps taken since x was encoded are kept."""
        if self._steps is not None:
            self._steps.rebased = True
            self.apply_outer_update(record.plan.round, keep_local_steps=self._steps.overlap_steps > 0)

    def commit_state(self, record: Record) -> None:
        """Hash the outer state after ``record``, and move ``chain`` there."""
        self._set_position(record, self.slices_of(record.plan.round))

    def adopt(self, outer: OuterState, record: Record | None) -> None:
        """Take over an outer state: that after ``record``, or that before the first round. x starts from it."""
        self.outer = outer.to(self.backend.device)
        self._steps = None
        self._set_position(record, None)

    def chain_position(self, record: Record | None, root: bytes) -> Chain:
        """Return the chain position of a node whose state after ``record`` (None: before round 1) has root ``root``."""
        if record is None:
            return Chain(0, self.manifest.run_id, root, 0)
        position = next_position(record.plan, self.run.inner.batch_size, self.run.overlap.overlap_steps)
        return Chain(record.plan.round, record.hash, root, position, record.standing, record.audit_state)

    # --------------------------------------------------------------- commitments and base proofs

    def base_proof(self, plan: Plan, node: str) -> bytes:
        """Return the proof by which ``node`` shows that it holds the state that ``plan`` starts from, which is also
        this replica's."""
        state = self.host.buffer
        return base_proof(plan.seed, node, self.index.chunks, lambda number: state[number * CHUNK :][:CHUNK])

    def verify_base_proof(self, plan: Plan, node: str, given: Contribution) -> bool:
        """Check that a contribution was made from the state that ``plan`` starts from."""
        return given.base_proof == self.base_proof(plan, node)

    def restore_update(self, update: LocalUpdate) -> None:
        """Put a rejected update back into the error feedback, so that it is sent with the next one."""
        self.restore_residual(update.round, update.payload)

    # ---------------------------------------------------------------- warm-up and held-out loss

    @property
    def warm_up_steps(self) -> int:
        """Steps that warm up AdamW before a late joiner's first round: as many as its second moment remembers, at most
        H; 0 if the optimizer has state already."""
        if self.engine.steps:
            return 0
        return min(round(1 / (1 - self.run.inner.betas[1])), self.run.rounds.inner_steps)

    def warm_up(self, step: int) -> None:
        """Take warm-up step number ``step``: the inner optimizer keeps its moments, x is reset to θ by the round."""
        if step == 0:
            self.start_from_outer()
        at = self.chain.rounds * self.run.rounds.inner_steps
        lr = learning_rate(self.run.inner, at, self.run.total_steps, self.engine.steps)
        if self.private is None:
            tokens = self._assignment.warm_up_batch(self.chain.position, step)
        else:
            tokens = self.private.batch(self.run.inner.batch_size)
        self.local_step(tokens, lr)

    def heldout_loss(self, member: int, members: int) -> tuple[float, int]:
        """Evaluate θ on this member's share of the held-out set. Returns the loss sum and the number of tokens.

        Member i of n evaluates the sequences i, i + n, i + 2n, …
        """
        count = min(self.run.heldout_sequences, len(self.store.heldout))
        indices = range(member, count, members)
        total, tokens = 0.0, 0
        with self.outer_params():
            for at in range(0, len(indices), self.run.inner.batch_size):
                loss, predicted = self.engine.evaluate(
                    self.store.heldout.batch(indices[at : at + self.run.inner.batch_size])
                )
                total, tokens = total + loss, tokens + predicted
        return total, tokens

    # --------------------------------------------------------------------------------- helpers

    def _inner_step(self, steps: LocalSteps, plan: Plan, step: int, schedule_step: int) -> None:
        """Take one inner step on the data assigned to this node for step ``step`` of the round."""
        tokens: Batch
        if self.private is None:
            tokens = self._assignment.round_batch(plan, step)
        else:
            tokens = self.private.batch(self.run.inner.batch_size)
        steps.lr = learning_rate(self.run.inner, schedule_step, self.run.total_steps, self.engine.steps)
        steps.losses.append(self.local_step(tokens, steps.lr))
        steps.trace.record_batch(tokens)

    def _encode_update(self, plan: Plan, steps: LocalSteps) -> LocalUpdate:
        """Encode what the inner steps changed, and fill in the contribution that commits to it."""
        inner_steps, parts = len(steps.losses), self.slices_of(plan.round)
        local = self.snapshot()
        self.trace_recorder.record_point(steps.trace, inner_steps)
        if self.private is not None:
            used = [span for part in parts for span in self.engine.layout.within(part)]
            self.private.privatise(self.outer.theta, local, used)
        residual_in = self.trace_recorder.residual(steps.trace, self.residual, parts)
        payload = self.encode(plan.round)
        residual_out = self.trace_recorder.residual(steps.trace, self.residual, parts)
        self.trace_recorder.finish(plan.round, steps.trace)
        if self.private is None:
            self._steps = LocalSteps()
        contribution = Contribution(
            base_root=plan.base_root,
            data_digest=steps.trace.data_digest,
            base_proof=self.base_proof(plan, self.node),
            trace_root=steps.trace.root,
            residual_in=residual_in,
            residual_out=residual_out,
            payload_root=payload_root(payload),
            payload_bytes=sum(len(part) for part in payload),
            inner_steps=inner_steps,
            overlap_steps=steps.overlap_steps,
            tokens=inner_steps * self.run.tokens_per_step,
            private=self.private is not None,
            payout=self.payout,
            salt=self._salt(plan),
        )
        loss = sum(steps.losses) / inner_steps
        return LocalUpdate(plan.round, contribution, payload, loss, steps.lr, self.payload_norm(plan.round, payload))

    def _set_position(self, record: Record | None, changed: Sequence[slice] | None) -> None:
        """Move to the state after ``record``, which differs from the last one in the ranges ``changed`` (None: all)."""
        self.host = self.outer.to(torch.device("cpu"))
        self.index = self.host.index() if changed is None else self.host.reindex(self.index, changed)
        self.chain = self.chain_position(record, self.index.root)
        self.trace_recorder.record_state(self.chain.rounds, self.host, self.index)

    def _salt(self, plan: Plan) -> bytes:
        """Return the commitment's salt: unguessable to others, and the same after a restart within the round."""
        return digest("salt", self._secret, self.manifest.run_id, plan.round.to_bytes(8, "little"), plan.seed)

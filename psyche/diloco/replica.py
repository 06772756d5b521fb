"""DiLoCo (arXiv 2311.08105) on one page: a node's tensors, and what a round does to them.

No network and no clock in here: a worker drives a replica with what arrives on the wire, the single-process
reference drives several with what they hand each other, and both must end with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt

import torch

from psyche.config import Manifest
from psyche.data.store import BadShard, TokenStore
from psyche.diloco.batches import DataAssignment, PrivateData
from psyche.diloco.local_update import Interrupted, NonFiniteParameter, Slices, Steps, Work
from psyche.diloco.trace import PrivateTrace
from psyche.diloco.trace_recorder import TraceRecorder
from psyche.exchange.merge import Merge
from psyche.numerics.aggregate import Gradient, reduce_slice, result_gradient
from psyche.numerics.backends.base import Backend
from psyche.numerics.backends.selection import fastest_backend
from psyche.numerics.codecs.base import NonFinite
from psyche.numerics.digest import CHUNK, BlobIndex, digest, payload_root
from psyche.numerics.outer import OuterState
from psyche.protocol.acceptor import Chain
from psyche.protocol.assignment import next_position
from psyche.protocol.challenge import base_proof
from psyche.protocol.messages import Contribution, Plan, Record
from psyche.training.engine import Engine
from psyche.training.schedules import learning_rate


class Replica:
    """The outer state, the engine that trains from it, and the error-feedback buffer of one node.

    θ and m are the outer state, e the error feedback, x the parameters in the engine, s a copy of x from when it was
    encoded. x follows θ by what outer steps change; it is set to θ only where it has nothing of its own to keep.
    """

    host: OuterState
    """The outer state as it is hashed, served and saved: ``outer`` itself, unless that lies on a GPU."""
    index: BlobIndex
    """Its chunk hashes; their root is ``chain.state_root``."""
    _steps: Steps | None
    """Of the round that x is being trained for; None where it has to start from θ."""

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
        """``backend`` computes codec and outer step, where its tensors lie; by default the fastest on the CPU."""
        self.manifest, self.run = manifest, manifest.run
        self.engine, self.store, self.node = engine, store, node
        self._secret = secret
        self.backend = fastest_backend() if backend is None else backend
        self.codec = self.backend.codec(self.run.codec.name)
        overlap = self.run.overlap
        self._overlaps = overlap.fragments > 1 or overlap.overlap_steps > 0
        self._fragments = engine.layout.fragments(overlap.fragments)
        self.trace_recorder = TraceRecorder(self.run, engine)
        self.adopt(outer, None)
        self._snapshot = torch.empty_like(self.outer.theta)
        """What trained when it was last encoded: x at the end of a round's inner steps."""
        self._sum = torch.empty(max(p.stop - p.start for f in self._fragments for p in f), device=self.backend.device)
        self.residual = torch.zeros_like(self.outer.theta) if self.codec.error_feedback else None
        self._portion = DataAssignment(self.run, store.train, node)
        self.private: PrivateData | None = None
        """The node's own text, if it trains on that (federated mode). Then every round starts from θ, and is seen of
        outside only as what was clipped, noised and paid for."""
        self.payout = b""
        """Address that the node's credits are to be paid to, if its owner has named one."""

    # ------------------------------------------------------------------------------- one round

    def train(
        self,
        plan: Plan,
        *,
        progress: Callable[[int, float, float], None] = lambda step, loss, lr: None,
        stop: Callable[[], bool] = lambda: False,
        enough: Callable[[], bool] = lambda: False,
    ) -> Work:
        """The inner steps that are left of its quota, on this node's part of the data; then encode Δ = θ − x of the
        fragment.

        Calls ``progress(step, loss, lr)`` after each inner step. Once ``enough()`` is true the steps taken so far, if
        there are any, are all that this contribution has; so it is where the text of a step cannot be had. Raises
        :class:`Interrupted` once ``stop()`` is true, :class:`NonFiniteParameter`, :class:`BadShard` where no step could
        be taken, and :class:`PrivacyBudgetSpent` if private data may not be trained on any more.
        """
        member = plan.member(self.node)
        assert member is not None, "only members train"
        if self.private is not None:
            self.private.require_budget()
        if self._steps is None:
            self.engine.write(self.outer.theta)
            self._steps = Steps() if self.private is None else Steps(PrivateTrace())
        steps, self._steps = self._steps, None
        self.trace_recorder.begin(plan.round, steps.trace, steps.late, self.host.theta)
        for step in range(steps.late, member.inner_steps):
            if stop():
                raise Interrupted
            if steps.losses and enough():
                break
            self.trace_recorder.before_step(steps.trace, step)
            try:
                self._step(steps, plan, step, self.global_step(plan) + step)
            except BadShard:
                if not steps.losses:
                    raise
                break
            progress(step, steps.losses[-1], steps.lr)
        done = len(steps.losses)
        self.engine.read(self._snapshot)
        self.trace_recorder.record_point(steps.trace, done)
        if self.private is not None:
            parts = [used for part in self.slices_of(plan.round) for used in self.engine.layout.within(part)]
            self.private.privatise(self.outer.theta, self._snapshot, parts)
        residual_in = self._residual_root(plan.round, steps)
        payload = self._encode(plan.round)
        residual_out = self._residual_root(plan.round, steps)
        self.trace_recorder.finish(plan.round, steps.trace)
        if self.private is None:
            self._steps = Steps()
        contribution = Contribution(
            base_root=plan.base_root,
            data_digest=steps.trace.data_digest,
            base_proof=self.base_proof(plan, self.node),
            trace_root=steps.trace.root,
            residual_in=residual_in,
            residual_out=residual_out,
            payload_root=payload_root(payload),
            payload_bytes=sum(len(part) for part in payload),
            inner_steps=done,
            overlap_steps=steps.late,
            tokens=done * self.run.tokens_per_step,
            private=self.private is not None,
            payout=self.payout,
            salt=self._salt(plan),
        )
        loss = sum(steps.losses) / len(steps.losses)
        return Work(plan.round, contribution, payload, loss, steps.lr, self._norm(plan.round, payload))

    def base_proof(self, plan: Plan, node: str) -> bytes:
        """What ``node`` has to show of the state that ``plan`` starts from, where this replica stands, too."""
        state = self.host.buffer
        return base_proof(plan.seed, node, self.index.chunks, lambda number: state[number * CHUNK :][:CHUNK])

    def shows_base(self, plan: Plan, node: str, given: Contribution) -> bool:
        """Whether ``node`` proves that it has the state that ``plan`` starts from, where this replica stands, too."""
        return given.base_proof == self.base_proof(plan, node)

    def due(self, plan: Plan) -> int:
        """Inner steps that are left of this node's quota in the round it is about to train for."""
        member = plan.member(self.node)
        taken = 0 if self._steps is None else self._steps.late
        return 0 if member is None else max(0, member.inner_steps - taken)

    def overlapped_step(self, plan: Plan) -> bool:
        """One inner step of the next round while ``plan``'s, for which this node has trained, is on the wire.

        False, and nothing done, where the run allows no more of them, has no next round, or their text is not here.
        """
        steps, member = self._steps, plan.member(self.node)
        if steps is None or steps.based or member is None or steps.late >= self.run.overlap.overlap_steps:
            return False
        if plan.round == self.run.rounds.total:
            return False
        at = plan.round * self.run.rounds.inner_steps + steps.late  # in the schedule: a step of the next round
        try:
            self._step(steps, plan, member.inner_steps + steps.late, at)
        except BadShard:
            return False
        steps.late += 1
        return True

    def apply(self, record: Record, gradient: Gradient) -> None:
        """The outer step of a certified record. Afterwards ``chain`` stands at the record, with the new state_root.

        Its three parts may run on different threads, one after the other; only :meth:`apply_outer_update` touches what
        trains.
        """
        self.step_outer(record, gradient)
        self.apply_outer_update(record.plan.round)
        self.settle(record)

    def step_outer(self, record: Record, gradient: Gradient) -> None:
        """m and θ of the round's fragment, slice by slice.

        Raises what ``gradient`` raises; the outer state is then undefined, which cannot happen with payloads that were
        checked on arrival.
        """
        self.step_on(self.outer, record, gradient)

    def step_on(self, outer: OuterState, record: Record, gradient: Gradient) -> None:
        """The same for another outer state than this node's, wherever it lies, which may be there in part only."""
        settings, device = self.run.outer.settings, self.backend.device
        for number, part in enumerate(self.slices_of(record.plan.round)):
            total = self._sum[: part.stop - part.start]
            gradient(number, total)
            theta, momentum = outer.theta[part].to(device), outer.momentum[part].to(device)
            self.backend.outer_step(theta, momentum, total, settings)
            if outer.tensor.device != device:
                outer.theta[part].copy_(theta)
                outer.momentum[part].copy_(momentum)

    def apply_outer_update(self, round_number: int) -> None:
        """Move what trains by what the outer step changed: x ← x + (θ − s), s what x was when it was encoded.

        Steps taken since then are kept (DESIGN §7). Where there are none x becomes θ, to the bit.
        """
        if self._steps is None:
            return
        self._steps.based = True
        parts = self.slices_of(round_number)
        if self._steps.late == 0:
            self.engine.write(self.outer.theta, parts)
            return
        for part in parts:
            torch.sub(self.outer.theta[part], self._snapshot[part], out=self._snapshot[part])
        self.engine.shift(self._snapshot, parts)

    def settle(self, record: Record) -> None:
        """Hash the outer state after ``record``, and stand there."""
        self._stand_at(record, self.slices_of(record.plan.round))

    def gradient_of(self, record: Record, payloads: Mapping[str, Slices]) -> Gradient:
        """The outer gradient, aggregated from the payloads of all that ``record`` accepted; if the round is sharded,
        as everybody decodes it from its encoded result."""
        given = {one.node: one.contribution for one in record.accepted}
        merged = Merge.of(self.run).gradient(self.codec, record.plan, given, payloads)
        if not record.plan.is_sharded:
            return merged
        result_codec, parts = self.backend.codec(self.run.result_codec), self.slices_of(record.plan.round)

        def encoded(number: int) -> bytes:
            return reduce_slice(merged, result_codec, number, parts[number].stop - parts[number].start)

        return result_gradient(result_codec, encoded)

    def adopt(self, outer: OuterState, record: Record | None) -> None:
        """Take over an outer state fetched from others: that after ``record``, or that before the first round.

        The next round is trained from it.
        """
        self.outer = outer.to(self.backend.device)
        self._steps = None
        self._stand_at(record, None)

    def warm_up(self, step: int) -> None:
        """Inner step number ``step`` of a node that waits for its first round.

        The inner optimizer keeps what it has learned of the gradients' sizes; the round is trained from θ all the same.
        """
        if step == 0:
            self.engine.write(self.outer.theta)
        at = self.chain.rounds * self.run.rounds.inner_steps
        lr = learning_rate(self.run.inner, at, self.run.total_steps, self.engine.steps)
        if self.private is None:
            tokens = self._portion.to_warm_up(self.chain.position, step)
        else:
            tokens = self.private.batch(self.run.inner.batch_size)
        self.engine.step(tokens, lr)

    @property
    def warm_up_steps(self) -> int:
        """As many as AdamW's second moment remembers, and no more than a round has; none for who has trained before."""
        if self.engine.steps:
            return 0
        return min(round(1 / (1 - self.run.inner.betas[1])), self.run.rounds.inner_steps)

    def discard_local_steps(self) -> None:
        """Steps were taken for a round that went on without this node: the next round is trained from θ."""
        self._steps = None

    def restore_residual(self, work: Work) -> None:
        """e ← e + D(payload): a contribution that was not accepted loses nothing it has learned."""
        if self.residual is not None:
            for part, encoded in zip(self.slices_of(work.round), work.payload, strict=True):
                self.codec.decode_add(encoded, 1.0, self.residual[part])

    def place(self, record: Record | None, root: bytes) -> Chain:
        """Where a node stands that holds the outer state ``root`` after ``record``, or before the first round."""
        if record is None:
            return Chain(0, self.manifest.run_id, root, 0)
        position = next_position(record.plan, self.run.inner.batch_size, self.run.overlap.overlap_steps)
        return Chain(record.plan.round, record.hash, root, position, record.voters, record.standing, record.audit_state)

    def slices_of(self, round_number: int) -> tuple[slice, ...]:
        """What round ``round`` exchanges: the slices of its fragment."""
        return self._fragments[(round_number - 1) % len(self._fragments)]

    def momentum_norm(self) -> float:
        """‖m‖₂; for people to look at, not the same on every hardware."""
        return float(torch.linalg.vector_norm(self.outer.momentum))

    def heldout_loss(self, member: int, members: int) -> tuple[float, int]:
        """This member's share of the held-out set under the outer parameters: loss sum, predicted tokens.

        Sequence i of the set is judged by member i mod ``members``. What trains is put aside meanwhile.
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

    @contextmanager
    def outer_params(self) -> Iterator[None]:
        """Within, the engine holds θ; what trains is put aside."""
        training = torch.empty_like(self.outer.theta) if self._overlaps else None
        if training is not None:
            self.engine.read(training)
        self.engine.write(self.outer.theta)
        try:
            yield
        finally:
            if training is not None:
                self.engine.write(training)

    # --------------------------------------------------------------------------------- helpers

    def _step(self, steps: Steps, plan: Plan, step: int, global_step: int) -> None:
        """One inner step on the data of step ``step`` of this node in round ``plan``."""
        if self.private is None:
            tokens = self._portion.of_round(plan, step)
        else:
            tokens = self.private.batch(self.run.inner.batch_size)
        steps.lr = learning_rate(self.run.inner, global_step, self.run.total_steps, self.engine.steps)
        steps.losses.append(self.engine.step(tokens, steps.lr))
        steps.trace.record_batch(tokens)

    def _stand_at(self, record: Record | None, changed: Sequence[slice] | None) -> None:
        """Take up a place in the chain, with an outer state that differs from the last one in ``changed`` only."""
        self.host = self.outer.to(torch.device("cpu"))
        self.index = self.host.index() if changed is None else self.host.reindex(self.index, changed)
        self.chain = self.place(record, self.index.root)
        self.trace_recorder.record_state(self.chain.rounds, self.host, self.index)

    def _residual_root(self, round_number: int, steps: Steps) -> bytes:
        return self.trace_recorder.residual(steps.trace, self.residual, self.slices_of(round_number))

    def _encode(self, round_number: int) -> list[bytes]:
        payload = []
        for part in self.slices_of(round_number):
            residual = None if self.residual is None else self.residual[part]
            try:
                encoded = self.codec.encode(
                    self.outer.theta[part], self._snapshot[part], residual, self.run.codec.error_feedback
                )
            except NonFinite as error:
                name = self.engine.layout.name_at(part.start + error.position)
                raise NonFiniteParameter(
                    f"{name} became NaN or infinite: lower run.inner.lr or clip gradients"
                ) from None
            payload.append(encoded)
        return payload

    def global_step(self, plan: Plan) -> int:
        """Where the learning rate's schedule stands as round ``plan`` begins, for all alike: H a round, whatever each
        node's quota was."""
        return (plan.round - 1) * self.run.rounds.inner_steps

    def _norm(self, round_number: int, payload: Slices) -> float:
        parts = zip(payload, self.slices_of(round_number), strict=True)
        return sqrt(sum(self.codec.squared_norm(encoded, part.stop - part.start) for encoded, part in parts))

    def _salt(self, plan: Plan) -> bytes:
        """Unguessable to others, and the same again after a restart within the round."""
        return digest("salt", self._secret, self.manifest.run_id, plan.round.to_bytes(8, "little"), plan.seed)

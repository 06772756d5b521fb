"""DiLoCo (arXiv 2311.08105) on one page: a node's tensors, and what a round does to them.

No network and no clock in here: a worker drives a replica with what arrives on the wire, the single-process
reference drives several with what they hand each other, and both must end with the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from psyche.config import Manifest
from psyche.data.store import TokenStore
from psyche.errors import PsycheError
from psyche.numerics.aggregate import aggregate, share
from psyche.numerics.backends.base import Backend
from psyche.numerics.backends.choice import best
from psyche.numerics.codecs.base import NonFinite
from psyche.numerics.digest import blob_root, digest
from psyche.numerics.outer import OuterState
from psyche.protocol.acceptor import Chain
from psyche.protocol.assignment import next_position, positions, sequences
from psyche.protocol.messages import Contribution, Payload, Plan, Record, Slice
from psyche.training.engine import Engine
from psyche.training.schedules import learning_rate
from psyche.verification.traces import Trace

Slices = Sequence[bytes]
"""The encoded slices of one contribution, in the order of ``FlatLayout.slices()``."""


def table_of(slices: Slices) -> Payload:
    """The table of contents that a contribution's ``payload_root`` is the address of."""
    return Payload(tuple(Slice(blob_root(part), len(part)) for part in slices))


class Interrupted(Exception):
    """Training was stopped before the round's last inner step; nothing of it was encoded."""


class Exploded(PsycheError):
    """A parameter became NaN or infinite. The message names the tensor."""


@dataclass(frozen=True)
class Work:
    """What one round of local training produced."""

    contribution: Contribution
    payload: Slices
    loss: float
    """Mean over the inner steps, nats a token."""
    lr: float
    """Of the last inner step."""
    norm: float
    """‖D(payload)‖₂, the same value on every node that decodes it."""


class Replica:
    """The outer state, the engine that trains from it, and the error-feedback buffer of one node."""

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
        self.backend = best() if backend is None else backend
        self.codec = self.backend.codec(self.run.codec.name)
        self.adopt(outer, None)
        self.residual = torch.zeros_like(self.outer.theta) if self.codec.error_feedback else None

    # ------------------------------------------------------------------------------- one round

    def train(
        self,
        plan: Plan,
        *,
        progress: Callable[[int, float, float], None] = lambda step, loss, lr: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Work:
        """H inner steps from θ on this node's part of the data; then encode Δ = θ − θ_local.

        Calls ``progress(step, loss, lr)`` after each inner step. Raises :class:`Interrupted` once ``stop()``
        is true, and :class:`Exploded`.
        """
        member = plan.member(self.node)
        assert member is not None, "only members train"
        batch, train = self.run.inner.batch_size, self.store.train
        indices = sequences(positions(plan, self.node, batch), len(train), self.run.seed)
        trace = Trace()
        losses = []
        self.engine.write(self.outer.theta)
        for step in range(member.inner_steps):
            if stop():
                raise Interrupted
            tokens = train.batch(indices[step * batch : (step + 1) * batch])
            lr = learning_rate(self.run.inner, self.global_step(plan) + step, self.run.total_steps)
            losses.append(self.engine.step(tokens, lr))
            trace.saw(tokens)
            progress(step, losses[-1], lr)
        local = torch.empty_like(self.outer.theta)
        self.engine.read(local)
        trace.mark(member.inner_steps, local)
        payload = self._encode(local)
        contribution = Contribution(
            base_root=plan.base_root,
            data_digest=trace.data_digest,
            trace_root=trace.root,
            payload_root=blob_root(table_of(payload).encode()),
            payload_bytes=sum(len(part) for part in payload),
            inner_steps=member.inner_steps,
            tokens=member.inner_steps * self.run.tokens_per_step,
            salt=self._salt(plan),
        )
        return Work(contribution, payload, sum(losses) / len(losses), lr, self._norm(payload))

    def apply(self, record: Record, payloads: Mapping[str, Slices]) -> None:
        """The outer step of a certified record, from the payloads of all it accepted.

        Afterwards ``chain`` stands at the record, with the new state_root. Raises ``MalformedPayload``; the
        outer state is then undefined, which cannot happen with payloads that were checked on arrival.
        """
        total = sum(accepted.contribution.tokens for accepted in record.accepted)
        weights = {a.node: share(a.contribution.tokens, total) for a in record.accepted}
        theta, momentum = self.outer.theta, self.outer.momentum
        for number, part in enumerate(self.engine.layout.slices()):
            gradient = torch.empty_like(theta[part])
            aggregate(self.codec, ((weights[node], payloads[node][number]) for node in sorted(weights)), gradient)
            self.backend.outer_step(
                theta[part], momentum[part], gradient, lr=self.run.outer.lr, mu=self.run.outer.momentum
            )
        self._stand_at(record)

    def adopt(self, outer: OuterState, record: Record | None) -> None:
        """Take over an outer state fetched from others: that after ``record``, or that before the first round."""
        self.outer = outer.to(self.backend.device)
        self._stand_at(record)

    def give_back(self, payload: Slices) -> None:
        """e ← e + D(payload): a contribution that was not accepted loses nothing it has learned."""
        if self.residual is not None:
            for part, encoded in zip(self.engine.layout.slices(), payload, strict=True):
                self.codec.decode_add(encoded, 1.0, self.residual[part])

    def momentum_norm(self) -> float:
        """‖m‖₂; for people to look at, not the same on every hardware."""
        return float(torch.linalg.vector_norm(self.outer.momentum))

    def heldout_loss(self, member: int, members: int) -> tuple[float, int]:
        """This member's share of the held-out set under the outer parameters: loss sum, predicted tokens.

        Leaves θ in the engine. Sequence i of the set is judged by member i mod ``members``.
        """
        self.engine.write(self.outer.theta)
        count = min(self.run.heldout_sequences, len(self.store.heldout))
        indices = range(member, count, members)
        total, tokens = 0.0, 0
        for at in range(0, len(indices), self.run.inner.batch_size):
            loss, predicted = self.engine.evaluate(
                self.store.heldout.batch(indices[at : at + self.run.inner.batch_size])
            )
            total, tokens = total + loss, tokens + predicted
        return total, tokens

    # --------------------------------------------------------------------------------- helpers

    def _stand_at(self, record: Record | None) -> None:
        self.host = self.outer.to(torch.device("cpu"))
        """The outer state as it is hashed, served and saved: ``outer`` itself, unless that lies on a GPU."""
        self.index = self.host.index()
        """Its chunk hashes; their root is ``chain.state_root``."""
        if record is None:
            self.chain = Chain(0, self.manifest.run_id, self.index.root, 0)
        else:
            position = next_position(record.plan, self.run.inner.batch_size)
            self.chain = Chain(record.plan.round, record.hash, self.index.root, position)

    def _encode(self, local: Tensor) -> list[bytes]:
        payload = []
        for part in self.engine.layout.slices():
            residual = None if self.residual is None else self.residual[part]
            try:
                encoded = self.codec.encode(
                    self.outer.theta[part], local[part], residual, self.run.codec.error_feedback
                )
            except NonFinite as error:
                name = self.engine.layout.name_at(part.start + error.position)
                raise Exploded(f"{name} became NaN or infinite: lower run.inner.lr or clip gradients") from None
            payload.append(encoded)
        return payload

    def global_step(self, plan: Plan) -> int:
        """Inner steps of a member before round ``plan``, whether this node took them or not."""
        return (plan.round - 1) * self.run.rounds.inner_steps

    def _norm(self, payload: Slices) -> float:
        parts = zip(payload, self.engine.layout.slices(), strict=True)
        return sqrt(sum(self.codec.squared_norm(encoded, part.stop - part.start) for encoded, part in parts))

    def _salt(self, plan: Plan) -> bytes:
        """Unguessable to others, and the same again after a restart within the round."""
        return digest("salt", self._secret, self.manifest.run_id, plan.round.to_bytes(8, "little"), plan.seed)

"""DiLoCo (Douillard et al., arXiv 2311.08105) on one page: what one node does to its tensors in one round.

    local_step       H times: x ← AdamW(x)
    encode           Δ = θ − x;  e ← βe + Δ;  payload = Q(e);  e ← e − D(payload)
    aggregate        g = Σ wᵢ · D(payloadᵢ) over all nodes, in ascending node id
    outer_step       m ← μm + g;  θ ← θ − η(g + μm)
    apply_outer_update   x ← θ, or x ← x + (θ − s) if the node has trained on since it encoded

θ: parameters all nodes agree on; m: outer momentum; x: parameters the engine trains; s: copy of x from when it was
encoded; e: error feedback; Δ: pseudo-gradient; Q, D: encode and decode of the codec.

There is no network, clock or protocol here. :mod:`psyche.diloco.simulate` drives several nodes in one process,
:mod:`psyche.diloco.replica` adds what a run needs (data assignment, commitments, trace points, the chain).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt

import torch

from psyche.errors import PsycheError
from psyche.numerics.aggregate import AggregationRule, Gradient, payload_gradient
from psyche.numerics.backends.base import Backend
from psyche.numerics.codecs.base import NonFinite
from psyche.numerics.outer import OuterSettings, OuterState
from psyche.training.engine import Batch, Engine

Slices = Sequence[bytes]
"""The encoded slices of one payload, in the order of ``FlatLayout.fragments()``."""


class NonFiniteParameter(PsycheError):
    """A parameter became NaN or infinite. The message names the tensor."""


class DiLoCo:
    """One node's tensors, and the operations of a round on them, in the order in which they happen."""

    outer: OuterState
    """θ and m."""

    def __init__(
        self,
        engine: Engine,
        outer: OuterState,
        backend: Backend,
        *,
        codec: str,
        settings: OuterSettings,
        error_feedback: float = 1.0,
        fragments: int = 1,
        overlap_steps: int = 0,
    ) -> None:
        """Train with ``engine`` from ``outer``; compute codec and outer step with ``backend``.

        ``error_feedback`` is β. With more than one fragment, round r exchanges fragment (r − 1) mod ``fragments`` only
        (Streaming DiLoCo, arXiv 2501.18512). ``overlap_steps``: inner steps that the node may take between encoding and
        the outer step. Raises ``ValueError`` if the model has fewer layers than fragments.
        """
        self.engine, self.backend, self.settings = engine, backend, settings
        self.codec = backend.codec(codec)
        self.outer = outer.to(backend.device)
        self._beta = error_feedback
        self._local_differs = fragments > 1 or overlap_steps > 0
        """Whether x may differ from θ between rounds."""
        self._fragments = engine.layout.fragments(fragments)
        self._snapshot = torch.empty_like(self.outer.theta)
        self.residual = torch.zeros_like(self.outer.theta) if self.codec.error_feedback else None
        """Error feedback e, ``[n]`` fp32; None for a codec that loses nothing."""
        longest = max(part.stop - part.start for fragment in self._fragments for part in fragment)
        self._gradient = torch.empty(longest, device=backend.device)

    def slices_of(self, round_number: int) -> tuple[slice, ...]:
        """Return the ranges of the flat vector that a round exchanges (rounds count from 1)."""
        return self._fragments[(round_number - 1) % len(self._fragments)]

    # ------------------------------------------------------------------- one round, in order

    def start_from_outer(self) -> None:
        """x ← θ. The state of the inner optimizer stays (DiLoCo, §3)."""
        self.engine.write(self.outer.theta)

    def local_step(self, batch: Batch, lr: float) -> float:
        """Take one inner step on x. Returns the mean loss."""
        return self.engine.step(batch, lr)

    def snapshot(self) -> torch.Tensor:
        """s ← x. Returns s, which :meth:`encode` subtracts from θ."""
        self.engine.read(self._snapshot)
        return self._snapshot

    def encode(self, round_number: int) -> list[bytes]:
        """Encode the pseudo-gradient θ − s plus error feedback, slice by slice; what the codec lost stays in e.

        Raises :class:`NonFiniteParameter`.
        """
        payload = []
        for part in self.slices_of(round_number):
            residual = None if self.residual is None else self.residual[part]
            try:
                payload.append(self.codec.encode(self.outer.theta[part], self._snapshot[part], residual, self._beta))
            except NonFinite as error:
                name = self.engine.layout.name_at(part.start + error.position)
                raise NonFiniteParameter(
                    f"{name} became NaN or infinite: lower run.inner.lr or set run.inner.clip"
                ) from None
        return payload

    def aggregate(
        self, payloads: Mapping[str, Slices], weights: Mapping[str, float], rule: AggregationRule
    ) -> Gradient:
        """Combine the nodes' payloads, by node id, into the outer gradient. The sum runs when a slice is asked for."""
        return payload_gradient(self.codec, weights, payloads, rule)

    def outer_step(self, round_number: int, gradient: Gradient, outer: OuterState | None = None) -> None:
        """Take the outer step on the round's fragment, slice by slice.

        ``outer``: another state than this node's, on any device, such as one that is still being fetched. Raises what
        ``gradient`` raises; the state is then undefined, which payloads checked on arrival cannot cause.
        """
        outer, device = self.outer if outer is None else outer, self.backend.device
        for number, part in enumerate(self.slices_of(round_number)):
            total = self._gradient[: part.stop - part.start]
            gradient(number, total)
            theta, momentum = outer.theta[part].to(device), outer.momentum[part].to(device)
            self.backend.outer_step(theta, momentum, total, self.settings)
            if outer.tensor.device != device:
                outer.theta[part].copy_(theta)
                outer.momentum[part].copy_(momentum)

    def apply_outer_update(self, round_number: int, *, keep_local_steps: bool = False) -> None:
        """Move x by what the outer step changed in the round's fragment: x ← θ, bit for bit.

        ``keep_local_steps``: x has taken inner steps since it was encoded, and keeps them: x ← x + (θ − s).
        """
        parts = self.slices_of(round_number)
        if not keep_local_steps:
            self.engine.write(self.outer.theta, parts)
            return
        for part in parts:
            torch.sub(self.outer.theta[part], self._snapshot[part], out=self._snapshot[part])
        self.engine.shift(self._snapshot, parts)

    # ------------------------------------------------------------------------- beside the round

    def restore_residual(self, round_number: int, payload: Slices) -> None:
        """e ← e + D(payload): a payload that was rejected is sent again with the next round's."""
        if self.residual is not None:
            for part, encoded in zip(self.slices_of(round_number), payload, strict=True):
                self.codec.decode_add(encoded, 1.0, self.residual[part])

    def payload_norm(self, round_number: int, payload: Slices) -> float:
        """‖D(payload)‖₂, the same value on every node that decodes it."""
        parts = zip(payload, self.slices_of(round_number), strict=True)
        return sqrt(sum(self.codec.squared_norm(encoded, part.stop - part.start) for encoded, part in parts))

    def momentum_norm(self) -> float:
        """‖m‖₂, for display; it may differ between kinds of hardware."""
        return float(torch.linalg.vector_norm(self.outer.momentum))

    @contextmanager
    def outer_params(self) -> Iterator[None]:
        """Within the context the engine holds θ; x is put back afterwards."""
        local = torch.empty_like(self.outer.theta) if self._local_differs else None
        if local is not None:
            self.engine.read(local)
        self.engine.write(self.outer.theta)
        try:
            yield
        finally:
            if local is not None:
                self.engine.write(local)

"""One node's cheap checks of every round's payloads: norm, direction and copies."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from psyche.numerics.aggregate import PayloadSlices
from psyche.numerics.codecs.base import Codec
from psyche.numerics.outliers import REMEMBERED, Sample, find_outliers, sketch
from psyche.protocol.messages import Record


class OutlierDetector:
    """Looks for outliers among the payloads that one node sees, also against earlier rounds of the same fragment and
    slice."""

    def __init__(self, codec: Codec, secret: bytes, fragments: int) -> None:
        """``secret`` draws the sampled values; a cheat that knew it could look honest there only."""
        self._codec, self._secret, self._fragments = codec, secret, fragments
        self._seen = deque[tuple[int, Sample, Mapping[str, Tensor]]](maxlen=REMEMBERED * fragments)
        """Fragment, sample, and signs by node of the last rounds."""

    def look(
        self, record: Record, counts: Sequence[int], payloads: Mapping[str, PayloadSlices], seen: Collection[int]
    ) -> dict[str, str]:
        """Return those whose accepted contribution stood out, and by which check, ascending by node.

        ``counts`` are the parameters of the payloads' slices, ``seen`` the numbers of those that are in ``payloads``.
        What nodes with data of their own contribute is not looked at: it is noise on purpose, and nobody can audit it.
        """
        given = {one.node: one.contribution for one in record.accepted if one.node in payloads}
        steps = {node: one.inner_steps for node, one in given.items() if not one.private}
        if not seen or not steps:
            return {}
        sample = Sample.drawn(self._secret, {number: counts[number] for number in seen})
        sketches = {node: sketch(self._codec, payloads[node][sample.slice], sample) for node in steps}
        fragment = record.plan.round % self._fragments
        found = find_outliers(sketches, steps, [signs for *where, signs in self._seen if where == [fragment, sample]])
        self._seen.append((fragment, sample, {node: one.signs for node, one in sketches.items()}))
        return found

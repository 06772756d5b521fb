"""Cheap checks of a round's payloads against each other: a contribution that stands out is audited more often.

They convict nobody and exclude no work, because an honest node can have unusual data. They use a *sample*, some chunks
of one slice, that each node draws with a secret of its own, so a dishonest node does not know which values have to look
honest. Direction, copies and repeats are cosines between samples, computed by one matrix product:

- norm: the norm of the sampled slice against the median of the round. Detects scaling and missing training.
- direction: the cosine with the mean of all other payloads. Detects random updates and sign flips.
- copy, stale: the cosine of sign patterns (−1, 0, 1, which for sparse codecs covers the indices) with every other
  payload of the round, with those of earlier rounds, and with the node's own earlier ones. Detects copied work.

The thresholds come from 984 payloads of honest runs of the small model of ``psyche bench convergence`` (2 to 8 nodes;
int8 and topk2; 6, 8, 10 and 30 inner steps; shared or separate corpora; quotas equal or 8:6:4:3). Each constant names
the extreme of those.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import normalize
from typing_extensions import Buffer

from psyche.numerics.codecs.base import Codec
from psyche.numerics.digest import digest
from psyche.numerics.flat import ALIGNMENT

CHUNKS = 8
"""Chunks of 4096 parameters in a sample. Cosines of unrelated payloads are then within ±0.006."""
REMEMBERED = 3
"""Earlier rounds that payloads are compared with. Repeating older work harms its sender more than the run."""
GROWTH = 0.75
"""Exponent of the growth of norms with inner steps: between 1/2 (random walk) and 1 (straight line)."""
NORM_BAND, NORM_MADS = 0.4, 3.0
"""Allowed distance of the log of a norm from the median: a fixed part plus a multiple of the median absolute deviation.
Honest: up to 0.19 at equal quotas, 0.46 at quotas of 8:6:4:3."""
DIRECTION = 1 / 3
"""Least cosine with the mean of the others, relative to the median cosine. Honest: at least 0.41, in small samples."""
COPY = 0.5
"""Allowed similarity of the signs of two nodes, from 0 (usual in the round) to 1 (identical). Honest: up to 0.22."""
STALE = 0.7
"""The same for a node's own earlier payloads. Honest: up to 0.48, with so few inner steps that θ hardly moves."""
MOST_ALIKE = 0.75
"""Upper limit of the usual cosine of signs. Honest: up to 0.72, for a node's own in rounds of few steps."""


@dataclass(frozen=True)
class Sample:
    """The chunks that are compared, the same in every payload."""

    slice: int
    """Index of the slice in the payload."""
    count: int
    """Parameters of the slice."""
    chunks: tuple[int, ...]
    """Indices of chunks of 4096 parameters in the slice, ascending."""

    @classmethod
    def drawn(cls, secret: bytes, counts: Mapping[int, int]) -> Sample:
        """Draw a sample deterministically from ``secret`` and the available slices (index → parameters)."""

        def order(kind: str, number: int) -> bytes:
            return digest("outliers", secret, kind.encode(), number.to_bytes(8, "little"))

        chosen = min(counts, key=lambda number: order("slice", number))
        chunks = sorted(range(counts[chosen] // ALIGNMENT), key=lambda number: order("chunk", number))
        return cls(chosen, counts[chosen], tuple(sorted(chunks[:CHUNKS])))


@dataclass(frozen=True)
class Sketch:
    """A payload reduced to what the checks compare."""

    norm: float
    """Norm of the whole slice, computed by the codec."""
    values: Tensor
    """Values of the sampled chunks, fp32 ``[k]`` on the CPU, scaled to length 1; all zeros stay zero."""

    @property
    def signs(self) -> Tensor:
        """Signs of the values, int8 ``[k]``: the part that is kept for later rounds."""
        return torch.sign(self.values).to(torch.int8)


def sketch(codec: Codec, encoded: Buffer, sample: Sample) -> Sketch:
    """Compute the sketch of a payload from its slice ``sample.slice``. Raises ``MalformedPayload``."""
    norm = sqrt(codec.squared_norm(encoded, sample.count))
    whole = torch.zeros(sample.count, device=codec.device)
    codec.decode_add(encoded, 1.0, whole)
    values = whole.view(-1, ALIGNMENT)[list(sample.chunks)].cpu().view(-1)
    return Sketch(norm, normalize(values, dim=0))


def find_outliers(
    sketches: Mapping[str, Sketch], steps: Mapping[str, int], before: Sequence[Mapping[str, Tensor]]
) -> dict[str, str]:
    """Find the nodes that stand out, with the name of the check (the last of several), in ascending order.

    ``steps`` are the inner steps of each node, ``before`` the :attr:`Sketch.signs` of earlier rounds in the same
    sample. Norm and direction are checked only with three payloads or more, since they need a median.
    """
    nodes = sorted(sketches)
    if not nodes:
        return {}
    found: dict[str, str] = {}
    if len(nodes) > 2:
        found |= dict.fromkeys(_unusual_norms({node: sketches[node].norm for node in nodes}, steps), "norm")
        found |= dict.fromkeys(_against_the_mean([sketches[node].values for node in nodes], nodes), "direction")
    signs = {node: sketches[node].signs for node in nodes}
    for earlier in before:
        found |= _copies_of_earlier(signs, earlier)
    found |= _copies_in_round(signs)
    return dict(sorted(found.items()))


def _unusual_norms(norms: Mapping[str, float], steps: Mapping[str, int]) -> Iterable[str]:
    levels = {node: log(norm) - GROWTH * log(steps[node]) for node, norm in norms.items() if norm > 0}
    if not levels:
        return norms
    middle = median(levels.values())
    band = NORM_BAND + NORM_MADS * median(abs(level - middle) for level in levels.values())
    return [node for node in norms if node not in levels or abs(levels[node] - middle) > band]


def _against_the_mean(values: Sequence[Tensor], nodes: Sequence[str]) -> Iterable[str]:
    rows = torch.stack(list(values))
    others = rows.sum(0) - rows
    cosines = ((rows * others).sum(1) / torch.linalg.vector_norm(others, dim=1).clamp_min(1e-30)).tolist()
    least = DIRECTION * median(cosines)
    return [node for node, cosine in zip(nodes, cosines, strict=True) if cosine < least]


def _copies_in_round(signs: Mapping[str, Tensor]) -> dict[str, str]:
    nodes = list(signs)
    near = _relative_similarity(_cosines(signs, signs).fill_diagonal_(float("nan")))
    return {node: "copy" for node, row in zip(nodes, near.tolist(), strict=True) if any(one > COPY for one in row)}


def _copies_of_earlier(signs: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> dict[str, str]:
    """Nodes whose signs resemble those of an earlier round: ``copy`` for another node's, ``stale`` for their own."""
    own = torch.tensor([[one == other for other in earlier] for one in signs])
    cosines, nan = _cosines(signs, earlier), torch.tensor(float("nan"))
    of_others = (_relative_similarity(cosines.where(~own, nan)) > COPY).any(1).tolist()
    of_own = (_relative_similarity(cosines.where(own, nan)) > STALE).any(1).tolist()
    found = {}
    for node, copied, repeated in zip(signs, of_others, of_own, strict=True):
        if copied or repeated:
            found[node] = "copy" if copied else "stale"
    return found


def _cosines(these: Mapping[str, Tensor], those: Mapping[str, Tensor]) -> Tensor:
    """Cosines of all pairs, fp32 ``[these, those]``."""
    left, right = (torch.stack(list(some.values())).float() for some in (these, those))
    return normalize(left) @ normalize(right).T


def _relative_similarity(cosines: Tensor) -> Tensor:
    """Rescale cosines so that 0 is the usual value and 1 means identical. NaN entries are ignored.

    The usual value is the 75th percentile, which holds for honest nodes even where a quarter of them flip signs or copy
    each other. It is at most ``MOST_ALIKE``, and equals that where there are fewer than three cosines.
    """
    some = cosines[~cosines.isnan()]
    usual = min(MOST_ALIKE, max(0.0, float(some.quantile(0.75)))) if len(some) > 2 else MOST_ALIKE
    return (cosines - usual) / (1 - usual)

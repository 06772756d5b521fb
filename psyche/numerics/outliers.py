"""Cheap checks of a round's payloads beside each other: who stands out is audited more often (DESIGN §8).

Nobody is convicted by them, and nobody's work is left out: an honest node may have unusual data. They are looked at
through a *sample*, some chunks of one slice, that each node draws with a secret of its own, so that nobody knows which
values have to look honest. All of it is cosines between samples, one product of matrices:

- norm: that of the sampled slice, against the median of the round's. It catches scaling, and what was not trained.
- direction: the cosine with the mean of all others. It catches what was trained on nothing, or the wrong way.
- copy, stale: the cosine of the patterns of signs (−1, 0, 1; so for sparse codecs of the indices, too) with every other
  payload of the round, with those of rounds before, and with the node's own of these. They catch whom somebody else, or
  an earlier round, did the work for.

The constants are chosen from 984 payloads of honest runs of the small model of ``psyche bench convergence`` (2 to 8
nodes; int8 and topk2; 6, 8, 10 and 30 inner steps; everybody's text dealt from one corpus, or a corpus of its own;
equal quotas, and 8:6:4:3): the extremes of those stand beside them.
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
"""Of 4096 parameters, that are sampled of every payload: cosines of unrelated ones are ± .006 then."""
REMEMBERED = 3
"""Rounds whose payloads new ones are compared with: what is older does more harm to its sender than to the run."""
GROWTH = 0.75
"""Norms grow with this power of the inner steps: between the 1/2 of a random walk and the 1 of a straight line."""
NORM_BAND, NORM_MADS = 0.4, 3.0
"""How far the logarithm of a norm may be from the median, in units and in median absolute deviations on top. Honest:
.19 at equal quotas, .46 at quotas of 8:6:4:3."""
DIRECTION = 1 / 3
"""The least share of the median cosine with the mean of the others. Honest: .41, in the smallest of samples."""
COPY = 0.5
"""How near a pattern of signs may be to that of another node, from 0, as near as is usual, to 1, the same.
Honest: .22."""
STALE = 0.7
"""The same for a node's own of a round before. Honest: .48, at few inner steps, between which θ hardly moves."""
MOST_ALIKE = 0.75
"""The most that cosines of patterns of signs can be usual at. Honest: .72, a node's own in rounds of few steps."""


@dataclass(frozen=True)
class Sample:
    """Where payloads are looked at, the same in each."""

    slice: int
    """Number of the slice within the payload."""
    count: int
    """Its parameters."""
    chunks: tuple[int, ...]
    """Of 4096 parameters, within the slice, ascending."""

    @classmethod
    def drawn(cls, secret: bytes, counts: Mapping[int, int]) -> Sample:
        """Of the slices that are here, by number with how many parameters each has: always the same of the same."""

        def order(kind: str, number: int) -> bytes:
            return digest("outliers", secret, kind.encode(), number.to_bytes(8, "little"))

        chosen = min(counts, key=lambda number: order("slice", number))
        chunks = sorted(range(counts[chosen] // ALIGNMENT), key=lambda number: order("chunk", number))
        return cls(chosen, counts[chosen], tuple(sorted(chunks[:CHUNKS])))


@dataclass(frozen=True)
class Sketch:
    """What a payload looks like in a sample."""

    norm: float
    """Of the whole slice, by the codec."""
    values: Tensor
    """Of the sampled chunks, fp32 ``[k]`` on the CPU, scaled to length 1; zeros where there is nothing else."""

    @property
    def signs(self) -> Tensor:
        """int8 ``[k]``: all that is kept of it for later rounds."""
        return torch.sign(self.values).to(torch.int8)


def sketch(codec: Codec, encoded: Buffer, sample: Sample) -> Sketch:
    """Of the payload whose slice ``sample.slice`` is ``encoded``. Raises ``MalformedPayload``."""
    norm = sqrt(codec.squared_norm(encoded, sample.count))
    whole = torch.zeros(sample.count, device=codec.device)
    codec.decode_add(encoded, 1.0, whole)
    values = whole.view(-1, ALIGNMENT)[list(sample.chunks)].cpu().view(-1)
    return Sketch(norm, normalize(values, dim=0))


def outliers(
    sketches: Mapping[str, Sketch], steps: Mapping[str, int], before: Sequence[Mapping[str, Tensor]]
) -> dict[str, str]:
    """Who stands out, and by which check (of several the last of those above), ascending by node.

    ``steps`` are the inner steps behind each sketch, ``before`` the :attr:`Sketch.signs` of earlier rounds, in the same
    sample. Norm and direction have a median to be measured by from three payloads on.
    """
    nodes = sorted(sketches)
    if not nodes:
        return {}
    found: dict[str, str] = {}
    if len(nodes) > 2:
        found |= dict.fromkeys(_norms({node: sketches[node].norm for node in nodes}, steps), "norm")
        found |= dict.fromkeys(_astray([sketches[node].values for node in nodes], nodes), "direction")
    signs = {node: sketches[node].signs for node in nodes}
    for earlier in before:
        found |= _stale(signs, earlier)
    found |= _copies(signs)
    return dict(sorted(found.items()))


def _norms(norms: Mapping[str, float], steps: Mapping[str, int]) -> Iterable[str]:
    levels = {node: log(norm) - GROWTH * log(steps[node]) for node, norm in norms.items() if norm > 0}
    if not levels:
        return norms
    middle = median(levels.values())
    band = NORM_BAND + NORM_MADS * median(abs(level - middle) for level in levels.values())
    return [node for node in norms if node not in levels or abs(levels[node] - middle) > band]


def _astray(values: Sequence[Tensor], nodes: Sequence[str]) -> Iterable[str]:
    rows = torch.stack(list(values))
    others = rows.sum(0) - rows
    cosines = ((rows * others).sum(1) / torch.linalg.vector_norm(others, dim=1).clamp_min(1e-30)).tolist()
    least = DIRECTION * median(cosines)
    return [node for node, cosine in zip(nodes, cosines, strict=True) if cosine < least]


def _copies(signs: Mapping[str, Tensor]) -> dict[str, str]:
    nodes = list(signs)
    near = _nearness(_cosines(signs, signs).fill_diagonal_(float("nan")))
    return {node: "copy" for node, row in zip(nodes, near.tolist(), strict=True) if any(one > COPY for one in row)}


def _stale(signs: Mapping[str, Tensor], earlier: Mapping[str, Tensor]) -> dict[str, str]:
    own = torch.tensor([[one == other for other in earlier] for one in signs])
    cosines, nan = _cosines(signs, earlier), torch.tensor(float("nan"))
    others, mine = _nearness(cosines.where(~own, nan)) > COPY, _nearness(cosines.where(own, nan)) > STALE
    named = {}
    for node, copied, repeated in zip(signs, others.any(1).tolist(), mine.any(1).tolist(), strict=True):
        if copied or repeated:
            named[node] = "copy" if copied else "stale"
    return named


def _cosines(these: Mapping[str, Tensor], those: Mapping[str, Tensor]) -> Tensor:
    """fp32 ``[these, those]``."""
    left, right = (torch.stack(list(some.values())).float() for some in (these, those))
    return normalize(left) @ normalize(right).T


def _nearness(cosines: Tensor) -> Tensor:
    """Cosines from 0, what is usual here, to 1.

    Usual is what a quarter of those that are no NaN are above: of the honest, too, where a quarter of the nodes turn
    around or copy each other. Where there are fewer than three, or most are the same, it is taken to be .75.
    """
    some = cosines[~cosines.isnan()]
    usual = min(MOST_ALIKE, max(0.0, float(some.quantile(0.75)))) if len(some) > 2 else MOST_ALIKE
    return (cosines - usual) / (1 - usual)

"""From a codec's name in the manifest to the fastest implementation that works here."""

from __future__ import annotations

from psyche.numerics.codecs.base import Codec
from psyche.numerics.codecs.fp32 import Fp32
from psyche.numerics.codecs.int2 import Int2
from psyche.numerics.codecs.int4 import Int4
from psyche.numerics.codecs.int8 import Int8
from psyche.numerics.codecs.names import CODECS, KEPT
from psyche.numerics.codecs.topk2 import TopK2
from psyche.numerics.codecs.topk2e import TopK2e

_ALL: list[Codec] = [Fp32(), Int8(), Int4(128), Int4(32), Int2(), *map(TopK2, KEPT), *map(TopK2e, KEPT)]
_REFERENCE = {codec.name: codec for codec in _ALL}
assert tuple(_REFERENCE) == CODECS


def codec(name: str) -> Codec:
    """The codec of that name. Raises ``KeyError`` for a name that configuration would have refused."""
    return _REFERENCE[name]

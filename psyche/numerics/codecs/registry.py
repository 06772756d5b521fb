"""From a codec's name in the manifest to the fastest implementation that works here."""

from __future__ import annotations

from psyche.numerics.codecs.base import Codec
from psyche.numerics.codecs.fp32 import Fp32
from psyche.numerics.codecs.int8 import Int8
from psyche.numerics.codecs.names import CODECS

_REFERENCE: dict[str, type[Codec]] = {codec.name: codec for codec in (Fp32, Int8)}
assert tuple(_REFERENCE) == CODECS


def codec(name: str) -> Codec:
    """The codec of that name. Raises ``KeyError`` for a name that configuration would have refused."""
    return _REFERENCE[name]()

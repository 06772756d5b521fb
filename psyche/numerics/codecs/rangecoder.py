"""An adaptive binary range coder, for the entropy-coded sparse codecs.

Range coding with carry propagation and shift-adapted bit probabilities, as in LZMA (Martin, "Range encoding", 1979;
Pavlov's LZMA specification), with 12-bit probabilities. All state is integer, so every machine decodes the same.
"""

from __future__ import annotations

PROBABILITY_BITS = 12
EVEN = 1 << (PROBABILITY_BITS - 1)
"""The initial probability of a 0: one half."""
ADAPTATION = 5
"""A model moves by 2^-5 of its prediction error. On real data 5 produces fewer bytes than 4."""
_TOP = 1 << 24
_MASK = 0xFFFFFFFF


class CorruptStream(Exception):
    """No encoder produces this stream, or it is truncated."""


class BitModel:
    """Adaptive bit probabilities for one kind of symbol, indexed by a context that the caller chooses."""

    def __init__(self, contexts: int) -> None:
        self.zero = [EVEN] * contexts
        """Probability of a 0 in each context, in units of 2^-12; stays within 31…4065, so both bits can be coded."""

    def update(self, context: int, bit: int) -> None:
        """Increase the probability of ``bit``."""
        if bit:
            self.zero[context] -= self.zero[context] >> ADAPTATION
        else:
            self.zero[context] += ((1 << PROBABILITY_BITS) - self.zero[context]) >> ADAPTATION


class RangeEncoder:
    """Encodes symbols to bytes."""

    def __init__(self) -> None:
        self._low, self._range = 0, _MASK
        self._cache, self._pending = 0, 1
        self._out = bytearray()

    def bit(self, model: BitModel, context: int, bit: int) -> None:
        bound = (self._range >> PROBABILITY_BITS) * model.zero[context]
        if bit:
            self._low += bound
            self._range -= bound
        else:
            self._range = bound
        model.update(context, bit)
        self._normalise()

    def tree(self, model: BitModel, offset: int, value: int, bits: int) -> None:
        """Encode a ``bits``-bit value, highest bit first; uses contexts ``offset + 1 … offset + 2^bits − 1``."""
        node = 1
        for at in range(bits - 1, -1, -1):
            bit = value >> at & 1
            self.bit(model, offset + node, bit)
            node = 2 * node + bit

    def raw(self, value: int, bits: int) -> None:
        """Encode a value of ``bits`` bits (at most 16) without a model."""
        self._range >>= bits
        self._low += value * self._range
        self._normalise()

    def finish(self) -> bytes:
        for _ in range(5):
            self._shift()
        return bytes(self._out)

    def _normalise(self) -> None:
        while self._range < _TOP:
            self._range = self._range << 8 & _MASK
            self._shift()

    def _shift(self) -> None:
        """Output the top byte of ``low``. A byte of 255 is held back: a carry can still propagate through it."""
        if self._low < 0xFF000000 or self._low > _MASK:
            carry = self._low >> 32
            self._out.append(self._cache + carry & 0xFF)
            self._out += bytes([0xFF + carry & 0xFF]) * (self._pending - 1)
            self._pending = 0
            self._cache = self._low >> 24 & 0xFF
        self._pending += 1
        self._low = self._low << 8 & _MASK


class RangeDecoder:
    """Decodes bytes to symbols. Methods raise :class:`CorruptStream`; the caller checks what the symbols mean."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0
        self._range, self._code = _MASK, 0
        self._pull()
        if self._code:  # the first byte of an encoder is its empty cache
            raise CorruptStream
        for _ in range(4):
            self._pull()
        if self._code == _MASK:  # from here on the code stays below the range
            raise CorruptStream

    def finish(self) -> None:
        """Raise :class:`CorruptStream` unless all bytes were consumed."""
        if self._at != len(self._data):
            raise CorruptStream

    def bit(self, model: BitModel, context: int) -> int:
        bound = (self._range >> PROBABILITY_BITS) * model.zero[context]
        bit = int(self._code >= bound)
        if bit:
            self._code -= bound
            self._range -= bound
        else:
            self._range = bound
        model.update(context, bit)
        self._normalise()
        return bit

    def tree(self, model: BitModel, offset: int, bits: int) -> int:
        node = 1
        for _ in range(bits):
            node = 2 * node + self.bit(model, offset + node)
        return node - (1 << bits)

    def raw(self, bits: int) -> int:
        self._range >>= bits
        value = self._code // self._range
        if value >> bits:
            raise CorruptStream
        self._code -= value * self._range
        self._normalise()
        return value

    def _normalise(self) -> None:
        while self._range < _TOP:
            self._range = self._range << 8 & _MASK
            self._pull()

    def _pull(self) -> None:
        if self._at >= len(self._data):
            raise CorruptStream
        self._code = (self._code << 8 | self._data[self._at]) & _MASK
        self._at += 1

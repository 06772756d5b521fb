"""An adaptive binary range coder: symbols with the probabilities they turn out to have, at their entropy.

Range coding with carry propagation and shift-adapted bit probabilities, as in LZMA (Martin, "Range encoding", 1979;
Pavlov's LZMA specification), with 12-bit probabilities. All state is integers, so every machine reads the same.
"""

from __future__ import annotations

PROBABILITY_BITS = 12
EVEN = 1 << (PROBABILITY_BITS - 1)
"""What a bit's model starts from: a zero as probable as a one."""
ADAPTATION = 5
"""A model moves by 2^-5 of what it was surprised by: of 4 and 5, the one with fewer bytes on real data."""
_TOP = 1 << 24
_MASK = 0xFFFFFFFF


class Corrupt(Exception):
    """No encoder writes this stream, or it ends before its symbols do."""


class Model:
    """Adaptive probabilities of the bits of one kind of symbol, addressed by a context of the caller's."""

    def __init__(self, contexts: int) -> None:
        self.zero = [EVEN] * contexts
        """Probability of a 0 in each context, in units of 2^-12; from 31 to 4065, so that both bits can be coded."""

    def saw(self, context: int, bit: int) -> None:
        """Make ``bit`` a little more probable."""
        if bit:
            self.zero[context] -= self.zero[context] >> ADAPTATION
        else:
            self.zero[context] += ((1 << PROBABILITY_BITS) - self.zero[context]) >> ADAPTATION


class Encoder:
    """Symbols to bytes."""

    def __init__(self) -> None:
        self._low, self._range = 0, _MASK
        self._cache, self._pending = 0, 1
        self._out = bytearray()

    def bit(self, model: Model, context: int, bit: int) -> None:
        bound = (self._range >> PROBABILITY_BITS) * model.zero[context]
        if bit:
            self._low += bound
            self._range -= bound
        else:
            self._range = bound
        model.saw(context, bit)
        self._normalise()

    def tree(self, model: Model, offset: int, value: int, bits: int) -> None:
        """A ``bits``-bit value, highest bit first; contexts ``offset + 1 … offset + 2^bits − 1``."""
        node = 1
        for at in range(bits - 1, -1, -1):
            bit = value >> at & 1
            self.bit(model, offset + node, bit)
            node = 2 * node + bit

    def raw(self, value: int, bits: int) -> None:
        """A value all of whose ``bits`` (at most 16) are as good as random."""
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
        """Move the top byte of ``low`` out. A byte of 255 waits, since a carry may still pass through it."""
        if self._low < 0xFF000000 or self._low > _MASK:
            carry = self._low >> 32
            self._out.append(self._cache + carry & 0xFF)
            self._out += bytes([0xFF + carry & 0xFF]) * (self._pending - 1)
            self._pending = 0
            self._cache = self._low >> 24 & 0xFF
        self._pending += 1
        self._low = self._low << 8 & _MASK


class Decoder:
    """Bytes to symbols. Raises :class:`Corrupt`; what the symbols mean is for the caller to check."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0
        self._range, self._code = _MASK, 0
        self._pull()
        if self._code:  # an encoder's first byte is its empty cache
            raise Corrupt
        for _ in range(4):
            self._pull()
        if self._code == _MASK:  # from here on the code is below the range
            raise Corrupt

    def finish(self) -> None:
        """Raise :class:`Corrupt` unless the last symbol was read with the last byte."""
        if self._at != len(self._data):
            raise Corrupt

    def bit(self, model: Model, context: int) -> int:
        bound = (self._range >> PROBABILITY_BITS) * model.zero[context]
        bit = int(self._code >= bound)
        if bit:
            self._code -= bound
            self._range -= bound
        else:
            self._range = bound
        model.saw(context, bit)
        self._normalise()
        return bit

    def tree(self, model: Model, offset: int, bits: int) -> int:
        node = 1
        for _ in range(bits):
            node = 2 * node + self.bit(model, offset + node)
        return node - (1 << bits)

    def raw(self, bits: int) -> int:
        self._range >>= bits
        value = self._code // self._range
        if value >> bits:
            raise Corrupt
        self._code -= value * self._range
        self._normalise()
        return value

    def _normalise(self) -> None:
        while self._range < _TOP:
            self._range = self._range << 8 & _MASK
            self._pull()

    def _pull(self) -> None:
        if self._at >= len(self._data):
            raise Corrupt
        self._code = (self._code << 8 | self._data[self._at]) & _MASK
        self._at += 1
